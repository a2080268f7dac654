"""Schedules: what starts when and where, by a clock that only counts."""

from __future__ import annotations

import random

import pytest

from builder.run.schedule import Busy, Load, Place, Schedule, arrange, lower_bound, play

EIGHT = Place(tuple(range(8)))


def loads(*tasks: tuple[int, float], sure: bool = True) -> list[Load]:
    return [Load(f"t{number}", gpus, seconds, sure) for number, (gpus, seconds) in enumerate(tasks)]


def check(schedule: Schedule, place: Place) -> None:
    """No GPU is given to two tasks at a time, and nobody without GPUs is one too many."""
    for start in schedule.starts:
        end = start.at + start.load.seconds
        beside = [
            other
            for other in schedule.starts
            if other is not start and other.at < end and start.at < other.at + other.load.seconds
        ]
        assert len(start.devices) == start.load.gpus
        assert set(start.devices) <= set(place.devices)
        for other in beside:
            assert not set(start.devices) & set(other.devices), (start, other)
        at_once = [other for other in beside if other.at <= start.at and not other.load.gpus]
        assert start.load.gpus or len(at_once) < place.slots


#: What a machine with eight GPUs may be asked for: (GPUs, minutes).
MIXES = {
    "the models of a CI": [(8, 6), (8, 5), (8, 4), (8, 4), (4, 7), (4, 5), (8, 3)],
    "a long one and many small": [(4, 20), (1, 5), (1, 5), (1, 4), (1, 4), (2, 9), (2, 8), (1, 3), (1, 2), (4, 3)],
    "halves": [(4, 9), (4, 8), (4, 7), (4, 6), (4, 5), (4, 4), (4, 3), (4, 2)],
    "wide ones between": [(8, 2), (4, 6), (8, 2), (4, 6), (8, 2), (2, 6), (2, 6), (4, 5)],
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_machine_is_used_well(mix: list[tuple[int, float]]) -> None:
    tasks = loads(*mix)
    schedule = arrange(tasks, EIGHT)
    check(schedule, EIGHT)
    assert {start.load.name for start in schedule.starts} == {load.name for load in tasks}
    assert schedule.seconds <= 1.15 * lower_bound(tasks, EIGHT)


def test_any_mix_is_packed_rightly_and_never_badly() -> None:
    numbers = random.Random(7)  # the same mixes each time
    for _ in range(40):
        place = Place(tuple(range(numbers.choice([4, 8]))), numbers.randint(1, 3))
        tasks = loads(
            *((min(numbers.choice([0, 1, 2, 4, 8]), len(place.devices)), numbers.uniform(1, 600)) for _ in range(9))
        )
        schedule = arrange(tasks, place)
        check(schedule, place)
        assert len(schedule.starts) == 9
        assert schedule.seconds <= 2 * lower_bound(tasks, place)
        assert schedule == arrange(tasks, place), "the same each time"


def test_longest_first_and_equals_in_their_order() -> None:
    tasks = loads((8, 3), (8, 5), (8, 5), (8, 9))
    assert [start.load.name for start in arrange(tasks, EIGHT).starts] == ["t3", "t1", "t2", "t0"]
    assert [start.load.name for start in arrange(loads((8, 5), (8, 5)), EIGHT).starts] == ["t0", "t1"]


def test_without_gpus_one_at_a_time_unless_more_are_allowed() -> None:
    tasks = loads((0, 4), (0, 4), (0, 4))
    assert [start.at for start in arrange(tasks, Place()).starts] == [0, 4, 8]
    assert [start.at for start in arrange(tasks, Place(slots=2)).starts] == [0, 0, 4]
    beside = loads((8, 4), (0, 4))
    assert [start.at for start in arrange(beside, EIGHT).starts] == [0, 0], "a task without GPUs takes none"


def test_what_runs_keeps_its_gpus_also_when_it_is_overdue() -> None:
    running = [Busy(Load("long", 4, 10.0), (0, 1, 2, 3), -5.0), Busy(Load("other", 2, 10.0), (6, 7), 30.0)]
    schedule = arrange(loads((4, 9), (2, 9)), EIGHT, running)
    now = {start.load.name: start.devices for start in schedule.now()}
    assert now == {"t1": (4, 5)}
    assert schedule.seconds >= 30


def test_gpus_are_those_that_the_manifest_names() -> None:
    schedule = arrange(loads((1, 5), (2, 5)), Place((4, 6, 7)))
    assert sorted(device for start in schedule.starts for device in start.devices) == [4, 6, 7]


def test_in_too_little_time_as_many_as_possible_end() -> None:
    tasks = loads((8, 50), (8, 20), (8, 15), (8, 10))
    schedule = arrange(tasks, EIGHT, limit=47)
    assert {start.load.name for start in schedule.starts} == {"t1", "t2", "t3"}
    assert [load.name for load in schedule.left_out] == ["t0"]
    assert schedule.seconds == 45


def test_what_is_not_known_is_tried() -> None:
    tasks = [*loads((8, 20)), Load("unknown", 8, 1200.0)]
    schedule = arrange(tasks, EIGHT, limit=60)
    assert [start.load.name for start in schedule.starts] == ["t0", "unknown"]


def test_a_wide_task_is_not_passed_by_for_ever() -> None:
    """Small ones that fit beside each other would keep eight GPUs from ever being free together."""
    tasks = loads((8, 30), *[(1, 10.0)] * 16)
    assert arrange(tasks, EIGHT).seconds == 50 == lower_bound(tasks, EIGHT)


def test_how_many_can_run_together() -> None:
    assert EIGHT.width(loads((8, 1), (8, 1))) == 1
    assert EIGHT.width(loads((8, 1), (4, 1), (4, 1))) == 2
    assert EIGHT.width(loads((8, 1), (0, 1), (0, 1))) == 2
    assert Place(slots=3).width(loads((0, 1), (0, 1))) == 2


def test_nothing_to_do_takes_no_time() -> None:
    assert play([], EIGHT) == Schedule((), 0.0) == arrange([], EIGHT)
    assert lower_bound([], Place()) == 0.0
