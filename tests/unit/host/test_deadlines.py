"""Deadlines, polling, background calls and retries."""

from __future__ import annotations

import math
import threading

import pytest

from builder.host.deadlines import Attempt, Deadline, poll, retry_reads


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_deadline_counts_down_then_stays_expired() -> None:
    clock = Clock()
    deadline = Deadline(5, clock=clock)
    assert (deadline.left(), deadline.expired) == (5, False)
    clock.now += 5
    assert (deadline.left(), deadline.expired) == (0, True)
    clock.now += 5
    assert (deadline.left(), deadline.expired) == (0, True)


def test_deadline_none_never_expires() -> None:
    deadline = Deadline(None)
    assert deadline.left() == math.inf
    assert not deadline.expired


def test_deadline_within_is_the_earlier_one() -> None:
    clock = Clock()
    assert Deadline(5, clock=clock).within(2).left() == 2
    assert Deadline(5, clock=clock).within(9).left() == 5
    assert Deadline(None, clock=clock).within(9).left() == 9


def test_poll_returns_first_true_value() -> None:
    values = iter(["", "", "yes"])
    assert poll(lambda: next(values), Deadline(5), every=0.001) == "yes"


def test_poll_expired_deadline_calls_once() -> None:
    calls = []
    assert poll(lambda: calls.append(1), Deadline(0), every=1) is None
    assert calls == [1]


def test_retry_reads_transient_failures_are_retried() -> None:
    failures = [OSError("once"), OSError("twice")]

    def read() -> str:
        if failures:
            raise failures.pop(0)
        return "answer"

    assert retry_reads(read, lambda error: isinstance(error, OSError)) == "answer"


def test_retry_reads_other_failures_raise_at_once() -> None:
    calls = []

    def read() -> None:
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        retry_reads(read, lambda error: isinstance(error, OSError))
    assert calls == [1]


def test_retry_reads_out_of_time_raises_last_failure() -> None:
    with pytest.raises(OSError, match="still"):
        retry_reads(lambda: (_ for _ in ()).throw(OSError("still")), lambda error: True, seconds=0.05)


def test_attempt_without_threads_runs_in_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    attempt = Attempt(lambda: "done")
    assert not attempt.running
    assert attempt.result() == "done"
