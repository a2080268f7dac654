"""Cancellation: without a signal a request waits forever, after one it has seconds."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from builder.errors import EngineTimeoutError
from builder.host.cancel import LEAST_WAIT, Cancel
from builder.host.deadlines import Deadline, poll


def test_call_without_signal_waits_for_its_result() -> None:
    late = Cancel().call_with_deadline(lambda: poll(lambda: False, Deadline(0.2), every=0.2) or "late", "wait")
    assert late == "late"


def test_call_that_raises_raises_here() -> None:
    with pytest.raises(ZeroDivisionError):
        Cancel().call_with_deadline(lambda: 1 / 0, "divide")


def test_call_after_signal_times_out() -> None:
    cancel, never = Cancel(), threading.Event()
    threading.Timer(0.1, cancel.set, [signal.SIGINT]).start()
    began = time.monotonic()
    with pytest.raises(EngineTimeoutError, match="no answer in time to the request to start it"):
        cancel.call_with_deadline(never.wait, "start it", within=0.4)
    assert 0.4 < time.monotonic() - began < 3
    never.set()


def test_call_long_after_signal_still_gets_the_least_wait() -> None:
    cancel, never = Cancel(), threading.Event()
    cancel.set(signal.SIGINT)
    part = Cancel(part_of=cancel)
    assert poll(lambda: cancel.is_due(0.2), Deadline(5), every=0.02)
    part.set(signal.SIGTERM)
    assert part.is_due(0.2), "it is part of a cancellation that began before"
    quick = part.call_with_deadline(
        lambda: poll(lambda: False, Deadline(0.05), every=0.05) or "yes", "do it", within=0.1
    )
    assert quick == "yes"
    began = time.monotonic()
    with pytest.raises(EngineTimeoutError):
        part.call_with_deadline(never.wait, "do it", within=0.1)
    assert time.monotonic() - began >= LEAST_WAIT
    never.set()
