"""Deadlines keep to their clock, polls to their deadline, and only what is transient is tried again."""

from __future__ import annotations

import math

import pytest

from builder.waiting import Deadline, poll, retry_reads


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_counts_down_and_stays_over() -> None:
    clock = Clock()
    deadline = Deadline(5, clock=clock)
    assert (deadline.left(), deadline.over) == (5, False)
    clock.now += 5
    assert (deadline.left(), deadline.over) == (0, True)
    clock.now += 5
    assert (deadline.left(), deadline.over) == (0, True)


def test_no_deadline_never_ends() -> None:
    deadline = Deadline(None)
    assert deadline.left() == math.inf
    assert not deadline.over


def test_extending_never_shortens() -> None:
    clock = Clock()
    deadline = Deadline(5, clock=clock)
    deadline.extend(2)
    assert deadline.left() == 5
    deadline.extend(9)
    assert deadline.left() == 9


def test_within_is_the_earlier_one() -> None:
    clock = Clock()
    assert Deadline(5, clock=clock).within(2).left() == 2
    assert Deadline(5, clock=clock).within(9).left() == 5
    assert Deadline(None, clock=clock).within(9).left() == 9


def test_poll_returns_the_first_true_answer() -> None:
    answers = iter(["", "", "yes"])
    assert poll(lambda: next(answers), Deadline(5), every=0.001) == "yes"


def test_poll_asks_once_more_than_never() -> None:
    asked = []
    assert poll(lambda: asked.append(1), Deadline(0), every=1) is None
    assert asked == [1]


def test_reads_are_tried_again_while_they_fail_transiently() -> None:
    failures = [OSError("once"), OSError("twice")]

    def read() -> str:
        if failures:
            raise failures.pop(0)
        return "answer"

    assert retry_reads(read, lambda error: isinstance(error, OSError)) == "answer"


def test_other_failures_come_through_at_once() -> None:
    asked = []

    def read() -> None:
        asked.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        retry_reads(read, lambda error: isinstance(error, OSError))
    assert asked == [1]


def test_the_last_failure_is_the_one_that_is_told() -> None:
    with pytest.raises(OSError, match="still"):
        retry_reads(lambda: (_ for _ in ()).throw(OSError("still")), lambda error: True, seconds=0.05)
