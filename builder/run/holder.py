"""A lock of the cache root in the hands of a container, for a builder that cannot open the root's files itself.

The container runs under the run's lease: when the builder dies the lease ends the container, and the kernel the lock.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from builder.engine.container import Deadlines
from builder.errors import BuilderError, DefectError, EngineLostError, PreflightError, Problem
from builder.events import FAILED
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline, poll
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import Asked, describe
from builder.task import Task

#: Seconds without the lock after which people are told what they wait for.
_SAY_AFTER = 0.5


@dataclass(frozen=True)
class Lock:
    """What to hold. mode: of the in-container program, ``lock`` or ``hold``. name: for people. whom, doing: who else
    may have it, and what that one does then. busy: what cannot be had. lifetime: seconds after which the container
    ends by itself.
    """

    mode: str
    name: str
    whom: str
    doing: str
    busy: str
    lifetime: float


@contextlib.contextmanager
def held(executor: ContainerExecutor, lock: Lock) -> Iterator[None]:
    """The lock is held by a container that waits for it and is stopped when the context ends. Raises BusyError when it
    cannot be had within ``[run] lock_timeout``; a lock that was lost on the way is a warning in the report.
    """
    # Everything the thread shares is resolved before it starts.
    _ = executor.warmup, executor.lease
    holder = _Holder(executor, lock)
    try:
        holder.wait()
        yield
    finally:
        # A signal hurries the container's end, and must not leave it behind.
        with executor.context.cancel.shield():
            holder.end()


class _Holder:
    """The container, and the thread that drives it."""

    def __init__(self, executor: ContainerExecutor, lock: Lock) -> None:
        self._executor, self._lock = executor, lock
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
        """Until the lock is held. Raises BusyError when it cannot be had in time."""
        run, lock = self._executor.context.manifest.run, self._lock
        starting, limit, told = Deadline(run.start), Deadline(None), False
        while not self._locked.is_set():
            self._executor.context.cancel.check()
            if self._failure is not None:
                raise self._failure
            if self._waiting.is_set() and not told:
                limit, told = Deadline(run.lock_timeout), True
                if not poll(self._is_settled, limit.within(_SAY_AFTER), every=0.02):
                    self._executor.context.console.say(f"waiting for {lock.whom}, which {lock.doing}")
            if limit.over or (starting.over and not told):
                raise self._executor.patience().exhausted(f"{lock.busy} by {lock.whom}")
            poll(self._is_settled, limit.within(0.2), every=0.02)

    def end(self) -> None:
        """Lets the lock go: the container is gone when this returns."""
        failure, hurried = self._failure, self._executor.context.cancel.times
        self._cancel.set(signal.SIGTERM)
        while self._thread.is_alive():
            self._thread.join(0.05)
            if self._executor.context.cancel.times > hurried:
                hurried = self._executor.context.cancel.times
                self._cancel.set(signal.SIGTERM)
        if failure is not None and self._locked.is_set():
            self._executor.context.report.warnings.append(f"{self._lock.name} was lost on the way: {failure.message}")

    def _is_settled(self) -> bool:
        return self._locked.is_set() or self._failure is not None or self._executor.context.cancel.is_set

    def _run(self) -> None:
        lock = self._lock
        start = self._executor.context.manifest.run.start
        limits = Deadlines(task=lock.lifetime, silence=lock.lifetime, start=start, grace=2.0)
        task = Task(label=lock.mode, model="", recipe="command")
        try:
            outcome = self._executor.run(lock.mode, task, limits, Asked(cancel=self._cancel, on_event=self._on_event))
        except BuilderError as error:
            self._failure = error
            return
        except Exception as error:  # noqa: BLE001 - who waits for the lock has to know
            self._failure = DefectError(f"taking {lock.name} failed: {type(error).__name__}: {error}")
            return
        if outcome.exit_code == FAILED:
            problem = Problem("cache", outcome.tail[-1] if outcome.tail else f"{lock.name} cannot be taken.")
            self._failure = PreflightError("this machine can't run it", [problem])
        elif not self._cancel.is_set:
            message = f"the container that holds {lock.name} {describe(outcome)}"
            self._failure = EngineLostError(message, notes=outcome.tail)

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "locked":
            self._locked.set()
        elif event.get("event") == "phase":
            self._waiting.set()
