"""One warm-up container, from its creation to the moment when nothing of it is left.

Each step makes something owed: an attachment to close, a log to finish, a container to stop and to remove. Every duty
goes on one stack the moment it is owed, and so it is done on every way out, the last one first: stop, read the log to
its end, let go of stdin, remove. A duty that fails is a problem in the outcome, and never takes the place of the
first error.

How the container ended is what inspect says; the end of a stream is only a reason to look.
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
from builder.engine.errors import NotFoundError
from builder.engine.lease import LABEL_LEASE, Lease
from builder.engine.log_pump import GIVE_UP, EventCallback, Pump
from builder.engine.log_sinks import Sinks
from builder.errors import BuilderError, EngineLostError, EngineRefusedError, EngineTimeoutError
from builder.events import Event, Verdict
from builder.host.cancel import LEAST_WAIT, REMOVE_WITHIN, STOP_WITHIN, Cancel
from builder.host.deadlines import Attempt, Deadline, poll
from builder.job import JOB_VARIABLE, Job

__all__ = ["Cancel", "Deadlines", "Outcome", "Sinks", "run_container"]

T = TypeVar("T")
Ended = Literal["exited", "timeout", "silence", "budget", "cancelled", "lost"]

#: Seconds. A cancelled CI step has 7.5 s: stopping, the end of the log and removal together have to stay below 5.
CANCEL_GRACE = 2.0
_CANCEL_DRAIN = 1.0
_DRAIN = 60.0
#: Seconds between two looks at a container that gives no reason to look.
_LOOK = 1.0
#: Seconds that an engine may need on top of the grace, to kill and to write down that it did.
_STOP_LAG = 15.0


@dataclass(frozen=True)
class Deadlines:
    """Seconds. task: the whole container. silence: without a sign of life. start: until its first word. grace:
    between a stop's SIGTERM and its SIGKILL.
    """

    task: float
    silence: float
    start: float
    grace: float


@dataclass(frozen=True)
class Outcome:
    """How a container ended. All of it has gone when this exists, unless ``problems`` says otherwise.

    ended ``lost``: the engine stopped answering. exit_code: None when nobody could say. oom: the kernel killed
    something in it for memory, if only a child. problems: what went wrong around it, for people, one sentence each.
    log_complete: proven or read again. container: its id.
    """

    ended: Ended
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
) -> Outcome:
    """Runs the container to its end, whatever that is. Raises what kept it from starting.

    The job, the lease's mount and labels and an open stdin are added to the spec here. on_event is called while the
    log is being drained, in another thread, and must not wait.
    """
    began = time.monotonic()
    life = _Life(engine, lease, deadlines, cancel, budget or Deadline(None))
    try:
        with contextlib.ExitStack() as duties:
            duties.callback(life.duty, "removing the container", life.remove)
            container = life.create(spec, job)
            stdin = life.answer(lambda: engine.attach_stdin(container), f"attach to {spec.name}")
            duties.callback(stdin.close)
            pump = Pump(engine, container, nonce=job.nonce, sinks=sinks, on_event=on_event)
            duties.callback(lambda: pump.finish(life.drain_deadline(), ran=life.ran, lost=life.lost))
            life.answer(pump.attach, f"attach to {spec.name}")
            pump.start()
            duties.callback(life.duty, "stopping the container", life.end)
            life.answer(lambda: engine.start(container), f"start {spec.name}")
            ended = life.watch(pump)
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
    return Outcome(
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


class _Life:
    """What is known about one container while it is here."""

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
        self._gone = False
        #: The engine has had its time: it is asked for nothing more that may take long.
        self.lost = False
        self.state: State | None = None
        self.problems: list[str] = []

    def duty(self, doing: str, call: Callable[[], None]) -> None:
        """Does what is owed; a failure becomes a problem."""
        try:
            call()
        except BuilderError as error:
            self.problems.append(f"{doing} failed: {error.message}")

    # --- before ------------------------------------------------------------------------------------------------------

    def create(self, spec: ContainerSpec, job: Job) -> str:
        """Creates it under the lease; where the engine does not see the lease file, under the attachment to stdin
        alone.
        """
        self._name = spec.name
        task = job.task.label if job.task else job.mode
        labels = {**self._lease.labels(task, job.lifetime), **spec.labels}
        labels[LABEL_LEASE] = self._lease.labels(task, job.lifetime)[LABEL_LEASE]
        bare = replace(spec, labels=labels, stdin=True)
        held = replace(job, lease=self._lease.target)
        try:
            return self._create(replace(_with_job(bare, held), mounts=(*spec.mounts, self._lease.mount())))
        except EngineRefusedError as error:
            if "bind source" not in error.message or str(self._lease.path) not in error.message:
                raise
        return self._create(_with_job(bare, replace(job, lease=None)))

    def _create(self, spec: ContainerSpec) -> str:
        self._may_exist = True
        try:
            self._container = self.answer(lambda: self._engine.create(spec), f"create {spec.name}")
        except EngineRefusedError:
            self._may_exist = False
            raise
        return self._container

    # --- while it runs -----------------------------------------------------------------------------------------------

    def watch(self, pump: Pump) -> Ended:
        """Waits until it is over, or until somebody or something wants it to be."""
        deadlines, started = self._deadlines, time.monotonic()
        task, start, lost = Deadline(deadlines.task), Deadline(deadlines.start), Deadline(GIVE_UP)
        pump.last_output = started
        output_ended = False
        while True:
            try:
                if self._is_over():
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
                self.problems.append(f"{self._name} said nothing within {deadlines.start:.0f} s of its start")
                return "timeout"
            left = min(
                _LOOK,
                task.left(),
                self._budget.left(),
                deadlines.silence - quiet,
                start.left() if not pump.received else _LOOK,
            )
            if output_ended:
                self._cancel.wait(min(left, 0.05))
            else:
                self._cancel.wait(left, pump.fileno())
                output_ended = pump.ended

    def _is_over(self) -> bool:
        """Raises EngineLostError when the engine does not say."""
        try:
            self.state = self._look()
        except NotFoundError:
            self._gone = True
            self.problems.append(f"{self._name} was removed by somebody else while it ran")
            return True
        if (
            self.state.finished
            and self.state.exit_code in (128 + signal.SIGKILL, 128 + signal.SIGTERM)
            and not self.state.oom_killed
        ):
            name = signal.Signals(self.state.exit_code - 128).name
            cause = "from outside: not by this builder, and not for memory"
            if self.state.oom_killed is None:
                cause = "and not by this builder: by somebody else, or for memory; this engine cannot tell which"
            self.problems.append(f"{self._name} was ended by {name} {cause}")
        return self.state.finished

    # --- after -------------------------------------------------------------------------------------------------------

    @property
    def ran(self) -> bool:
        """Whether it was ever started, as far as anybody knows."""
        return self.state is None or self.state.status != "created"

    def end(self) -> None:
        """Nothing of it runs any more when this returns without raising."""
        if self._gone or (self.state is not None and self.state.finished):
            return
        if self.lost:
            raise EngineLostError(
                f"the engine does not answer; {self._name} ends by its lease once this builder has ended"
            )
        self.state = self._look()
        if self.state.status == "created":
            return
        self._stop()
        poll(self._over_or_due, Deadline(_STOP_LAG), every=0.02)

    def _over_or_due(self) -> bool:
        self.state = self._look()
        return self.state.finished or self._cancel.is_due(STOP_WITHIN)

    def _look(self) -> State:
        return self.answer(lambda: self._engine.state(self._container), f"inspect {self._name}")

    def answer(self, ask: Callable[[], T], what: str) -> T:
        """What the engine says. Who wants to end the run does not wait for an engine that hangs."""
        try:
            return self._cancel.call_with_deadline(ask, what)
        except EngineTimeoutError:
            self.lost = self.lost or self._cancel.is_set
            raise

    def _stop(self) -> None:
        """Asks in order; faster when somebody gets impatient meanwhile."""
        times = self._cancel.requests
        limit = Deadline(self._grace(times) + _STOP_LAG)
        attempt, least = self._stopping(times), Deadline(LEAST_WAIT)
        while attempt.running and not limit.expired and not (least.expired and self._cancel.is_due(STOP_WITHIN)):
            attempt.join(0.05)
            if self._cancel.requests > times:
                times = self._cancel.requests
                attempt = self._stopping(times)
        if attempt.running:
            self.lost = True
            raise EngineLostError(
                f"the engine did not stop {self._name} in time; it ends by its lease once this builder has ended"
            )
        with contextlib.suppress(NotFoundError):
            attempt.result()

    def _stopping(self, times: int) -> Attempt[None]:
        grace = self._grace(times)
        return Attempt(lambda: self._engine.stop(self._container, grace))

    def _grace(self, times: int) -> float:
        return self._deadlines.grace if not times else min(CANCEL_GRACE, self._deadlines.grace) if times == 1 else 0.0

    def drain_deadline(self) -> Deadline:
        """How long the end of the log may take; short as soon as somebody wants to go."""
        return _Impatient(self._cancel)

    def remove(self) -> None:
        """Nothing of it is left when this returns without raising. What an engine that hangs still creates or starts
        later has our lease, which is over by then: it ends by itself, and the next sweep removes it.
        """
        ask = self._remove if self._container else self._remove_unanswered if self._may_exist else None
        if ask is None:
            return
        try:
            self._cancel.call_with_deadline(ask, f"remove {self._name}", within=REMOVE_WITHIN)
        except EngineTimeoutError as error:
            self._lease.keep = True
            raise EngineLostError(f"{error.message.rstrip('.')}. The next run, or a sweep, removes it") from None
        except BaseException:
            self._lease.keep = True
            raise

    def _remove(self) -> None:
        self._engine.remove(self._container, force=True)

    def _remove_unanswered(self) -> None:
        """The engine may have created it, and its answer was lost: found by name, and ours only by its lease. What is
        not there may still come.
        """
        mine = self._lease.labels("", 0.0)[LABEL_LEASE]
        found = [one for one in self._engine.containers([f"{LABEL_LEASE}={mine}"]) if one.name == self._name]
        for one in found:
            self._engine.remove(one.id, force=True)
        if not found:
            raise EngineLostError(f"if the engine still creates {self._name}, the next run, or a sweep, removes it")


class _Impatient(Deadline):
    """Much time to read a long log, and little from the moment that somebody cancels."""

    def __init__(self, cancel: Cancel) -> None:
        super().__init__(_CANCEL_DRAIN if cancel.is_set else _DRAIN)
        self._cancel = cancel
        self._hurried = cancel.is_set

    def left(self) -> float:
        if self._cancel.is_set and not self._hurried:
            self._hurried = True
            self._at = min(self._at, self._clock() + _CANCEL_DRAIN)
        return super().left()

    @property
    def expired(self) -> bool:
        return self.left() <= 0


def _with_job(spec: ContainerSpec, job: Job) -> ContainerSpec:
    return replace(spec, env={**spec.env, JOB_VARIABLE: job.to_json()})
