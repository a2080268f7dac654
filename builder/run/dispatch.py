"""The tasks of a run at work, side by side where the machine has room for several.

One thread per task, and this one, which decides what starts next and does nothing else. Whatever ends a run (a signal,
the budget, an engine that is gone, a task whose GPUs stay held) starts nothing more, and every task that runs comes to
its own end first: each ends its own container, so what goes wrong with one keeps no other from it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from builder.errors import FIRST_OF_SEVERAL, BuilderError, DefectError, Interrupted
from builder.host.cancel import Cancel
from builder.report.live import LiveProgress
from builder.report.progress import PARTS, TaskProgress
from builder.run.container_executor import ContainerExecutor
from builder.run.estimates import TIME_OUT, Estimate
from builder.run.plan import Item, before, result_of
from builder.run.schedule import Busy, Load, Place, Schedule, arrange, lower_bound
from builder.text import counted, span

#: Seconds that a signal may wait for its handler.
_LOOK = 0.1


@dataclass(frozen=True)
class Seat:
    """Where and how one task runs. devices: GPUs that its container sees, by index; None: all that the manifest has.
    held: those that are its own; none of a task without GPUs, which still sees them: its kernels are for them.
    together: others may run at the same time. cancel: ends it.
    """

    title: str
    devices: tuple[int, ...] | None
    held: tuple[int, ...] | None
    together: bool
    activity: TaskProgress
    cancel: Cancel


Do = Callable[[Item, Seat], None]


def place_of(executor: ContainerExecutor) -> Place:
    """The room that a manifest gives its tasks."""
    context = executor.context
    gpus = context.manifest.gpus
    devices = tuple(range(gpus.count)) if gpus.devices is None else gpus.devices
    return Place(devices, context.manifest.run.parallel)


def load_of(item: Item, estimate: Estimate) -> Load:
    return Load(item.task.label, item.task.gpus, estimate.seconds, estimate.sure)


def forecast(executor: ContainerExecutor, items: Sequence[Item], expected: Mapping[str, Estimate]) -> str:
    """How long these tasks will take, for people; also left in the report."""
    context = executor.context
    loads = [load_of(item, expected[item.task.label]) for item in twins(items)[0]]
    place, budget = place_of(executor), context.manifest.run.budget
    seconds = arrange(loads, place).seconds
    context.report.extra["expected"] = {
        "seconds": round(seconds, 1),
        "lower_bound": round(lower_bound(loads, place), 1),
        "never_timed": [load.name for load in loads if not load.sure],
    }
    unknown = sum(not load.sure for load in loads)
    text = f"about {span(seconds)}"
    if unknown:
        text = f"at most {span(seconds)} ({f'{unknown} ' if unknown < len(loads) else ''}never timed)"
    return f"{text} of a {span(budget)} budget" if budget else text


def twins(items: Sequence[Item]) -> tuple[list[Item], dict[str, Item]]:
    """The tasks to do, and for each task that asks for the very same work as an earlier one (by label) that one."""
    first: dict[str, Item] = {}
    same: dict[str, Item] = {}
    for item in items:
        if not item.config_problem and (other := first.setdefault(item.key, item)) is not item:
            same[item.task.label] = other
    return [item for item in items if item.task.label not in same], same


def work(executor: ContainerExecutor, items: Sequence[Item], expected: Mapping[str, Estimate], do: Do) -> None:
    """Does every item that the budget has room for. Raises the first error of one of them, after the end of all."""
    if any(not item.config_problem for item in items):
        # Resolved once and for all, by this thread, in which a signal may interrupt it.
        _ = executor.lease, executor.warmup
    with contextlib.closing(_Shift(executor, items, expected, do)) as shift:
        shift.run()


class _Worker:
    """One task's thread. bell: a descriptor that hears of its end."""

    def __init__(self, item: Item, seat: Seat, busy: Busy, do: Do, bell: int) -> None:
        self.item, self.seat, self.load = item, seat, busy.load
        self._busy, self._do, self._bell = busy, do, bell
        self.error: BaseException | None = None
        self.over = False
        self._thread = threading.Thread(target=self._run, name=f"task {item.task.label}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._do(self.item, self.seat)
        except BaseException as error:  # noqa: BLE001 - raised where all of them are waited for
            self.error = error
        finally:
            self.over = True
            os.write(self._bell, b".")

    @property
    def busy(self) -> Busy:
        """As the planner sees it now."""
        left = self.seat.activity.left
        return replace(self._busy, left=self.load.seconds - self.seat.activity.seconds if left is None else left)

    def join(self) -> None:
        self._thread.join()


class _Shift:
    """A run's tasks: what waits, what runs, and what was planned when last something changed."""

    def __init__(
        self, executor: ContainerExecutor, items: Sequence[Item], expected: Mapping[str, Estimate], do: Do
    ) -> None:
        self._executor, self._do = executor, do
        self._waiting, self._same = twins(items)
        self._expected = expected
        self._place = place_of(executor)
        self._together = self._place.width([load_of(item, expected[item.task.label]) for item in self._waiting]) > 1
        self._count, self._started, self._ended = len(items), 0, 0
        self._running: list[_Worker] = []
        self._errors: list[BaseException] = []
        self._schedule, self._planned, self._is_sure = Schedule((), 0.0), time.monotonic(), True
        self._ear, self._bell = os.pipe()
        self._display = LiveProgress(executor.context.console, self.summary)

    def close(self) -> None:
        os.close(self._ear)
        os.close(self._bell)

    def run(self) -> None:
        """All of it. Those who run look for signals themselves; here one is raised when they are over."""
        with self._executor.context.cancel.shield(), self._display:
            try:
                self._start()
                while self._running:
                    self._wait()
                    self._start()
            finally:
                for worker in self._running:
                    worker.join()
        self._raise()
        self._settle_twins()

    def _start(self) -> None:
        """Whatever has room now."""
        executor = self._executor
        if self._errors or executor.context.cancel.is_set:
            return
        left = executor.context.budget.left()
        self._waiting = [item for item in self._waiting if not self._is_too_late(item, left)]
        loads = {item.task.label: (item, self._load(item)) for item in self._waiting}
        busy = [worker.busy for worker in self._running]
        self._is_sure = all(load.sure for load in [*(load for _, load in loads.values()), *(one.load for one in busy)])
        self._schedule, self._planned = arrange([load for _, load in loads.values()], self._place, busy, left), _now()
        for start in list(self._schedule.now()):
            item = loads[start.load.name][0]
            self._waiting.remove(item)
            self._started += 1
            self._seat(item, Busy(start.load, start.devices, start.load.seconds))

    def _seat(self, item: Item, busy: Busy) -> None:
        task, all_of_them = item.task, len(busy.devices) == len(self._place.devices)
        estimate = self._expected[task.label]
        activity = TaskProgress(
            task.label,
            _named(busy.devices),
            expected=estimate.seconds if estimate.source != TIME_OUT else None,
            shapes=len(task.shapes),
            parts=() if task.recipe == "shapes" else PARTS,
        )
        where = f"  {_named(busy.devices)}" if busy.devices and not all_of_them else ""
        seat = Seat(
            f"[{self._started}/{self._count}] {task.label}{where}",
            None if all_of_them or not task.gpus else busy.devices,
            None if all_of_them else busy.devices,
            self._together,
            activity,
            self._executor.context.cancel,
        )
        self._display.add(activity)
        self._running.append(_Worker(item, seat, busy, self._do, self._bell))

    def _load(self, item: Item) -> Load:
        return load_of(item, self._expected[item.task.label])

    def _is_too_late(self, item: Item, left: float) -> bool:
        """Whether nothing can come of it within the budget; then that is its result."""
        load, budget = self._load(item), self._executor.context.manifest.run.budget or 0.0
        if left <= 0:
            reason = "budget: it ended before this task had its turn"
        elif load.sure and load.seconds > left:
            there = f"{span(left)} are left"
            if load.seconds > budget:
                there = f"the whole budget is {span(budget)}: raise it"
            reason = f"budget: needs about {span(load.seconds)}, {there}"
        else:
            return False
        state = "warm" if item.warm else "cold"  # forced, and what it had is there still
        self._executor.context.report.add_result(replace(before(item), state=state, reason=reason))
        self._executor.context.console.say(f"{item.task.label}: {state} ({reason})")
        return True

    def _wait(self) -> None:
        """Until a task has ended, or several."""
        while not select.select([self._ear], [], [], _LOOK)[0]:
            # Nothing to do but to be here: the kernel may hand a signal to any thread, which wakes no other, and
            # Python runs its handler in this one.
            pass
        os.read(self._ear, 1)
        for worker in [worker for worker in self._running if worker.over]:
            worker.join()
            self._running.remove(worker)
            self._display.remove(worker.seat.activity)
            self._ended += 1
            if worker.error is not None:
                self._errors.append(worker.error)

    def _raise(self) -> None:
        """A signal, else the error that counts most; what else went wrong is a warning, once."""
        errors = [error for error in self._errors if not isinstance(error, Interrupted)]
        first = None if self._executor.context.cancel.is_set else min(errors, key=_rank, default=None)
        for text in dict.fromkeys(map(_message, errors)):
            if first is None or text != _message(first):
                self._executor.context.report.warnings.append(text)
        self._executor.context.cancel.check()
        if first is not None:
            raise first

    def _settle_twins(self) -> None:
        """The same work in another task is done, or it is not: once is enough to know."""
        report = self._executor.context.report
        for task in [task for task in self._executor.context.manifest.tasks if task.label in self._same]:
            other = self._same[task.label]
            now, done = self._executor.plan((task,)).items[0], report.of(other.task.label)
            result = before(now) if now.warm else result_of(now, done.state)
            result.reason = f"the same work as {other.task.label}" + (f": {done.reason}" if done.reason else "")
            report.add_result(result)

    def summary(self) -> str:
        """For people, any time."""
        left = max(0.0, self._schedule.seconds - (_now() - self._planned))
        text = f"{self._ended} of {counted(self._count, 'task')} done"
        return f"{text}, {'about' if self._is_sure else 'at most'} {span(left)} left" if left >= 1 else text


def _rank(error: BaseException) -> int:
    """Of several errors the one with the lowest counts."""
    status = error.exit_code if isinstance(error, BuilderError) else DefectError.exit_code
    return FIRST_OF_SEVERAL.index(status) if status in FIRST_OF_SEVERAL else len(FIRST_OF_SEVERAL)


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, BuilderError) else f"{type(error).__name__}: {error}"


def _named(devices: Sequence[int]) -> str:
    """``gpu 3``, ``gpus 0-3``, ``gpus 0,2``."""
    if not devices:
        return ""
    first, last = devices[0], devices[-1]
    if len(devices) == 1:
        return f"gpu {first}"
    if list(devices) == list(range(first, last + 1)):
        return f"gpus {first}-{last}"
    return f"gpus {','.join(map(str, devices))}"


def _now() -> float:
    return time.monotonic()
