"""What ends this program from outside: the builder's lease, the maximum lifetime, and signals.

The lease is a kernel lock that the builder holds on a file which is bind-mounted into the container. The race-free
order on this side: read the nonce (is this the builder's file?), then try the lock. Refused means that the builder
lives and shares our kernel: a thread waits for the lock, and getting it means that the builder is gone. Granted, or a
file without our nonce, means that the lock proves nothing here: then our stdin, which the builder holds, is the lease.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from builder.task import Job

LEASE_ENDED = 70
LIFETIME_OVER = 71

_END = threading.Lock()
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Stopped(Exception):
    """A signal asked this program to stop. ``signum`` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Guard:
    """Watches from threads of its own, so that a main thread stuck in a write cannot outlive its lease.

    on_lifetime: called once, with at most a second to say so, when the lifetime is over.
    """

    def __init__(self, job: Job, on_lifetime: Callable[[], None] = lambda: None) -> None:
        self._job = job
        self._on_lifetime = on_lifetime
        self._signum = 0
        self._signalled = 0.0
        self._wake, self._ring = -1, -1
        self.mode = "none"

    def start(self) -> str:
        """Arms everything; returns the lease's mode: ``flock``, ``stdin`` or ``none``. For the main thread."""
        become_subreaper()
        self._wake, self._ring = os.pipe()
        _spawn(self._when_signalled)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        descriptor = _contested(self._job.lease, self._job.nonce)
        if descriptor is not None:
            self.mode = "flock"
            _spawn(lambda: self._when_locked(descriptor))
        elif self._job.lease is not None or _is_attached(0):
            self.mode = "stdin"
            _spawn(self._when_stdin_ends)
        _spawn(self._when_lifetime_over)
        return self.mode

    def check(self) -> None:
        """Raises Stopped when a signal has asked for it. To be called between steps and in every wait."""
        if self._signum:
            raise Stopped(self._signum)

    def patience(self, until: float) -> float:
        """The moment (monotonic) until which a child may take its time: ``until``, or earlier once a signal came."""
        return min(until, self._signalled + max(0.5, self._job.grace - 1.0)) if self._signum else until

    def acquire(self, path: Path, *, exclusive: bool, on_wait: Callable[[], None] = lambda: None) -> int:
        """Waits for the lock on a file (made where it is missing) and returns the descriptor that holds it. on_wait: is
        called about twenty times a second meanwhile.

        The waiting is done by the kernel, in its queue, so that nobody overtakes us. Raises Stopped, OSError; that
        also for a link, which would lock something else, and for anything but a file.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "is no regular file, so it cannot be a lock: remove it", str(path))
        errors: list[OSError] = []

        def wait() -> None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
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
        # A handler runs between any two instructions of the main thread: no lock, no thread is touched here.
        if not self._signum:
            self._signalled = time.monotonic()
            self._signum = signum
            os.write(self._ring, b"!")

    def _when_signalled(self) -> None:
        os.read(self._wake, 1)
        # Whatever the main thread is stuck in (a log that nobody reads), the process ends before the engine kills it.
        _sleep(max(0.5, self._job.grace - 0.5))
        end(128 + self._signum)

    def _when_locked(self, descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        end(LEASE_ENDED)

    def _when_stdin_ends(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        end(LEASE_ENDED)

    def _when_lifetime_over(self) -> None:
        _sleep(self._job.lifetime)
        said = threading.Thread(target=self._on_lifetime, daemon=True)
        said.start()
        said.join(1.0)
        end(LIFETIME_OVER)


def end(status: int) -> NoReturn:
    """Ends this process at once, and everything that descends from it first. The first caller's status is the one."""
    _END.acquire()  # never released: whoever comes second, a main thread whose child was just killed, waits for the end
    with contextlib.suppress(Exception):
        kill_descendants(seconds=0.5)
    os._exit(status)


def become_subreaper() -> None:
    """Orphans of our children become our children, setsid or not, so that they can be found and ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int | None = None) -> set[int]:
    """Every process below ``root`` (default: this one), zombies included, as /proc shows it now."""
    parents = _parents()
    found: set[int] = set()
    wanted = {os.getpid() if root is None else root}
    while wanted:
        wanted = {pid for pid, parent in parents.items() if parent in wanted} - found
        found |= wanted
    return found


def kill_descendants(*, seconds: float = 5.0, spare: Iterable[int] = ()) -> bool:
    """SIGKILL to all descendants, again for what they started meanwhile, until none lives. False when some remain.

    ``spare`` are direct children whose status somebody else reaps; they are killed, and never waited for here.
    """
    limit = time.monotonic() + seconds
    spared = set(spare)
    while True:
        left = descendants()
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left - spared:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        alive = {pid for pid in descendants() if _state(pid) not in ("Z", "X", "")}
        if not alive:
            return True
        if time.monotonic() > limit:
            return False
        _sleep(0.01)


def reap(spare: Iterable[int] = ()) -> None:
    """Collects orphans that have ended, so that a long run leaves no zombies. Never touches ``spare``."""
    me = os.getpid()
    for pid, parent in _parents().items():
        if parent == me and pid not in spare:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _contested(path: str | None, nonce: str) -> int | None:
    """A descriptor of the lease file when somebody who shares our kernel holds it, else None."""
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.read(descriptor, 4096).strip() == nonce.encode():
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
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


def _parents() -> dict[int, int]:
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            fields = _stat(int(place.name))
            if fields:
                found[int(place.name)] = int(fields[1])
    return found


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name (which may hold spaces and brackets)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii", "replace").split()
    except OSError:
        return []


def _spawn(target: Callable[[], object]) -> None:
    threading.Thread(target=target, daemon=True).start()


def _sleep(seconds: float) -> None:
    """Time passes; nothing is awaited."""
    threading.Event().wait(seconds)
