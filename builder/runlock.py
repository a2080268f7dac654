"""One warm-up run per cache root at a time: a kernel lock that dies with its holder, on a file that is never unlinked.

Where this process can open the root's lock file it holds the lock itself. Elsewhere (a named volume, a remote engine,
a root it may not read) a small container under the run's lease holds it: when the builder dies the lease ends the
container, and the kernel the lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from builder.container import Cancel, Deadlines
from builder.errors import BuilderError, DefectError, EngineLostError, PreflightError, Problem
from builder.session import Session, describe
from builder.waiting import Deadline, poll
from builder.warmup.events import FAILED
from builder.warmup.task import Task

PATH = "locks/run.lock"

#: Seconds without the lock after which people are told what they wait for.
_SAY_AFTER = 0.5


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
    name = session.cache.name
    try:
        session.patience().take(descriptor, doing=f"warms {name}", busy=f"{name} is being warmed")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _by_container(session: Session) -> Iterator[None]:
    """The lock in the hands of a container that waits for it, holds it, and is stopped when the context ends."""
    # Everything the thread shares is resolved before it starts.
    _ = session.warmup, session.lease
    holder = _Holder(session)
    try:
        holder.wait()
        yield
    finally:
        # A signal hurries the container's end, and must not leave it behind.
        with session.cancel.shield():
            holder.end()


class _Holder:
    """The container, and the thread that drives it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._cancel = Cancel()
        self._waiting, self._locked = threading.Event(), threading.Event()
        self._failure: BuilderError | None = None
        self._thread = threading.Thread(target=self._run, name="run-lock", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the lock is held. Raises BusyError when it cannot be had in time."""
        run, console = self._session.manifest.run, self._session.console
        starting, limit, told = Deadline(run.start), Deadline(None), False
        while not self._locked.is_set():
            self._session.cancel.check()
            if self._failure is not None:
                raise self._failure
            if self._waiting.is_set() and not told:
                limit, told = Deadline(run.lock_timeout), True
                if not poll(self._is_settled, limit.within(_SAY_AFTER), every=0.02):
                    console.say(f"waiting for another builder, which warms {self._session.cache.name}")
            if limit.over or (starting.over and not told):
                name = self._session.cache.name
                raise self._session.patience().exhausted(f"{name} is being warmed by another builder")
            poll(self._is_settled, limit.within(0.2), every=0.02)

    def end(self) -> None:
        """Lets the lock go: the container is gone when this returns."""
        failure, hurried = self._failure, self._session.cancel.times
        self._cancel.set(signal.SIGTERM)
        while self._thread.is_alive():
            self._thread.join(0.05)
            if self._session.cancel.times > hurried:
                hurried = self._session.cancel.times
                self._cancel.set(signal.SIGTERM)
        if failure is not None and self._locked.is_set():
            self._session.report.warnings.append(f"the run lock was lost on the way: {failure.message}")

    def _is_settled(self) -> bool:
        return self._locked.is_set() or self._failure is not None or self._session.cancel.is_set

    def _run(self) -> None:
        run = self._session.manifest.run
        limits = Deadlines(task=run.lifetime, silence=run.lifetime, start=run.start, grace=2.0)
        task = Task(label="lock", model="", recipe="command")
        try:
            outcome = self._session.run("lock", task, limits, cancel=self._cancel, on_event=self._on_event)
        except BuilderError as error:
            self._failure = error
            return
        except Exception as error:  # noqa: BLE001 - who waits for the lock has to know
            self._failure = DefectError(f"taking the run lock failed: {type(error).__name__}: {error}")
            return
        if outcome.exit_code == FAILED:
            problem = Problem("cache", outcome.tail[-1] if outcome.tail else "the run lock cannot be taken.")
            self._failure = PreflightError("this machine can't run it", [problem])
        elif not self._cancel.is_set:
            message = f"the container that holds the run lock {describe(outcome)}"
            self._failure = EngineLostError(message, notes=outcome.tail)

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "locked":
            self._locked.set()
        elif event.get("event") == "phase":
            self._waiting.set()
