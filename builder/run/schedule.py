"""Which task starts when, and on which GPUs. Pure: numbers in, a schedule out, the same one each time.

A list scheduler: tasks stand in an order, and whenever GPUs are free the first ones that fit start there; one that does
not fit lets later ones pass. Which order is best is not guessed but tried: several good ones are played through with
the expected times, the best is improved by exchanging pairs, and the whole is done anew whenever a task ends, with the
times that are known by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: Steps of a play-through that one decision may cost, in all: some 0.2 s.
_EFFORT = 40_000
#: How much better, in seconds, an order has to be to take another's place.
_BETTER = 1e-6
#: Seconds that a task which takes longer than expected is expected to go on for: its GPUs are not free yet.
_OVERDUE = 1.0


@dataclass(frozen=True)
class Load:
    """A task as a planner sees it. gpus: how many it holds at once. seconds: expected. sure: whether that is known well
    enough to not start what would not end in time.
    """

    name: str
    gpus: int
    seconds: float
    sure: bool = False


@dataclass(frozen=True)
class Busy:
    """A task that runs. left: seconds it is expected to go on for."""

    load: Load
    devices: tuple[int, ...]
    left: float


@dataclass(frozen=True)
class Place:
    """devices: GPUs by index. slots: how many tasks without GPUs may run side by side."""

    devices: tuple[int, ...] = ()
    slots: int = 1

    def free(self, running: Sequence[Busy]) -> Place:
        """What these tasks leave."""
        taken = {device for busy in running for device in busy.devices}
        return Place(
            tuple(device for device in self.devices if device not in taken),
            self.slots - sum(not busy.load.gpus for busy in running),
        )

    def seat(self, load: Load) -> tuple[int, ...] | None:
        """GPUs for this task, the lowest first; None where it does not fit."""
        if not load.gpus:
            return () if self.slots > 0 else None
        return self.devices[: load.gpus] if load.gpus <= len(self.devices) else None

    def width(self, loads: Sequence[Load]) -> int:
        """How many of these tasks can run at the same time at most."""
        count, free = 0, len(self.devices)
        for gpus in sorted(load.gpus for load in loads if load.gpus):
            count, free = count + (gpus <= free), free - gpus
        return count + min(self.slots, sum(not load.gpus for load in loads))


@dataclass(frozen=True)
class Start:
    """A task's beginning, in seconds from now, and its GPUs."""

    load: Load
    at: float
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """starts: in time order. seconds: until everything is over. left_out: what would not end within the limit."""

    starts: tuple[Start, ...]
    seconds: float
    left_out: tuple[Load, ...] = ()

    def now(self) -> Iterator[Start]:
        """What starts at once."""
        return (start for start in self.starts if start.at <= 0.0)


def lower_bound(loads: Sequence[Load], place: Place) -> float:
    """Seconds that no schedule can beat: the longest task, and all the work spread evenly over all GPUs (slots)."""
    longest = max((load.seconds for load in loads), default=0.0)
    on_gpus = sum(load.seconds * load.gpus for load in loads) / max(1, len(place.devices))
    others = sum(load.seconds for load in loads if not load.gpus) / max(1, place.slots)
    return max(longest, on_gpus, others)


def arrange(loads: Sequence[Load], place: Place, running: Sequence[Busy] = (), limit: float = math.inf) -> Schedule:
    """The best schedule that was found. limit: seconds that are left; as many tasks as possible end within them, and
    among equals the one counts that is over first.
    """
    orders = [sorted(loads, key=key) for key in _ORDERS]
    played = [(_cost(play(order, place, running, limit), limit), number) for number, order in enumerate(orders)]
    cost, number = min(played)
    order = orders[number]
    tries = max(0, _EFFORT // max(1, len(loads)) ** 2)
    ideal = (0, lower_bound(loads, place))
    improved = len(loads) > 1
    while improved and tries > 0 and cost > ideal:
        improved = False
        for other in _exchanged(order):
            tries -= 1
            other_cost = _cost(play(other, place, running, limit), limit)
            if other_cost < (cost[0], cost[1] - _BETTER):
                order, cost, improved = other, other_cost, True
                break
            if tries <= 0:
                break
    return play(order, place, running, limit)


def play(order: Sequence[Load], place: Place, running: Sequence[Busy] = (), limit: float = math.inf) -> Schedule:
    """What comes of this order. A task whose time is sure and would not end within the limit does not start."""
    waiting, busy = list(order), [(max(_OVERDUE, one.left), one) for one in running]
    starts: list[Start] = []
    now, end = 0.0, max((at for at, _ in busy), default=0.0)
    while waiting:
        free = place.free([one for _, one in busy])
        for load in list(waiting):
            if load.sure and now + load.seconds > limit:
                continue
            devices = free.seat(load)
            if devices is None:
                continue
            started = Busy(load, devices, load.seconds)
            starts.append(Start(load, now, devices))
            busy.append((now + load.seconds, started))
            waiting.remove(load)
            end = max(end, now + load.seconds)
            free = free.free([started])
        if not busy:
            break
        now = min(at for at, _ in busy)
        busy = [(at, one) for at, one in busy if at > now]
    return Schedule(tuple(starts), end, tuple(waiting))


def _cost(schedule: Schedule, limit: float) -> tuple[int, float]:
    """How many do not end within the limit, then how long it takes."""
    late = sum(start.at + start.load.seconds > limit for start in schedule.starts)
    return late + len(schedule.left_out), schedule.seconds


def _exchanged(order: Sequence[Load]) -> Iterator[list[Load]]:
    """The order with each pair exchanged in turn, where that makes a difference."""
    for first in range(len(order)):
        for second in range(first + 1, len(order)):
            a, b = order[first], order[second]
            if (a.gpus, a.seconds) != (b.gpus, b.seconds):
                other = list(order)
                other[first], other[second] = b, a
                yield other


_Key = Callable[[Load], tuple[float, ...]]
#: Longest first; widest first; most work first; and least work first, which gets most tasks done in too little time.
_ORDERS: tuple[_Key, ...] = (
    lambda load: (-load.seconds, -load.gpus),
    lambda load: (-load.gpus, -load.seconds),
    lambda load: (-load.seconds * max(1, load.gpus), -load.gpus),
    lambda load: (load.seconds * max(1, load.gpus), load.gpus),
)
