"""One child process in its own session: its output is copied and read while it runs, and it is ended reliably.

A separate thread moves the output, so that the main thread can wait for an answer over HTTP meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from builder import processes
from builder.agent.guard import Guard
from builder.agent.log_watch import Watch
from builder.agent.output import STDERR, STDOUT, Output, Redactor
from builder.agent.progress import LogProgress
from builder.processes import describe_status

CHUNK = 1 << 20
HOLD_SECONDS = 0.2  # that the beginning of a line is held back for the rest of it
HOLD_BYTES = 64 << 10
LINGER_SECONDS = 2.0  # after a crash line: the rest of its traceback
LINGER_SILENCE = 0.3
ABANDON_SECONDS = 5.0  # without output, on streams of an ended child that an unkillable process holds open

_F_SETPIPE_SZ = 1031  # linux/fcntl.h; named in the fcntl module only since Python 3.10


class Failed(Exception):
    """The task cannot succeed any more. The message is the reason."""


class _Stream:
    """One of the child's two streams: copied to the log, and cut into whole lines for the watch."""

    def __init__(self, number: int, output: Output, watch: Watch) -> None:
        self._number, self._output, self._watch = number, output, watch
        self._redactor = Redactor(output.secrets)
        self._seen = b""  # of the line in progress: read and copied
        self._held = b""  # of the line in progress: read, not copied yet
        self._since = 0.0

    def feed(self, data: bytes) -> None:
        self._take(self._redactor.feed(data))

    def tick(self, now: float) -> None:
        """Copy the beginning of a line that was held long enough."""
        if self._held and now - self._since >= HOLD_SECONDS:
            self._release()

    def finish(self) -> None:
        self._take(self._redactor.flush())
        if self._held:
            self._release()
        if self._seen:
            self._watch.lines(self._seen + b"\n")

    def _take(self, data: bytes) -> None:
        text = self._held + data
        cut = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if cut:
            self._watch.lines(self._seen + text[:cut] if self._seen else text[:cut])
            self._output.copy(self._number, text[:cut])
            self._seen = b""
        if cut or not self._held:
            self._since = time.monotonic()
        self._held = text[cut:]
        if len(self._held) > HOLD_BYTES:
            self._release()

    def _release(self) -> None:
        self._seen += self._held
        self._watch.partial(self._seen)
        self._output.copy(self._number, self._held)
        self._seen, self._held = self._seen[-HOLD_BYTES:], b""


