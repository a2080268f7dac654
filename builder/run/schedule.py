"""Which task starts when, and on which GPUs. Pure: numbers in, a schedule out, deterministic.

A list scheduler: tasks stand in an order, and whenever GPUs become free the first tasks that fit start there; one that
does not fit lets later ones pass. Several orders are simulated with the expected times, the best one is improved by
exchanging pairs, and the whole is repeated whenever a task ends, with the times that are known by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: Simulation steps that one decision may cost in all: about 0.2 s.
_EFFORT = 40_000
#: Seconds by which an order has to be better to replace another one.
_BETTER = 1e-6
#: Seconds that an overdue task is expected to go on for: its GPUs are not free yet.
_OVERDUE = 1.0


@dataclass(frozen=True)
class PlannedTask:
    """A task as the scheduler sees it."""

    name: str
    gpus: int  # held at the same time
    seconds: float  # expected
    sure: bool = False  # known well enough not to start the task if it would not end in time


@dataclass(frozen=True)
class RunningTask:
    """A task that runs. left: seconds that it is expected to go on for."""

    task: PlannedTask
    devices: tuple[int, ...]
    left: float


@dataclass(frozen=True)
class Capacity:
    """GPUs by index, and how many tasks without GPUs may run at the same time."""

    devices: tuple[int, ...] = ()
    slots: int = 1

    def free(self, running: Sequence[RunningTask]) -> Capacity:
        """Return what these tasks leave."""
        taken = {device for one in running for device in one.devices}
        return Capacity(
            tuple(device for device in self.devices if device not in taken),
            self.slots - sum(not one.task.gpus for one in running),
        )

    def allocate(self, task: PlannedTask) -> tuple[int, ...] | None:
        """Return GPUs for this task, the lowest first; None where it does not fit."""
        if not task.gpus:
            return () if self.slots > 0 else None
        return self.devices[: task.gpus] if task.gpus <= len(self.devices) else None

    def width(self, tasks: Sequence[PlannedTask]) -> int:
        """Return how many of these tasks can run at the same time at most."""
        count, free = 0, len(self.devices)
        for gpus in sorted(task.gpus for task in tasks if task.gpus):
            count, free = count + (gpus <= free), free - gpus
        return count + min(self.slots, sum(not task.gpus for task in tasks))


@dataclass(frozen=True)
class Start:
    """The start of a task, in seconds from now, and its GPUs."""

    task: PlannedTask
    at: float
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """starts: in time order. seconds: until the last end. left_out: tasks that would not end within the limit."""

    starts: tuple[Start, ...]
    seconds: float
    left_out: tuple[PlannedTask, ...] = ()

    def now(self) -> Iterator[Start]:
        """Yield what starts immediately."""
        return (start for start in self.starts if start.at <= 0.0)


def lower_bound(tasks: Sequence[PlannedTask], capacity: Capacity) -> float:
    """Return the seconds that no schedule can beat: the longest task, or all work spread evenly over GPUs (slots)."""
    longest = max((task.seconds for task in tasks), default=0.0)
    on_gpus = sum(task.seconds * task.gpus for task in tasks) / max(1, len(capacity.devices))
    others = sum(task.seconds for task in tasks if not task.gpus) / max(1, capacity.slots)
    return max(longest, on_gpus, others)


def best_schedule(
    tasks: Sequence[PlannedTask], capacity: Capacity, running: Sequence[RunningTask] = (), limit: float = math.inf
) -> Schedule:
    """Return the best schedule found: most tasks ended within `limit` (seconds left), then the earliest end."""
    orders = [sorted(tasks, key=key) for key in _ORDERS]
    simulated = [
        (_cost(simulate(order, capacity, running, limit), limit), number) for number, order in enumerate(orders)
    ]
    cost, number = min(simulated)
    order = orders[number]
    tries = max(0, _EFFORT // max(1, len(tasks)) ** 2)
    ideal = (0, lower_bound(tasks, capacity))
    improved = len(tasks) > 1
    while improved and tries > 0 and cost > ideal:
        improved = False
        for other in _exchanged(order):
            tries -= 1
            other_cost = _cost(simulate(other, capacity, running, limit), limit)
            if other_cost < (cost[0], cost[1] - _BETTER):
                order, cost, improved = other, other_cost, True
                break
            if tries <= 0:
                break
    return simulate(order, capacity, running, limit)


def simulate(
    order: Sequence[PlannedTask], capacity: Capacity, running: Sequence[RunningTask] = (), limit: float = math.inf
) -> Schedule:
    """Return the schedule of this order. A task that would surely not end within the limit does not start."""
    waiting, busy = list(order), [(max(_OVERDUE, one.left), one) for one in running]
    starts: list[Start] = []
    now, end = 0.0, max((at for at, _ in busy), default=0.0)
    while waiting:
        free = capacity.free([one for _, one in busy])
        for task in list(waiting):
            if task.sure and now + task.seconds > limit:
                continue
            devices = free.allocate(task)
            if devices is None:
                continue
            started = RunningTask(task, devices, task.seconds)
            starts.append(Start(task, now, devices))
            busy.append((now + task.seconds, started))
            waiting.remove(task)
            end = max(end, now + task.seconds)
            free = free.free([started])
        if not busy:
            break
        now = min(at for at, _ in busy)
        busy = [(at, one) for at, one in busy if at > now]
    return Schedule(tuple(starts), end, tuple(waiting))


def _cost(schedule: Schedule, limit: float) -> tuple[int, float]:
    """Return how many tasks do not end within the limit, then the seconds until the last end."""
    late = sum(start.at + start.task.seconds > limit for start in schedule.starts)
    return late + len(schedule.left_out), schedule.seconds


def _exchanged(order: Sequence[PlannedTask]) -> Iterator[list[PlannedTask]]:
    """Yield the order with each pair exchanged in turn, where that makes a difference."""
    for first in range(len(order)):
        for second in range(first + 1, len(order)):
            a, b = order[first], order[second]
            if (a.gpus, a.seconds) != (b.gpus, b.seconds):
                other = list(order)
                other[first], other[second] = b, a
                yield other


_Key = Callable[[PlannedTask], tuple[float, ...]]
#: Longest first; widest first; most work first; and least work first, which ends the most tasks in too little time.
_ORDERS: tuple[_Key, ...] = (
    lambda task: (-task.seconds, -task.gpus),
    lambda task: (-task.gpus, -task.seconds),
    lambda task: (-task.seconds * max(1, task.gpus), -task.gpus),
    lambda task: (task.seconds * max(1, task.gpus), task.gpus),
)
