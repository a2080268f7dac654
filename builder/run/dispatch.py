"""Runs the tasks of a run, several at the same time where the machine has room.

One thread per task; the main thread only decides what starts next. What ends a run early (a signal, the budget, an
engine that is lost, GPUs that a task does not free) starts no more tasks, and every running task ends
first: each removes its own container or process, so that a failure of one leaves none of another.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from builder.errors import FIRST_OF_SEVERAL, BuilderError, DefectError, Interrupted
from builder.report.live import LiveProgress
from builder.report.progress import PARTS, TaskProgress
from builder.report.results import Section
from builder.run.executor import Allocation, Executor
from builder.run.forecast import TIME_OUT, Estimate
from builder.run.plan import Item, before, result_of
from builder.run.schedule import PlannedTask, RunningTask, Schedule, best_schedule, lower_bound
from builder.text import counted, span

#: Seconds that a signal may wait for its handler.
_POLL = 0.1

Do = Callable[[Item, Allocation], None]


@dataclass
class PlanSection(Section):
    """Every task that a run would start."""

    plan: Sequence[PlannedRow]


@dataclass(frozen=True)
class ExpectedTime:
    """How long cold tasks will take, in seconds. never_timed: tasks whose deadline was taken."""

    seconds: float
    lower_bound: float
    never_timed: list[str]


@dataclass
class ExpectedSection(Section):
    """The forecast of a run."""

    expected: ExpectedTime


def expected_time(executor: Executor, items: Sequence[Item], estimates: Mapping[str, Estimate]) -> str:
    """Return how long these tasks will take, for people. The report gets the numbers."""
    planned = [planned_task(item, estimates) for item in duplicates(items)[0]]
    capacity, budget = executor.capacity(), executor.context.manifest.run.budget
    seconds = best_schedule(planned, capacity).seconds
    never_timed = [task.name for task in planned if not task.sure]
    expected = ExpectedTime(round(seconds, 1), round(lower_bound(planned, capacity), 1), never_timed)
    executor.context.report.add(ExpectedSection(expected))
    unknown = sum(not task.sure for task in planned)
    text = f"about {span(seconds)}"
    if unknown:
        text = f"at most {span(seconds)} ({f'{unknown} ' if unknown < len(planned) else ''}never timed)"
    return f"{text} of a {span(budget)} budget" if budget else text


@dataclass(frozen=True)
class PlannedRow:
    """A task as a run would start it now. The fields are keys of the JSON document.

    start: seconds from the start of the run; None: it would not start. gpus: indices. timed: whether `seconds` comes
    from an earlier run, and is not its time limit.
    """

    task: str
    start: float | None
    gpus: tuple[int, ...]
    seconds: float
    timed: bool
    note: str = ""


def planned_rows(executor: Executor, items: Sequence[Item], estimates: Mapping[str, Estimate]) -> list[PlannedRow]:
    """Return the schedule of these tasks, in the order of their starts; last those that would not start."""
    distinct, same = duplicates(items)
    planned = [planned_task(item, estimates) for item in distinct]
    budget = executor.context.manifest.run.budget
    found = best_schedule(planned, executor.capacity(), limit=budget or math.inf)
    rows = [
        PlannedRow(one.task.name, round(one.at, 3), one.devices, round(one.task.seconds, 3), one.task.sure)
        for one in found.starts
    ]
    rows += [
        PlannedRow(task.name, None, (), task.seconds, task.sure, "budget: would not end within it")
        for task in found.left_out
    ]
    rows += [
        PlannedRow(label, None, (), 0.0, True, f"the same work as {other.task.label}") for label, other in same.items()
    ]
    return rows


def planned_task(item: Item, estimates: Mapping[str, Estimate]) -> PlannedTask:
    estimate = estimates[item.task.label]
    gpus = 0 if item.config_problem else item.task.gpus  # a task that cannot run needs none
    return PlannedTask(item.task.label, gpus, estimate.seconds, estimate.sure)


def duplicates(items: Sequence[Item]) -> tuple[list[Item], dict[str, Item]]:
    """Return the distinct items, and label → earlier item for each item of the very same work."""
    first: dict[str, Item] = {}
    same: dict[str, Item] = {}
    for item in items:
        if not item.config_problem and (other := first.setdefault(item.key, item)) is not item:
            same[item.task.label] = other
    return [item for item in items if item.task.label not in same], same


def run_all(executor: Executor, items: Sequence[Item], estimates: Mapping[str, Estimate], do: Do) -> None:
    """Do every item that the budget has room for. Raises the first error of one of them, after the end of all."""
    if any(not item.config_problem for item in items):
        executor.start()
    with contextlib.closing(Dispatcher(executor, items, estimates, do)) as dispatcher:
        dispatcher.run()


class _TaskThread:
    """One task's thread. wake_writer: a descriptor that gets a byte when it ends."""

    def __init__(self, item: Item, allocation: Allocation, running: RunningTask, do: Do, wake_writer: int) -> None:
        self.item, self.allocation, self.task = item, allocation, running.task
        self._running, self._do, self._wake_writer = running, do, wake_writer
        self.error: BaseException | None = None
        self.finished = False
        self._thread = threading.Thread(target=self._run, name=f"task {item.task.label}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._do(self.item, self.allocation)
        except BaseException as error:  # noqa: BLE001 - raised by the main thread after all tasks have ended
            self.error = error
        finally:
            self.finished = True
            os.write(self._wake_writer, b".")

    @property
    def running(self) -> RunningTask:
        """The task as the scheduler sees it now."""
        progress = self.allocation.progress
        return replace(
            self._running, left=self.task.seconds - progress.seconds if progress.left is None else progress.left
        )

    def join(self) -> None:
        self._thread.join()


class Dispatcher:
    """The tasks of a run: waiting, running, and the schedule made when something last changed."""

    def __init__(self, executor: Executor, items: Sequence[Item], estimates: Mapping[str, Estimate], do: Do) -> None:
        self._executor, self._context, self._do = executor, executor.context, do
        self._waiting, self._same = duplicates(items)
        self._estimates = estimates
        self._capacity = executor.capacity()
        self._concurrent = self._capacity.width([planned_task(item, estimates) for item in self._waiting]) > 1
        # Tasks that start: no duplicates, and none that the budget refuses.
        self._count, self._started, self._ended = len(self._waiting), 0, 0
        self._running: list[_TaskThread] = []
        self._errors: list[BaseException] = []
        self._schedule, self._scheduled, self._is_sure = Schedule((), 0.0), time.monotonic(), True
        self._acknowledged = False
        self._wake_reader, self._wake_writer = os.pipe()
        self._live = LiveProgress(self._context.console, self.summary)

    def close(self) -> None:
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def run(self) -> None:
        """Run everything. Tasks notice a signal themselves; it is raised here after their end."""
        with self._context.cancel.shield(), self._live:
            try:
                self._start()
                while self._running:
                    self._wait()
                    self._start()
            finally:
                for thread in self._running:
                    thread.join()
        self._raise()
        self._add_duplicates()

    def _start(self) -> None:
        """Start every task that has room now."""
        if self._errors or self._context.cancel.is_set:
            return
        left = self._context.budget.left()
        self._waiting = [item for item in self._waiting if not self._refuse_late(item, left)]
        items = {item.task.label: item for item in self._waiting}
        planned = [planned_task(item, self._estimates) for item in self._waiting]
        running = [thread.running for thread in self._running]
        self._is_sure = all(task.sure for task in [*planned, *(one.task for one in running)])
        self._schedule = best_schedule(planned, self._capacity, running, left)
        self._scheduled = time.monotonic()
        for start in list(self._schedule.now()):
            item = items[start.task.name]
            self._waiting.remove(item)
            self._started += 1
            self._allocate(item, RunningTask(start.task, start.devices, start.task.seconds))

    def _allocate(self, item: Item, running: RunningTask) -> None:
        task, all_gpus = item.task, len(running.devices) == len(self._capacity.devices)
        estimate = self._estimates[task.label]
        progress = TaskProgress(
            task.label,
            _named(running.devices),
            expected=estimate.seconds if estimate.source != TIME_OUT else None,
            shapes=len(task.shapes),
            parts=() if task.recipe == "shapes" else PARTS,
        )
        where = f"  {_named(running.devices)}" if running.devices and not all_gpus else ""
        allocation = Allocation(
            title=f"[{self._started}/{self._count}] {task.label}{where}",
            # A task without GPUs still sees them: its kernels are for them.
            visible_gpus=None if all_gpus or not task.gpus else running.devices,
            reserved_gpus=None if all_gpus else running.devices,
            concurrent=self._concurrent,
            progress=progress,
            cancel=self._context.cancel,
        )
        self._live.add(progress)
        self._running.append(_TaskThread(item, allocation, running, self._do, self._wake_writer))

    def _refuse_late(self, item: Item, left: float) -> bool:
        """Return whether the task cannot end within the budget; then that is its result."""
        task, budget = planned_task(item, self._estimates), self._context.manifest.run.budget or 0.0
        if left <= 0:
            reason = "budget: it ended before this task had its turn"
        elif task.sure and task.seconds > left:
            there = f"{span(left)} are left"
            if task.seconds > budget:
                there = f"the whole budget is {span(budget)}: raise it"
            reason = f"budget: needs about {span(task.seconds)}, {there}"
        else:
            return False
        state = "warm" if item.warm else "cold"  # warm: forced, and its entries still exist
        self._context.report.add_result(replace(before(item), state=state, reason=reason, short_of_budget=True))
        self._context.console.say(f"{item.task.label}: {state} ({reason})")
        self._count -= 1
        return True

    def _wait(self) -> None:
        """Wait until a task has ended, or several."""
        while not select.select([self._wake_reader], [], [], _POLL)[0]:
            # The kernel may deliver a signal to any thread, which wakes no other, and Python runs its handler in this
            # one: so this thread has to run now and then.
            self._acknowledge()
        os.read(self._wake_reader, 1)
        for thread in [thread for thread in self._running if thread.finished]:
            thread.join()
            self._running.remove(thread)
            self._live.remove(thread.allocation.progress)
            self._ended += 1
            if thread.error is not None:
                self._errors.append(thread.error)

    def _acknowledge(self) -> None:
        """Say that a signal was noticed, once: the tasks take some seconds to end."""
        if self._context.cancel.is_set and not self._acknowledged:
            self._acknowledged = True
            self._context.console.say(f"stopping {counted(len(self._running), 'task')} (a second signal: at once)")

    def _raise(self) -> None:
        """Raise for a signal, else the most important error; every other one becomes a warning, once."""
        errors = [error for error in self._errors if not isinstance(error, Interrupted)]
        first = None if self._context.cancel.is_set else min(errors, key=_rank, default=None)
        for text in dict.fromkeys(map(_message, errors)):
            if first is None or text != _message(first):
                self._context.report.warnings.append(text)
        self._context.cancel.check()
        if first is not None:
            raise first

    def _add_duplicates(self) -> None:
        """Give every duplicate the result of the task that did its work."""
        report = self._context.report
        for task in [task for task in self._context.manifest.tasks if task.label in self._same]:
            other = self._same[task.label]
            now, done = self._executor.plan((task,)).items[0], report.of(other.task.label)
            result = before(now) if now.warm else result_of(now, done.state)
            result.reason = f"the same work as {other.task.label}" + (f": {done.reason}" if done.reason else "")
            report.add_result(result)

    def summary(self) -> str:
        """Return one sentence about the whole run. Called from any thread."""
        left = max(0.0, self._schedule.seconds - (time.monotonic() - self._scheduled))
        text = f"{self._ended} of {counted(self._count, 'task')} done"
        return f"{text}, {'about' if self._is_sure else 'at most'} {span(left)} left" if left >= 1 else text


def _rank(error: BaseException) -> int:
    """Of several errors the one with the lowest rank is raised."""
    status = error.exit_code if isinstance(error, BuilderError) else DefectError.exit_code
    return FIRST_OF_SEVERAL.index(status) if status in FIRST_OF_SEVERAL else len(FIRST_OF_SEVERAL)


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, BuilderError) else f"{type(error).__name__}: {error}"


def _named(devices: Sequence[int]) -> str:
    """Return ``gpu 3``, ``gpus 0-3`` or ``gpus 0,2``."""
    if not devices:
        return ""
    first, last = devices[0], devices[-1]
    if len(devices) == 1:
        return f"gpu {first}"
    if list(devices) == list(range(first, last + 1)):
        return f"gpus {first}-{last}"
    return f"gpus {','.join(map(str, devices))}"
