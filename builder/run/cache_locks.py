"""Locks of the cache root: one warm-up run at a time, and one builder at a time that makes or drops views.

A kernel lock that ends with its holder, on a file that is never unlinked. Where this process can open the root's lock
file it holds the lock itself. Elsewhere (a named volume, a remote engine, a root that it may not read) a small
container under the run's lease holds it: when the builder dies the lease ends the container, and the kernel the lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder import events
from builder.engine.container import Deadlines
from builder.errors import CANNOT_RUN, BuilderError, DefectError, EngineLostError, PreflightError, Problem
from builder.events import FAILED
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline, poll
from builder.host.locks import open_lock
from builder.job import Mode
from builder.run import container_job
from builder.run.container_job import ContainerRequest, describe
from builder.task import Task

if TYPE_CHECKING:
    from builder.run.container_executor import ContainerExecutor

#: Below the cache root: the run lock, and the lock for making, dropping and sweeping views.
RUN, VIEWS = "locks/run.lock", "locks/views.lock"
#: Seconds without the lock after which the wait is reported.
_SAY_AFTER = 0.5


@contextlib.contextmanager
def held(executor: ContainerExecutor) -> Iterator[None]:
    """Hold the run lock. Raises BusyError when another builder still has it after ``[run] lock_timeout``."""
    name = executor.root_name
    lock = ContainerLock("lock", "the run lock", "another builder", f"works on {name}", f"{name} is in use")
    with _held(executor, RUN, lock):
        yield


@contextlib.contextmanager
def views(executor: ContainerExecutor) -> Iterator[None]:
    """Hold the lock of all views: a view is made also while a warm-up has the run lock. Raises BusyError."""
    name = executor.root_name
    waiting, busy = f"makes or drops a view of {name}", f"the views of {name} are in use"
    with _held(executor, VIEWS, ContainerLock("views", "the lock of all views", "another builder", waiting, busy)):
        yield


@contextlib.contextmanager
def _held(executor: ContainerExecutor, path: str, lock: ContainerLock) -> Iterator[None]:
    root = executor.direct_root()
    descriptor = _opened(root, path)
    if descriptor is None and root is not None and not os.path.lexists(root / "layout.json"):
        # The container that gets the lock lays out a new root; after that this process can hold it by itself.
        with held_by_container(executor, lock):
            pass
        descriptor = _opened(root, path)
    if descriptor is None:
        with held_by_container(executor, lock):
            yield
        return
    try:
        executor.context.lock_wait().acquire(descriptor, holder_action=lock.waiting_message, busy=lock.busy_message)
        yield
    finally:
        os.close(descriptor)


def _opened(root: Path | None, path: str) -> int | None:
    """Return a descriptor of a lock file below the root; None where this process cannot open it."""
    try:
        return open_lock(root / path, root=root) if root else None
    except OSError:
        return None


# --- held by a container ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContainerLock:
    """A lock, and the words for it."""

    mode: Mode  # of the agent: ``lock``, ``views`` or ``hold``
    name: str  # for people
    owner_description: str  # what else may hold it: ``another builder``
    waiting_message: str  # what that one does with it: ``works on /data/jit``
    busy_message: str  # what cannot be had: ``/data/jit is in use``
    lifetime: float | None = None  # seconds after which the container ends by itself; None: the run's


@contextlib.contextmanager
def held_by_container(executor: ContainerExecutor, lock: ContainerLock) -> Iterator[None]:
    """Hold the lock in a container that waits for it and is stopped when the context ends.

    Raises BusyError when it cannot be had within ``[run] lock_timeout``. A lock that is lost meanwhile is a warning.
    """
    executor.start()
    holder = _Holder(executor, lock)
    try:
        holder.wait()
        yield
    finally:
        # A signal hurries the container's end, and must not leave it behind.
        with executor.context.cancel.shield():
            holder.end()


class _Holder:
    """The container, and the thread that runs it."""

    def __init__(self, executor: ContainerExecutor, lock: ContainerLock) -> None:
        self._executor, self._context, self._lock = executor, executor.context, lock
        self._cancel = Cancel(part_of=executor.context.cancel)
        self._waiting, self._locked = threading.Event(), threading.Event()
        self._failure: BuilderError | None = None
        self._thread = threading.Thread(target=self._run, name=lock.name, daemon=True)
        # Signals are the main thread's: it may wait for them with all of them blocked, and a thread that did not block
        # them (this one, or those that it starts) would get them instead.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def wait(self) -> None:
        """Wait until the lock is held. Raises BusyError when it cannot be had in time."""
        run, lock = self._context.manifest.run, self._lock
        starting, limit, reported, asked = Deadline(run.start), Deadline(None), False, 0.0
        while not self._locked.is_set():
            self._context.cancel.check()
            if self._failure is not None:
                raise self._failure
            if self._waiting.is_set() and not reported:
                limit, reported, asked = Deadline(run.lock_timeout), True, time.monotonic()
                if not poll(self._is_settled, limit.within(_SAY_AFTER), every=0.02):
                    self._context.console.say(f"waiting for {lock.owner_description}, which {lock.waiting_message}")
            if limit.expired or (starting.expired and not reported):
                raise self._context.lock_wait().timeout_error(f"{lock.busy_message} by {lock.owner_description}")
            poll(self._is_settled, limit.within(0.2), every=0.02)
        if asked:
            self._context.report.add_lock_wait(time.monotonic() - asked)

    def end(self) -> None:
        """Release the lock. The container has been removed when this returns."""
        failure, hurried = self._failure, self._context.cancel.requests
        self._cancel.set(signal.SIGTERM)
        while self._thread.is_alive():
            self._thread.join(0.05)
            if self._context.cancel.requests > hurried:
                hurried = self._context.cancel.requests
                self._cancel.set(signal.SIGTERM)
        if failure is not None and self._locked.is_set():
            self._context.report.warnings.append(f"{self._lock.name} was lost on the way: {failure.message}")

    def _is_settled(self) -> bool:
        return self._locked.is_set() or self._failure is not None or self._context.cancel.is_set

    def _run(self) -> None:
        lock = self._lock
        start = self._context.manifest.run.start
        lifetime = self._context.manifest.run.lifetime if lock.lifetime is None else lock.lifetime
        limits = Deadlines(task=lifetime, silence=lifetime, start=start, grace=2.0)
        task = Task(label=lock.mode, model="", recipe="command")
        try:
            outcome = container_job.run(
                self._executor, lock.mode, task, limits, ContainerRequest(cancel=self._cancel, on_event=self._on_event)
            )
        except BuilderError as error:
            self._failure = error
            return
        except Exception as error:  # noqa: BLE001 - raised by `wait`
            self._failure = DefectError(f"taking {lock.name} failed: {type(error).__name__}: {error}")
            return
        if outcome.exit_code == FAILED:
            problem = Problem("cache", outcome.tail[-1] if outcome.tail else f"{lock.name} cannot be taken.")
            self._failure = PreflightError(CANNOT_RUN, [problem])
        elif not self._cancel.is_set:
            message = f"the container that holds {lock.name} {describe(outcome)}"
            self._failure = EngineLostError(message, notes=outcome.tail)

    def _on_event(self, event: events.Event) -> None:
        match event:
            case events.Locked():
                self._locked.set()
            case events.Phase():
                self._waiting.set()
