"""Deadlines keep to their clock, polls to their deadline, and only what is transient is tried again."""

from __future__ import annotations

import math
import signal
import threading
import time

import pytest

from builder.errors import EngineTimeoutError
from builder.host.cancel import LEAST, Cancel
from builder.host.deadlines import Attempt, Deadline, poll, retry_reads


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


class TestAnEngineThatHangs:
    """`Cancel.answer`: patience without end, and little of it from the first signal on."""

    def test_without_a_signal_an_answer_is_waited_for(self) -> None:
        assert Cancel().answer(lambda: poll(lambda: False, Deadline(0.2), every=0.2) or "late", "something") == "late"

    def test_what_comes_instead_of_an_answer_is_raised(self) -> None:
        with pytest.raises(ZeroDivisionError):
            Cancel().answer(lambda: 1 / 0, "something")

    def test_after_a_signal_it_is_given_up(self) -> None:
        cancel, never = Cancel(), threading.Event()
        threading.Timer(0.1, cancel.set, [signal.SIGINT]).start()
        began = time.monotonic()
        with pytest.raises(EngineTimeoutError, match="no answer in time when it was asked to start it"):
            cancel.answer(never.wait, "to start it", by=0.4)
        assert 0.4 < time.monotonic() - began < 3
        never.set()

    def test_late_questions_get_little_time_and_are_answered_in_it(self) -> None:
        cancel, never = Cancel(), threading.Event()
        cancel.set(signal.SIGINT)
        part = Cancel(part_of=cancel)
        assert poll(lambda: cancel.is_due(0.2), Deadline(5), every=0.02)
        part.set(signal.SIGTERM)
        assert part.is_due(0.2), "it is part of an end that began before"
        assert part.answer(lambda: poll(lambda: False, Deadline(0.05), every=0.05) or "yes", "it", by=0.1) == "yes"
        began = time.monotonic()
        with pytest.raises(EngineTimeoutError):
            part.answer(never.wait, "it", by=0.1)
        assert time.monotonic() - began >= LEAST
        never.set()


def test_what_is_owed_is_done_where_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    attempt = Attempt(lambda: "done")
    assert not attempt.running
    assert attempt.result() == "done"
