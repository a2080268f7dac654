"""Writing to what may never take it: files, pipes, terminals and servers outside of this program.

An open of a FIFO without a reader, a write to a full pipe or a call on a file system that hangs cannot be interrupted
from inside the process. So they are made in daemon threads, and every wait for such a thread has a limit. A thread that
is stuck at the end of the process is left to the kernel: `builder.__main__` exits without waiting for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from builder.host.deadlines import Deadline

T = TypeVar("T")
GiveUp = Callable[[], bool]

#: Seconds between two looks at whether to give up.
_EVERY = 0.05
#: Seconds for which bytes are waited for even then: a reader that is there takes them in less on a busy machine.
_LEAST = 0.3
#: Bytes of one write to a pipe: what it takes whole or not at all, so that a slow reader is seen to make progress.
_PIECE = select.PIPE_BUF


class StuckError(Exception):
    """Something outside of this program did not answer in time. The message says what, and for how long."""


def never() -> bool:
    """Return False: give up for no reason but the time."""
    return False


def call(action: Callable[[], T], what: str, seconds: float, *, give_up: GiveUp = never) -> T:
    """Return `action()`, which runs in its own thread. Raises what it raises, and StuckError after `seconds`.

    The call may still take effect after that.

    what: subject of the error's sentence, e.g. ``GITHUB_OUTPUT``. give_up: polled; true ends the wait at once.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    try:
        thread = start_thread(run, "outside")
    except RuntimeError as error:
        raise StuckError(f"{what} was left alone: {error}") from None
    limit = Deadline(seconds)
    while thread.is_alive() and not limit.expired:
        thread.join(min(_EVERY, limit.left()))
        if thread.is_alive() and give_up():
            break
    if errors:
        raise errors[0]
    if not results:
        raise StuckError(f"{what} took nothing in time")
    return results[0]


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread that gets no signals: they are for the main thread. Raises RuntimeError without room."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


class Writer:
    """Writes bytes to one place outside, in order, in its own thread. All methods may be called by any thread.

    The first error ends the writing; `error` has it. Nothing here raises, but for a thread that cannot be started.

    opened: makes a descriptor, in the thread; with `owned` it is closed there at the end.
    most: bytes that may wait; what is put beyond them is dropped, and counted in `dropped`.
    """

    def __init__(self, opened: Callable[[], int], *, most: int, piece: int = _PIECE, owned: bool = True) -> None:
        self._opened = opened
        self._most = most
        self._piece = piece
        self._owned = owned
        self._queue: deque[bytes] = deque()
        self._waiting = 0
        self._progress = time.monotonic()
        self._closed = False
        self._finished = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.dropped = 0
        self.error: OSError | ValueError | None = None

    def start(self) -> None:
        """Start the thread. Raises RuntimeError where there is no room for one."""
        self._thread = start_thread(self._run, "writer")

    @property
    def is_finished(self) -> bool:
        """Return whether the thread has closed its place, after the last byte or an error."""
        return self._finished

    def put(self, data: bytes) -> bool:
        """Add these bytes, or drop them; return whether they were added. Never waits."""
        with self._changed:
            if self.error is not None or self._closed or self._waiting + len(data) > self._most:
                self.dropped += len(data)
                return False
            if not self._waiting:
                self._progress = time.monotonic()
            self._queue.append(data)
            self._waiting += len(data)
            self._changed.notify_all()
            return True

    def wait(self, room: int, patience: float | None, *, give_up: GiveUp = never) -> bool:
        """Wait until at most `room` bytes wait; return False if none was taken for `patience` seconds, or on give_up.

        patience: None waits for as long as it takes.
        """
        return self._wait(lambda: self._waiting <= room or self.error is not None, patience, give_up)

    def close(self, patience: float | None, *, give_up: GiveUp = never) -> bool:
        """Take no more bytes, and wait until all are written and the place is closed; return whether they are.

        patience, give_up: as in `wait`. May be called twice.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        finished = self._wait(lambda: self._finished, patience, give_up)
        if finished and self._thread is not None:
            self._thread.join(_EVERY)
        return finished and self.error is None

    def _wait(self, done: Callable[[], bool], patience: float | None, give_up: GiveUp) -> bool:
        began = time.monotonic()
        with self._changed:
            while not done():
                now = time.monotonic()
                if patience is not None and now - max(began, self._progress) >= patience:
                    return False
                self._changed.wait(_EVERY)
                if now - began >= _LEAST and give_up():
                    return done()
        return True

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_all()
        except (OSError, ValueError) as error:
            with self._changed:
                self.error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _write_all(self) -> None:
        descriptor = self._opened()
        try:
            while (data := self._next()) is not None:
                self._write(descriptor, memoryview(data))
        except BaseException:
            if self._owned:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            raise
        if self._owned:
            os.close(descriptor)

    def _next(self) -> bytes | None:
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            return self._queue.popleft()

    def _write(self, descriptor: int, data: memoryview) -> None:
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT)
        while data:
            poller.poll()  # another process may have made a shared pipe non-blocking
            try:
                size = os.write(descriptor, data[: self._piece])
            except BlockingIOError:
                continue
            data = data[size:]
            with self._changed:
                self._waiting -= size
                self._progress = time.monotonic()
                self._changed.notify_all()
