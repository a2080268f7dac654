"""Reserves this machine and its GPUs for a run: idle, out of service, locked, and free again after each task.

The order keeps builders apart. `acquire` and `release` run under one lock of the whole machine, so that no builder
puts back into service what another one still uses. The GPUs' locks come next, before the processes on them are
listed: GPUs of another builder are waited for, and any other process on them is a problem.

A probe reserves nothing. It asks the driver what there is and makes no context, so it disturbs no other process; and a
verb that only reads never waits, nor takes a machine out of service to learn that there is nothing to do.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import CANNOT_RUN, DeferredError, GpusHeldError, PreflightError, Problem
from builder.host import gpu_locks, hooks
from builder.host.cancel import TOLD_WITHIN
from builder.host.deadlines import Deadline, poll
from builder.host.gpus import GpuProcess, GpuSnapshot, GpuUsage
from builder.report.results import GpuResult, Section
from builder.run import gpu_failures, preflight
from builder.run.context import Context
from builder.run.plan import Item
from builder.text import duration

if TYPE_CHECKING:
    from builder.run.container_executor import ContainerExecutor

#: A GPU is free again when no more than this many bytes are in use beyond what was before.
TOLERANCE = 512 << 20

#: Seconds between two looks at GPUs that are not free yet, and at a machine that is not idle yet.
_EVERY, _IDLE_EVERY = 0.1, 1.0


# --- idle ------------------------------------------------------------------------------------------------------------


def wait_until_idle(executor: ContainerExecutor, seconds: float, items: Sequence[Item] = ()) -> float:
    """Wait until the manifest's GPUs are idle; return the seconds that it took.

    Raises DeferredError when they are not idle within `seconds`.
    """
    context = executor.context
    if not context.manifest.gpus.count:
        return 0.0
    limit, shown = Deadline(seconds), ""
    reason: list[str] = []

    def settled() -> bool:
        nonlocal shown
        context.cancel.check()
        reason[:] = [next(reasons_not_idle(executor, items), "")]
        if reason[0] and reason[0] != shown:
            shown = reason[0]
            context.console.say(f"waiting until this machine is idle, at most {duration(limit.left())}: {shown}")
        return not reason[0] or context.cancel.is_set

    idle = poll(settled, limit, every=_IDLE_EVERY)
    context.cancel.check()
    if not idle:
        raise DeferredError(
            f"deferred: this machine was not idle within {duration(seconds)} ({reason[0]}). Nothing was pulled or "
            "warmed; the next refresh tries again"
        )
    return seconds - limit.left()


def reasons_not_idle(executor: ContainerExecutor, items: Sequence[Item] = ()) -> Iterator[str]:
    """Yield why the machine is not idle, one sentence each.

    With NVML every process on a GPU counts. Elsewhere every container of this engine that was given GPUs counts,
    although it may be between two jobs.

    items: the GPUs' UUIDs come from their toolchain records where the driver does not name them.
    """
    snapshot = executor.gpu_snapshot()
    if snapshot.absent is None:
        for problem in preflight.busy(snapshot, executor.container_names):
            yield problem.text.rstrip(".")
    else:
        for container in executor.engine.containers_with_gpus():
            use = f"which processes use them cannot be known ({snapshot.absent})"
            yield f"container {container.name} has GPUs, and {use}"
    names = {gpu.uuid: f"GPU {gpu.index}" for gpu in snapshot.gpus}
    for item in items:
        names.update({str(gpu["uuid"]): f"GPU {gpu.get('index')}" for gpu in item.record["gpus"] if gpu.get("uuid")})
    for lock, what in {gpu_locks.SERVICE: "this machine", **names}.items():
        with gpu_locks.try_lock(lock) as free:
            if not free:
                yield f"another builder has {what}"


# --- reservation -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reserved(executor: ContainerExecutor, items: Sequence[Item]) -> Iterator[GpuReservation]:
    """Reserve the machine for these items while the context lasts; nothing where none of them starts a container.

    Raises PreflightError when it cannot be had, and BusyError when another builder keeps it.
    """
    context = executor.context
    work = [item for item in items if not item.config_problem]
    reservation = GpuReservation(executor)
    with contextlib.ExitStack() as stack:
        if work:
            stack.enter_context(_out_of_service(executor))
            # The release command may reset a GPU, which an open driver prevents.
            stack.callback(executor.nvml.close)
        if work and context.manifest.gpus.count:
            warn = context.report.warnings.append
            stack.enter_context(gpu_locks.locked(reservation.names(work[0]), context.lock_wait(), warn))
        if work:
            # The last owner of these locks may have been killed, and its containers still run.
            executor.sweep()
        if work and context.manifest.gpus.count:
            reservation.refuse_busy()
        yield reservation


# --- out of service --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _out_of_service(executor: ContainerExecutor) -> Iterator[None]:
    context = executor.context
    spec = context.manifest.gpus
    if not (spec.acquire or spec.release):
        yield
        return
    directory = _working_directory(context)
    acquire, release = (
        hooks.Hooks(lines, context.run_id, spec.hook_timeout, directory) for lines in (spec.acquire, spec.release)
    )
    pending = executor.lease.path.parent
    with gpu_locks.locked({gpu_locks.SERVICE: "this machine"}, context.lock_wait(), context.report.warnings.append):
        _record_pending_release(pending, release)
        try:
            context.console.say("taking this machine out of service:")
            failure = hooks.run(acquire, context.options.environ, functools.partial(context.console.log, "hook"))
            if failure is not None:
                error = PreflightError(
                    "this machine can't be taken out of service", [Problem("acquire", f"{failure.text}.")]
                )
                error.notes = failure.tail
                raise error
            yield
        finally:
            _release(context, pending, release)


def _working_directory(context: Context) -> str:
    """Return where the operator's commands run: in the builder's directory, or in / if that was removed."""
    try:
        return str(Path.cwd())
    except OSError as error:
        context.console.say(f"the working directory is gone ({error.strerror}): acquire and release run in /")
        return "/"


def _record_pending_release(pending: Path, release: hooks.Hooks) -> None:
    try:
        hooks.record_pending_release(pending, release)
    except OSError as error:
        raise PreflightError(
            f"cannot record in {pending} that this machine has to be put back into service: {error.strerror}"
        ) from error


def _release(context: Context, pending: Path, release: hooks.Hooks) -> None:
    """Put the machine back into service, also after a signal.

    A second signal, or the end of the time that the first one leaves, ends the wait; it then stays pending.
    """
    cancel = context.cancel
    with cancel.shield():
        context.console.say("putting this machine back into service:")
        times = cancel.requests
        failure = hooks.run(
            release,
            context.options.environ,
            functools.partial(context.console.log, "hook"),
            keep_going=True,
            hurried=lambda: cancel.requests > max(1, times) or cancel.is_due(TOLD_WITHIN),
        )
        if failure is None:
            hooks.clear_pending_release(pending)
        else:
            context.report.warnings.append(f"release failed, and is tried again by the next run: {failure.text}")


def run_pending_release(context: Context, directory: Path) -> bool:
    """Put the machine back into service for a killed builder; return whether nothing is pending any more.

    False while another builder has the machine out of service.
    """
    with gpu_locks.try_lock(gpu_locks.SERVICE) as free:
        if not free:
            return False
        context.console.say("putting this machine back into service, for a builder that was killed:")
        failure = hooks.run_pending_release(
            directory, context.options.environ, functools.partial(context.console.log, "hook")
        )
        if failure is not None:
            context.report.warnings.append(f"release failed, and is tried again by the next run: {failure.text}")
        return failure is None


# --- its GPUs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A GPU that is not free again."""

    gpu: GpuUsage
    processes: tuple[GpuProcess, ...] = ()
    extra: int = 0  # bytes in use beyond those in use before the task
    why: str = ""  # set where NVML does not answer for it


