"""One warm-up run per cache root at a time: a kernel lock that dies with its holder, on a file that is never unlinked.

Where this process can open the root's lock file it holds the lock itself. Elsewhere (a named volume, a remote engine,
a root it may not read) a small container under the run's lease holds it: when the builder dies the lease ends the
container, and the kernel the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder.container import Cancel, Deadlines
from builder.errors import BuilderError, BusyError
from builder.session import Session, describe
from builder.waiting import Deadline, poll
from builder.warmup.task import Task

PATH = "locks/run.lock"


@contextlib.contextmanager
def held(session: Session) -> Iterator[None]:
    """Holds the run lock. Raises BusyError when another builder still has it after ``[run] lock_timeout``."""
    root = session.cache.direct()
    try:
        descriptor = os.open(root / PATH, os.O_RDONLY | os.O_CLOEXEC) if root else None
    except OSError:
        descriptor = None
    with _by_container(session) if descriptor is None else _by_file(session, descriptor):
        yield


@contextlib.contextmanager
def _by_file(session: Session, descriptor: int) -> Iterator[None]:
    limit = Deadline(session.manifest.run.lock_timeout)
    told = False
    try:
        while not _try_lock(descriptor):
            session.cancel.check()
            if not told:
                session.console.say(f"waiting for {holder(descriptor)}, which warms {session.cache.name}")
                told = True
            if limit.over:
                raise _busy(session, holder(descriptor))
            poll(lambda: session.cancel.is_set, Deadline(min(0.2, limit.left())), every=0.05)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(descriptor: int, locks: Path = Path("/proc/locks")) -> str:
    """Who holds a flock on this file, as far as this PID namespace can tell."""
    status = os.fstat(descriptor)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in locks.read_text().splitlines():
            fields = line.split()
            if "->" not in fields and len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted:
                return _process(int(fields[4]))
    return "another builder"


def _process(pid: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return f"pid {pid} ({' '.join(psutil.Process(pid).cmdline())[:80]})"
    return f"pid {pid}"


def _busy(session: Session, who: str) -> BusyError:
    timeout = session.manifest.run.lock_timeout
    return BusyError(
        f"{session.cache.name} is being warmed by {who}, still after {timeout:.0f} s. "
        "Wait for it, or raise --lock-timeout."
    )


@contextlib.contextmanager
def _by_container(session: Session) -> Iterator[None]:
    """The lock in the hands of a container that waits for it, holds it, and is stopped when the context ends."""
    locked, ended, release = threading.Event(), threading.Event(), Cancel()
    failure: list[BuilderError] = []

    def on_event(event: Mapping[str, Any]) -> None:
        if event.get("event") == "locked":
            locked.set()

    def hold() -> None:
        run = session.manifest.run
        whole = run.lifetime
        limits = Deadlines(task=whole, silence=whole, start=run.start, grace=2.0)
        task = Task(label="lock", model="", recipe="command")
        try:
            outcome = session.run("lock", task, limits, cancel=release, on_event=on_event)
            if not release.is_set:
                failure.append(
                    BuilderError(f"the container that holds the run lock {describe(outcome)}", notes=outcome.tail)
                )
        except BuilderError as error:
            failure.append(error)
        finally:
            ended.set()

    # Everything the thread shares is resolved before it starts.
    _ = session.warmup, session.lease
    thread = threading.Thread(target=hold, name="run-lock", daemon=True)
    thread.start()
    limit = Deadline(session.manifest.run.lock_timeout + session.manifest.run.start)
    try:
        while not locked.is_set():
            session.cancel.check()
            if ended.is_set():
                raise failure[0] if failure else BusyError(f"the run lock of {session.cache.name} could not be taken")
            if limit.over:
                raise _busy(session, "another builder")
            poll(
                lambda: locked.is_set() or ended.is_set() or session.cancel.is_set,
                Deadline(min(0.2, limit.left())),
                every=0.02,
            )
        yield
    finally:
        release.set(signal.SIGTERM)
        thread.join()
