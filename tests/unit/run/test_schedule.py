"""Schedules: what starts when and where, by a clock that only counts."""

from __future__ import annotations

import random

import pytest

from builder.run.schedule import Capacity, PlannedTask, RunningTask, Schedule, best_schedule, lower_bound, simulate

EIGHT = Capacity(tuple(range(8)))


def planned(*tasks: tuple[int, float], sure: bool = True) -> list[PlannedTask]:
    return [PlannedTask(f"t{number}", gpus, seconds, sure) for number, (gpus, seconds) in enumerate(tasks)]


def check(schedule: Schedule, capacity: Capacity) -> None:
    """No two tasks have a GPU at the same time, and tasks without GPUs keep to the slots."""
    for start in schedule.starts:
        end = start.at + start.task.seconds
        beside = [
            other
            for other in schedule.starts
            if other is not start and other.at < end and start.at < other.at + other.task.seconds
        ]
        assert len(start.devices) == start.task.gpus
        assert set(start.devices) <= set(capacity.devices)
        for other in beside:
            assert not set(start.devices) & set(other.devices), (start, other)
        at_once = [other for other in beside if other.at <= start.at and not other.task.gpus]
        assert start.task.gpus or len(at_once) < capacity.slots


#: Tasks for a machine with eight GPUs: (GPUs, minutes).
MIXES = {
    "the models of a CI": [(8, 6), (8, 5), (8, 4), (8, 4), (4, 7), (4, 5), (8, 3)],
    "a long one and many small": [(4, 20), (1, 5), (1, 5), (1, 4), (1, 4), (2, 9), (2, 8), (1, 3), (1, 2), (4, 3)],
    "halves": [(4, 9), (4, 8), (4, 7), (4, 6), (4, 5), (4, 4), (4, 3), (4, 2)],
    "wide ones between": [(8, 2), (4, 6), (8, 2), (4, 6), (8, 2), (2, 6), (2, 6), (4, 5)],
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_schedule_of_common_mixes_is_near_the_lower_bound(mix: list[tuple[int, float]]) -> None:
    tasks = planned(*mix)
    schedule = best_schedule(tasks, EIGHT)
    check(schedule, EIGHT)
    assert {start.task.name for start in schedule.starts} == {task.name for task in tasks}
    assert schedule.seconds <= 1.15 * lower_bound(tasks, EIGHT)


def test_schedule_of_any_mix_is_valid_and_repeatable() -> None:
    numbers = random.Random(7)  # the same mixes each time
    for _ in range(40):
        capacity = Capacity(tuple(range(numbers.choice([4, 8]))), numbers.randint(1, 3))
        tasks = planned(
            *((min(numbers.choice([0, 1, 2, 4, 8]), len(capacity.devices)), numbers.uniform(1, 600)) for _ in range(9))
        )
        schedule = best_schedule(tasks, capacity)
        check(schedule, capacity)
        assert len(schedule.starts) == 9
        assert schedule.seconds <= 2 * lower_bound(tasks, capacity)
        assert schedule == best_schedule(tasks, capacity), "the same each time"


def test_schedule_longest_first_equals_in_order() -> None:
    tasks = planned((8, 3), (8, 5), (8, 5), (8, 9))
    assert [start.task.name for start in best_schedule(tasks, EIGHT).starts] == ["t3", "t1", "t2", "t0"]
    assert [start.task.name for start in best_schedule(planned((8, 5), (8, 5)), EIGHT).starts] == ["t0", "t1"]


def test_tasks_without_gpus_keep_to_the_slots() -> None:
    tasks = planned((0, 4), (0, 4), (0, 4))
    assert [start.at for start in best_schedule(tasks, Capacity()).starts] == [0, 4, 8]
    assert [start.at for start in best_schedule(tasks, Capacity(slots=2)).starts] == [0, 0, 4]
    beside = planned((8, 4), (0, 4))
    assert [start.at for start in best_schedule(beside, EIGHT).starts] == [0, 0], "a task without GPUs takes none"


def test_overdue_task_keeps_its_gpus() -> None:
    running = [
        RunningTask(PlannedTask("long", 4, 10.0), (0, 1, 2, 3), -5.0),
        RunningTask(PlannedTask("other", 2, 10.0), (6, 7), 30.0),
    ]
    schedule = best_schedule(planned((4, 9), (2, 9)), EIGHT, running)
    now = {start.task.name: start.devices for start in schedule.now()}
    assert now == {"t1": (4, 5)}
    assert schedule.seconds >= 30


def test_allocation_takes_named_gpus() -> None:
    schedule = best_schedule(planned((1, 5), (2, 5)), Capacity((4, 6, 7)))
    assert sorted(device for start in schedule.starts for device in start.devices) == [4, 6, 7]


def test_limit_leaves_out_as_few_tasks_as_possible() -> None:
    tasks = planned((8, 50), (8, 20), (8, 15), (8, 10))
    schedule = best_schedule(tasks, EIGHT, limit=47)
    assert {start.task.name for start in schedule.starts} == {"t1", "t2", "t3"}
    assert [task.name for task in schedule.left_out] == ["t0"]
    assert schedule.seconds == 45


def test_unsure_task_starts_within_a_limit() -> None:
    tasks = [*planned((8, 20)), PlannedTask("unknown", 8, 1200.0)]
    schedule = best_schedule(tasks, EIGHT, limit=60)
    assert [start.task.name for start in schedule.starts] == ["t0", "unknown"]


def test_wide_task_is_not_starved() -> None:
    """Small tasks that fit together would keep eight GPUs from ever being free at the same time."""
    tasks = planned((8, 30), *[(1, 10.0)] * 16)
    assert best_schedule(tasks, EIGHT).seconds == 50 == lower_bound(tasks, EIGHT)


def test_width_counts_concurrent_tasks() -> None:
    assert EIGHT.width(planned((8, 1), (8, 1))) == 1
    assert EIGHT.width(planned((8, 1), (4, 1), (4, 1))) == 2
    assert EIGHT.width(planned((8, 1), (0, 1), (0, 1))) == 2
    assert Capacity(slots=3).width(planned((0, 1), (0, 1))) == 2


def test_schedule_of_no_tasks_is_empty() -> None:
    assert simulate([], EIGHT) == Schedule((), 0.0) == best_schedule([], EIGHT)
    assert lower_bound([], Capacity()) == 0.0