@dataclass
class GpusUnknown(Section):
    """Why nothing is known about the GPUs."""

    gpus_reason: str


class GpuReservation:
    """The GPUs of a run's containers: checks that they are free before it, and again after each task."""

    def __init__(self, executor: ContainerExecutor) -> None:
        self._executor, self._context = executor, executor.context
        self._reported: set[str] = set()
        self._reporting = threading.Lock()

    def names(self, item: Item) -> dict[str, str]:
        """Return UUID → name for people, for the GPUs' locks. Without NVML the probe's."""
        snapshot = self._snapshot()
        found = [(gpu.index, gpu.uuid) for gpu in snapshot.gpus]
        if not found:
            record = item.record.get("gpus") or ()
            found = [(gpu.get("index", 0), str(gpu["uuid"])) for gpu in record if gpu.get("uuid")]
        if not found:
            self._report_once("they have no UUIDs here, and are not locked against other builders")
        return {uuid: f"GPU {index} ({uuid})" for index, uuid in found}

    def refuse_busy(self) -> None:
        """Raise PreflightError with every process that uses one of the GPUs; warn instead if the options allow it."""
        executor = self._executor
        remedy = ["[gpus] acquire did not free it: stop it, or"] if self._context.manifest.gpus.acquire else []
        # The GPUs of a swept container are free in a moment.
        limit = Deadline(self._context.manifest.gpus.release_timeout if executor.swept else 0.0)
        while True:
            snapshot = self._snapshot()
            if snapshot.mismatch:
                raise PreflightError(CANNOT_RUN, [gpu_failures.mismatch(str(snapshot.absent))])
            problems = list(preflight.busy(snapshot, executor.container_names, *remedy))
            if not problems or limit.expired or self._context.options.allow_busy:
                break
            self._context.cancel.wait(_EVERY)
            self._context.cancel.check()
        self._context.report.gpus = [
            GpuResult(
                index=gpu.index,
                uuid=gpu.uuid,
                name=gpu.name,
                memory_total_bytes=gpu.total,
                memory_used_bytes=gpu.used,
                held_by=[process.pid for process in gpu.processes or ()],
            )
            for gpu in snapshot.gpus
        ]
        if problems and not self._context.options.allow_busy:
            raise PreflightError(f"{CANNOT_RUN} now", problems)
        self._context.report.warnings += [problem.text for problem in problems]

    @contextlib.contextmanager
    def free_after(self, label: str, devices: tuple[int, ...] | None = None) -> Iterator[None]:
        """Wait after this context, the task of this label, until its GPUs are as free as before.

        Raises GpusHeldError when they are not within ``[gpus] release_timeout``: the next server would run out of
        memory. After a cancellation it does not wait.
        devices: the task's GPUs; None: all of the run's. Other tasks may use others meanwhile.
        """
        executor = self._executor
        has_some = self._context.manifest.gpus.count if devices is None else devices
        before, ran = self._snapshot(devices) if has_some else GpuSnapshot(), len(executor.ran)
        yield
        if len(executor.ran) == ran or not before.gpus:
            return
        if self._context.cancel.is_set:
            self._context.report.warnings += [f"after {label}, {text}" for text in self._texts(self._held(before))]
            return
        timeout, began = self._context.manifest.gpus.release_timeout, time.monotonic()
        freed: dict[str, float] = {}

        def all_free() -> bool:
            still = {held.gpu.uuid for held in self._held(before)}
            for gpu in before.gpus:
                if gpu.uuid in still:
                    freed.pop(gpu.uuid, None)
                else:
                    freed.setdefault(gpu.uuid, time.monotonic() - began)
            self._context.cancel.check()
            return not still

        is_free = poll(all_free, Deadline(timeout), every=_EVERY)
        self._report(freed)
        if not is_free:
            held = "; ".join(self._texts(self._held(before))) or "they were freed at the last moment"
            raise GpusHeldError(
                f"the GPUs are not free again {timeout:.0f} s after {label}: {held}. The next server would run out of "
                "memory, so nothing more is started; end what holds them, and run again"
            )
        whose = "" if devices is None else f"{label}: "
        self._context.console.say(f"{whose}GPUs free again after {max(freed.values()):.1f} s")

    def _report(self, freed: dict[str, float]) -> None:
        """Report the longest wait of all tasks; None for a GPU that is not free yet."""
        for entry in self._context.report.gpus:
            seconds = freed.get(entry.uuid)
            before = entry.free_again_seconds or 0.0
            entry.free_again_seconds = None if seconds is None else round(max(before, seconds), 3)

    def _held(self, before: GpuSnapshot) -> list[Held]:
        now = self._executor.gpu_snapshot()
        found = []
        for was in before.gpus:
            gpu = now.gpu(was.uuid)
            if gpu is None:
                found.append(Held(was, why=now.absent or "; ".join(now.notes) or "the driver knows it no more"))
            elif (held := self._compare(was, gpu)) is not None:
                found.append(held)
        return found

    def _compare(self, was: GpuUsage, gpu: GpuUsage) -> Held | None:
        known = {process.identity for process in was.processes or ()}
        others = [process for process in gpu.processes or () if self._is_foreign(process)]
        new = [process for process in gpu.processes or () if process.identity not in known]
        extra = gpu.used - was.used if gpu.used is not None and was.used is not None else 0
        if self._context.options.allow_busy:
            # Where a GPU is shared, memory that grows may be another process's.
            new = [process for process in new if process not in others]
            extra = 0 if known or others else extra
        if new or extra > TOLERANCE:
            return Held(gpu, tuple(new), extra)
        return None

    def _is_foreign(self, process: GpuProcess) -> bool:
        """A process that is ending has no start time any more; it is taken for ours."""
        return process.started is not None and process.container not in self._executor.ran

    def _texts(self, found: Sequence[Held]) -> list[str]:
        """Return one sentence for each, for people. At most one request to the engine, for names."""
        names = self._executor.container_names() if any(held.processes for held in found) else {}
        return [self._text(held, names) for held in found]

    @staticmethod
    def _text(held: Held, names: Mapping[str, str]) -> str:
        if held.why:
            return f"GPU {held.gpu.index} does not answer ({held.why})"
        memory = f"{held.extra / 1e9:.1f} GB more in use than before"
        if not held.processes:
            return f"GPU {held.gpu.index} has {memory}, by no process that can be seen from here"
        who = ", ".join(process.describe(names) for process in held.processes)
        return f"GPU {held.gpu.index} is held by {who}, with {memory}"

    def _snapshot(self, devices: tuple[int, ...] | None = None) -> GpuSnapshot:
        """Return the state of the GPUs; report once per run what cannot be known about them."""
        snapshot = self._executor.gpu_snapshot()
        if devices is not None:
            snapshot = snapshot.chosen(devices, 0)
        if snapshot.absent is not None:
            self._context.report.add(GpusUnknown(snapshot.absent))
            self._report_once(
                f"{snapshot.absent}; which processes use them, and whether they are free after a task, is not checked"
            )
        for note in snapshot.notes:
            self._report_once(note)
        return snapshot

    def _report_once(self, text: str) -> None:
        with self._reporting:
            known = text in self._reported
            self._reported.add(text)
        if not known:
            self._context.console.say(f"GPUs: {text}")
