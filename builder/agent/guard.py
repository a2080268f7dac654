"""What ends this program from outside: the builder's lease, the maximum lifetime, and signals.

The lease is a kernel lock that the builder holds on a file which is bind-mounted into the container. The race-free
order on this side: read the nonce (is this the builder's file?), then try the lock. Refused means that the builder
lives and shares our kernel: a thread waits for the lock, and getting it means that the builder is gone. Granted, or a
file without our nonce, means that the lock proves nothing here: then our stdin, which the builder holds, is the lease.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from builder import flock
from builder.job import Job
from builder.processes import become_subreaper, kill_descendants

LEASE_ENDED = 70
LIFETIME_OVER = 71
#: How the names of this program's temporary directories begin; kill -9 leaves them, and a later one removes them.
SCRATCH = "warm-cache-agent-"

_END = threading.Lock()


class Stopped(Exception):
    """A signal requests this program to stop. signum: which one."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Guard:
    """Watches from separate threads, so that a main thread stuck in a write cannot outlive its lease.

    on_lifetime: called once when the lifetime is over; it has one second.
    """

    def __init__(self, job: Job, on_lifetime: Callable[[], None] = lambda: None) -> None:
        self._job = job
        self._on_lifetime = on_lifetime
        self._signum = 0
        self._signalled = 0.0
        self._wake, self._ring = -1, -1
        self.mode: Literal["flock", "stdin", "none"] = "none"

    def start(self) -> None:
        """Arm everything, and set the mode of the lease. Call it in the main thread."""
        become_subreaper()
        self._wake, self._ring = os.pipe()
        _spawn(self._when_signalled)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        descriptor = _held_lease(self._job.lease, self._job.nonce)
        if descriptor is not None:
            self.mode = "flock"
            _spawn(lambda: self._when_locked(descriptor))
        elif self._job.lease is not None or _is_attached(0):
            self.mode = "stdin"
            _spawn(self._when_stdin_ends)
        _spawn(self._when_lifetime_over)

    def check(self) -> None:
        """Raise Stopped after a signal. Call it between steps and in every wait."""
        if self._signum:
            raise Stopped(self._signum)

    def stop_limit(self, until: float) -> float:
        """Return until when (monotonic) a child may take to stop: `until`, or earlier after a signal."""
        return min(until, self._signalled + max(0.5, self._job.grace - 1.0)) if self._signum else until

    def acquire(self, path: Path, *, exclusive: bool, on_wait: Callable[[], None] = lambda: None) -> int:
        """Wait for the lock on a file, which is made if it is missing; return the descriptor that holds it.

        The kernel waits, in its queue, so that no other process overtakes this one. Raises Stopped and OSError, the
        latter also for a symbolic link (it would lock another file) and for anything but a file.

        on_wait: called about twenty times a second meanwhile.
        """
        descriptor = flock.open_lock(path, create=True, root=Path(self._job.mount))
        errors: list[OSError] = []

        def wait() -> None:
            try:
                flock.lock(descriptor, shared=not exclusive)
            except OSError as error:
                errors.append(error)

        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        while waiter.is_alive():
            self.check()
            on_wait()
            waiter.join(0.05)
        if errors:
            raise OSError(errors[0].errno, errors[0].strerror, str(path))
        return descriptor

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        # A handler runs between any two instructions of the main thread: it touches no lock and no thread.
        if not self._signum:
            self._signalled = time.monotonic()
            self._signum = signum
            os.write(self._ring, b"!")

    def _when_signalled(self) -> None:
        os.read(self._wake, 1)
        # Whatever blocks the main thread (a log that is not read), the process ends before the engine kills it.
        _sleep(max(0.5, self._job.grace - 0.5))
        end(128 + self._signum)

    def _when_locked(self, descriptor: int) -> None:
        flock.lock(descriptor, shared=True)
        end(LEASE_ENDED)

    def _when_stdin_ends(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        end(LEASE_ENDED)

    def _when_lifetime_over(self) -> None:
        _sleep(self._job.lifetime)
        report = threading.Thread(target=self._on_lifetime, daemon=True)
        report.start()
        report.join(1.0)
        end(LIFETIME_OVER)


def end(status: int) -> NoReturn:
    """End all descendants of this process, then the process. Of several callers the first one's status counts."""
    _END.acquire()  # never released: a later caller (a main thread after its child was killed) waits for the end
    with contextlib.suppress(Exception):
        kill_descendants(seconds=0.5)
    os._exit(status)


def _held_lease(path: str | None, nonce: str) -> int | None:
    """Return a descriptor of the lease file if a process that shares our kernel holds its lock, else None."""
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.read(descriptor, 4096).strip() == nonce.encode() and not flock.try_lock(descriptor, shared=True):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _is_attached(descriptor: int) -> bool:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _spawn(target: Callable[[], object]) -> None:
    threading.Thread(target=target, daemon=True).start()


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)