class Child:
    """Runs argv. Use as a context manager: leaving it ends the child and everything that descends from it.

    grace: seconds between SIGTERM and SIGKILL.
    gentle: send SIGTERM to the child alone, for a server that stops its own workers and treats their death as a crash;
        otherwise to its whole process group.
    keep: returns children of this program that go on when this one ends, without what is below them.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        output: Output,
        watch: Watch,
        guard: Guard,
        grace: float,
        gentle: bool = False,
        keep: Callable[[], tuple[int, ...]] = lambda: (),
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._argv, self._env, self._cwd = list(argv), dict(env), cwd
        self._output, self._guard, self._on_tick = output, guard, on_tick
        self._grace, self._gentle, self._keep = grace, gentle, keep
        self.watch = watch
        self.status: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pump: threading.Thread | None = None
        self._changed = threading.Event()
        self._last_output = time.monotonic()
        self._closing: float | None = None

    def __enter__(self) -> Child:
        try:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._cwd,
                env=self._env,
                start_new_session=True,
            )
        except OSError as error:
            place = error.filename or self._argv[0]
            hint = " (there may be no more processes: the PID limit)" if error.errno == errno.EAGAIN else ""
            raise Failed(f"cannot start {self._argv[0]}: {place}: {error.strerror}{hint}") from None
        except ValueError as error:
            raise Failed(f"cannot start {self._argv[0]!r}: {error}") from None
        pump = threading.Thread(target=self._drain, args=(self._process,), daemon=True)
        try:
            pump.start()
        except RuntimeError as error:  # what the interpreter makes of EAGAIN
            self.stop()
            raise Failed(f"cannot read the output of {self._argv[0]}: {error} (the PID limit)") from None
        self._pump = pump
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ended(self) -> bool:
        """Whether the process itself has ended; its descendants may still run."""
        if self.status is None and self._process is not None:
            self.status = self._process.poll()
        return self.status is not None

    def wait(self, until: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until `until()` is true; return False if the child ends, or `seconds` pass, before that.

        Raises Failed for a crash line (whatever the child does afterwards) and for a log above its limit, Stopped for
        a signal.
        """
        limit = None if seconds is None else time.monotonic() + seconds
        while True:
            self._guard.check()
            if self._output.full:
                raise Failed("the log limit is reached: no more was copied and the task was ended")
            ended = self.ended
            if ended:
                self._drained()
            if self.watch.crash:
                self._linger()
                raise Failed(str(self.watch.crash))
            if until():
                return True
            if ended or (limit is not None and time.monotonic() > limit):
                return False
            self._on_tick()
            self._changed.wait(0.1)
            self._changed.clear()

    def wait_ended(self, seconds: float | None = None) -> None:
        """Wait until the child has ended and all of its output is copied, at most `seconds`. Raises as `wait` does.

        Not `wait(lambda: self.ended)`: a child that ends between the two looks at it would leave output unread.
        """
        self.wait(lambda: False, seconds)

    def stop(self) -> None:
        """Send SIGTERM, then SIGKILL to everything that descends from the child. Returns when all of it has ended."""
        process = self._process
        if process is None:
            return
        if not self.ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                (os.kill if self._gentle else os.killpg)(process.pid, signal.SIGTERM)
        limit = time.monotonic() + self._grace
        while not self.ended and time.monotonic() < self._guard.stop_limit(limit):
            self._changed.wait(0.02)
            self._changed.clear()
        processes.kill_descendants(spare=(process.pid,), keep=self._keep())
        if self.status is None:
            self.status = process.wait()
        self._drained()
        self._process = None

    def describe_end(self, more: str = "") -> str:
        """Return how the child ended, in words, with the last line of its log."""
        last = f"; last line: {self.watch.last_line}" if self.watch.last_line else ""
        return f"{describe_status(self.status)}{more}{last}"

    def _linger(self) -> None:
        limit = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < limit and time.monotonic() - self._last_output < LINGER_SILENCE and not self.ended:
            self._guard.check()
            self._changed.wait(0.05)
            self._changed.clear()

    def _drained(self) -> None:
        """Wait until all output is copied. Descendants that hold the streams open are ended first."""
        if self._pump is None:
            return
        self._pump.join(0.05)
        if self._pump.is_alive():
            spare = () if self._process is None else (self._process.pid,)
            processes.kill_descendants(spare=spare, keep=self._keep())
        self._closing = time.monotonic()
        self._pump.join()
        self._pump = None

    def _idle_since(self, moment: float) -> float:
        return time.monotonic() - max(moment, self._last_output)

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        streams = {process.stdout: STDOUT, process.stderr: STDERR}
        readers = {number: _Stream(number, self._output, self.watch) for number in streams.values()}
        progress = LogProgress(self._output, self.watch)
        swept = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for pipe, number in streams.items():
                with contextlib.suppress(OSError):
                    fcntl.fcntl(pipe, _F_SETPIPE_SZ, CHUNK)
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, number)
            open_pipes = {number: pipe for pipe, number in streams.items()}
            while open_pipes:
                ready = selector.select(0.05)
                if not ready and self._closing and self._idle_since(self._closing) > ABANDON_SECONDS:
                    break
                # stderr is read first and processed last: a success line that was written before the error lines of a
                # teardown is in the other pipe by the time these are read.
                found = {}
                for key in sorted((key for key, _ in ready), key=lambda key: -int(key.data)):
                    found[key.data] = _read(key.fd)
                if STDERR in found and STDOUT not in found and STDOUT in open_pipes:
                    found[STDOUT] = _read(process.stdout.fileno())
                for number in sorted(found):
                    data = found[number]
                    if data:
                        self._last_output = time.monotonic()
                        readers[number].feed(data)
                    elif data is not None:
                        readers[number].finish()
                        selector.unregister(open_pipes.pop(number))
                    if not data or self.watch.crash or self.watch.succeeded:
                        self._changed.set()
                now = time.monotonic()
                for number in readers:
                    readers[number].tick(now)
                progress.tick(now)
                if now - swept > 5:
                    processes.reap(spare=(process.pid, *self._keep()))
                    swept = now
            for number in open_pipes:
                readers[number].finish()
        progress.finish()
        for pipe in streams:
            pipe.close()
        self._changed.set()


def _read(descriptor: int) -> bytes | None:
    """Return what can be read now; empty at the end of the stream, None if there is nothing yet."""
    try:
        return os.read(descriptor, CHUNK)
    except BlockingIOError:
        return None
