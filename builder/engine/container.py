"""One container, from its creation to the moment when nothing of it is left.

Each step makes a cleanup necessary: an attachment to close, a log to finish, a container to stop and to remove. Every
cleanup is pushed on one stack at the moment it becomes necessary, so it runs on every way out, the last one first:
stop, read the log to its end, close stdin, remove. A cleanup that fails is a problem in the outcome, and never replaces
the first error.

How the container ended is what inspect reports; the end of a stream is only a reason to inspect.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from builder.engine.api import Containers, ContainerSpec, State
from builder.engine.errors import MissingSourceError, NotFoundError
from builder.engine.lease import LABEL_LEASE, LABEL_MODE, Lease
from builder.engine.log_pump import GIVE_UP, EventCallback, Pump
from builder.engine.log_sinks import Sinks
from builder.errors import BuilderError, EngineLostError, EngineRefusedError, EngineTimeoutError
from builder.events import Event, Verdict
from builder.host.cancel import LEAST_WAIT, REMOVE_WITHIN, STOP_WITHIN, Cancel
from builder.host.deadlines import Attempt, Deadline, poll
from builder.job import JOB_VARIABLE, Job

__all__ = ["Cancel", "ContainerOutcome", "Deadlines", "Sinks", "run_container"]

T = TypeVar("T")
EndReason = Literal["exited", "start", "timeout", "silence", "budget", "cancelled", "lost"]

#: Seconds. Stopping, the end of the log and the removal together take less than 5 after a cancellation: a CI system
#: kills a cancelled step after 7.5.
CANCEL_GRACE = 2.0
_CANCEL_DRAIN = 1.0
_DRAIN = 60.0
#: Seconds between two inspections of a container when nothing suggests that it has changed.
_INSPECT_EVERY = 1.0
#: Seconds that an engine may need in addition to the grace, to kill the container and to record that.
_STOP_LAG = 15.0


@dataclass(frozen=True)
class Deadlines:
    """Limits of one container in seconds.

    task: for the whole container.
    silence: without a sign of life.
    start: until its first output.
    grace: between a stop's SIGTERM and its SIGKILL.
    """

    task: float
    silence: float
    start: float
    grace: float


@dataclass(frozen=True)
class ContainerOutcome:
    """How a container ended. Nothing of it is left, except for what `problems` names.

    ended: why it ended; ``lost``: the engine stopped answering.
    exit_code: None if unknown.
    oom: the kernel killed one of its processes for memory, perhaps only a child.
    problems: what else went wrong, for people, one sentence each.
    log_complete: the log is proven to be complete, or was read again from the engine.
    container: its id.
    """

    ended: EndReason
    verdict: Verdict | None
    exit_code: int | None
    oom: bool
    events: list[Event]
    tail: list[str]
    seconds: float
    log_path: Path | None
    problems: list[str] = field(default_factory=list)
    log_complete: bool = False
    container: str = ""


def run_container(
    engine: Containers,
    spec: ContainerSpec,
    *,
    job: Job,
    lease: Lease,
    deadlines: Deadlines,
    cancel: Cancel,
    sinks: Sinks,
    on_event: EventCallback | None = None,
    budget: Deadline | None = None,
    before_start: Callable[[str], None] | None = None,
    after_exit: Callable[[str], None] | None = None,
) -> ContainerOutcome:
    """Run the container to its end, whatever that is. Raises what kept it from starting.

    The job, the lease's mount and labels and an open stdin are added to the spec here.

    on_event: called in another thread while the log is drained; must not wait.
    before_start, after_exit: get the container's id when its files can be written, and when it ended by itself.
    """
    began = time.monotonic()
    life = _ContainerLife(engine, lease, deadlines, cancel, budget or Deadline(None))
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(life.clean_up, "removing the container", life.remove)
            container = life.create(spec, job)
            stdin = life.call(lambda: engine.attach_stdin(container), f"attach to {spec.name}")
            stack.callback(stdin.close)
            pump = Pump(engine, container, nonce=job.nonce, sinks=sinks, on_event=on_event)
            stack.callback(lambda: pump.finish(life.drain_deadline(), ran=life.ran, lost=life.lost))
            life.call(pump.attach, f"attach to {spec.name}")
            pump.start()
            stack.callback(life.clean_up, "stopping the container", life.stop)
            if before_start is not None:
                life.call(lambda: before_start(container), f"write to {spec.name}")
            life.call(lambda: engine.start(container), f"start {spec.name}")
            ended = life.watch(pump)
            if after_exit is not None and ended == "exited":
                life.call(lambda: after_exit(container), f"read from {spec.name}")
    except BuilderError as error:
        if life.lost:
            error.message = "; ".join([error.message, *life.problems])
        else:
            error.notes = (*error.notes, *life.problems)
        raise
    except BaseException:
        for problem in life.problems:
            logging.getLogger(__name__).warning("%s", problem)
        raise
    state = life.state
    return ContainerOutcome(
        ended=ended,
        verdict=next((event for event in reversed(pump.events) if isinstance(event, Verdict)), None),
        exit_code=state.exit_code if state and state.finished else None,
        oom=bool(state and state.oom_killed),
        events=pump.events,
        tail=pump.tail,
        seconds=time.monotonic() - began,
        log_path=sinks.log_path,
        problems=[*life.problems, *pump.problems],
        log_complete=pump.complete,
        container=container,
    )


class _ContainerLife:
    """One container from its creation to its removal, and what is known about it meanwhile."""

    def __init__(
        self, engine: Containers, lease: Lease, deadlines: Deadlines, cancel: Cancel, budget: Deadline
    ) -> None:
        self._engine = engine
        self._lease = lease
        self._deadlines = deadlines
        self._cancel = cancel
        self._budget = budget
        self._name = ""
        self._container = ""
        self._may_exist = False
        self._removed = False
        #: The engine did not answer in its time: no more requests are made that may take long.
        self.lost = False
        self.state: State | None = None
        self.problems: list[str] = []

    def clean_up(self, action: str, call: Callable[[], None]) -> None:
        """Make this call; a failure becomes a problem."""
        try:
            call()
        except BuilderError as error:
            self.problems.append(f"{action} failed: {error.message}")

    def call(self, request: Callable[[], T], action: str) -> T:
        """Return the engine's answer. After a cancellation, an engine that hangs is not waited for."""
        try:
            return self._cancel.call_with_deadline(request, action)
        except EngineTimeoutError:
            self.lost = self.lost or self._cancel.is_set
            raise

    # --- create ------------------------------------------------------------------------------------------------------

    def create(self, spec: ContainerSpec, job: Job) -> str:
        """Create it under the lease and return its id.

        If the engine's host does not have the lease file, the attachment to stdin alone is the lease.
        """
        self._name = spec.name
        task = job.task.label if job.task else job.mode
        labels = self._lease.labels(task, job.lifetime)
        labels = {**labels, LABEL_MODE: job.mode, **spec.labels, LABEL_LEASE: labels[LABEL_LEASE]}
        by_stdin = replace(spec, labels=labels, stdin=True)
        by_lock = replace(by_stdin, mounts=(*spec.mounts, self._lease.mount()))
        try:
            return self._create(_with_job(by_lock, replace(job, lease=self._lease.target)))
        except MissingSourceError as error:
            if error.source != str(self._lease.path):
                raise
        return self._create(_with_job(by_stdin, replace(job, lease=None)))

    def _create(self, spec: ContainerSpec) -> str:
        self._may_exist = True
        try:
            self._container = self.call(lambda: self._engine.create(spec), f"create {spec.name}")
        except EngineRefusedError:
            self._may_exist = False
            raise
        return self._container

    # --- watch -------------------------------------------------------------------------------------------------------

    def watch(self, pump: Pump) -> EndReason:
        """Wait until the container is finished, or until there is a reason to stop it."""
        deadlines, started = self._deadlines, time.monotonic()
        task, start, lost = Deadline(deadlines.task), Deadline(deadlines.start), Deadline(GIVE_UP)
        pump.last_output = started
        output_ended = False
        while True:
            try:
                if self._is_finished():
                    return "exited"
                lost = Deadline(GIVE_UP)
            except EngineLostError as error:
                if lost.expired:
                    self.problems.append(f"the engine gave no answer for {GIVE_UP:.0f} s: {error.message}")
                    self.lost = True
                    return "lost"
            if self._cancel.is_set:
                return "cancelled"
            if self._budget.expired:
                return "budget"
            if task.expired:
                return "timeout"
            quiet = time.monotonic() - pump.last_output
            if quiet >= deadlines.silence:
                return "silence"
            if start.expired and not pump.received:
                return "start"
            left = min(
                _INSPECT_EVERY,
                task.left(),
                self._budget.left(),
                deadlines.silence - quiet,
                start.left() if not pump.received else _INSPECT_EVERY,
            )
            if output_ended:
                self._cancel.wait(min(left, 0.05))
            else:
                self._cancel.wait(left, pump.fileno())
                output_ended = pump.ended

    def _is_finished(self) -> bool:
        """Inspect the container. Raises EngineLostError if the engine does not answer."""
        try:
            self.state = self._inspect()
        except NotFoundError:
            self._removed = True
            self.problems.append(f"{self._name} was removed by another client while it ran")
            return True
        if (
            self.state.finished
            and self.state.exit_code in (128 + signal.SIGKILL, 128 + signal.SIGTERM)
            and not self.state.oom_killed
        ):
            name = signal.Signals(self.state.exit_code - 128).name
            cause = "from outside: not by this builder, and not for memory"
            if self.state.oom_killed is None:
                cause = "and not by this builder: from outside, or for memory; this engine cannot tell which"
            self.problems.append(f"{self._name} was ended by {name} {cause}")
        return self.state.finished

    def _inspect(self) -> State:
        return self.call(lambda: self._engine.state(self._container), f"inspect {self._name}")

    @property
    def ran(self) -> bool:
        """Whether it was ever started, as far as is known."""
        return self.state is None or self.state.status != "created"

    # --- stop --------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop the container. Raises EngineLostError if it may still run."""
        if self._removed or (self.state is not None and self.state.finished):
            return
        if self.lost:
            raise EngineLostError(
                f"the engine does not answer; {self._name} ends by its lease once this builder has ended"
            )
        self.state = self._inspect()
        if self.state.status == "created":
            return
        self._stop()
        poll(self._is_finished_or_late, Deadline(_STOP_LAG), every=0.02)

    def _is_finished_or_late(self) -> bool:
        self.state = self._inspect()
        return self.state.finished or self._cancel.is_due(STOP_WITHIN)

    def _stop(self) -> None:
        """Request the stop, again with less grace for every further cancellation."""
        requests = self._cancel.requests
        limit = Deadline(self._grace(requests) + _STOP_LAG)
        attempt, least = self._stop_attempt(requests), Deadline(LEAST_WAIT)
        while attempt.running and not limit.expired and not (least.expired and self._cancel.is_due(STOP_WITHIN)):
            attempt.join(0.05)
            if self._cancel.requests > requests:
                requests = self._cancel.requests
                attempt = self._stop_attempt(requests)
        if attempt.running:
            self.lost = True
            raise EngineLostError(
                f"the engine did not stop {self._name} in time; it ends by its lease once this builder has ended"
            )
        with contextlib.suppress(NotFoundError):
            attempt.result()

    def _stop_attempt(self, requests: int) -> Attempt[None]:
        grace = self._grace(requests)
        return Attempt(lambda: self._engine.stop(self._container, grace))

    def _grace(self, requests: int) -> float:
        if requests > 1:
            return 0.0
        return min(CANCEL_GRACE, self._deadlines.grace) if requests else self._deadlines.grace

    def drain_deadline(self) -> Deadline:
        """Return how long the end of the log may take."""
        return _DrainDeadline(self._cancel)

    # --- remove ------------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Remove the container. Raises EngineLostError if it may still exist.

        What a hanging engine creates or starts later still has our lease, which is over by then: it ends by itself, and
        the next sweep removes it.
        """
        request = self._remove if self._container else self._remove_unanswered if self._may_exist else None
        if request is None:
            return
        try:
            self._cancel.call_with_deadline(request, f"remove {self._name}", within=REMOVE_WITHIN)
        except EngineTimeoutError as error:
            self._lease.keep = True
            raise EngineLostError(f"{error.message.rstrip('.')}. The next run, or a sweep, removes it") from None
        except BaseException:
            self._lease.keep = True
            raise

    def _remove(self) -> None:
        self._engine.remove(self._container, force=True)

    def _remove_unanswered(self) -> None:
        """Remove a container after a create without an answer: it may exist, and is found by lease and name.

        If it does not exist the engine may still create it.
        """
        mine = self._lease.labels("", 0.0)[LABEL_LEASE]
        found = [one for one in self._engine.containers([f"{LABEL_LEASE}={mine}"]) if one.name == self._name]
        for one in found:
            self._engine.remove(one.id, force=True)
        if not found:
            raise EngineLostError(f"if the engine still creates {self._name}, the next run, or a sweep, removes it")


class _DrainDeadline(Deadline):
    """Long enough to read a long log; short from the moment of a cancellation."""

    def __init__(self, cancel: Cancel) -> None:
        super().__init__(_CANCEL_DRAIN if cancel.is_set else _DRAIN)
        self._cancel = cancel
        self._shortened = cancel.is_set

    def left(self) -> float:
        if self._cancel.is_set and not self._shortened:
            self._shortened = True
            self._at = min(self._at, self._clock() + _CANCEL_DRAIN)
        return super().left()

    @property
    def expired(self) -> bool:
        return self.left() <= 0


def _with_job(spec: ContainerSpec, job: Job) -> ContainerSpec:
    return replace(spec, env={**spec.env, JOB_VARIABLE: job.to_json()})
