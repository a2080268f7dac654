"""Handlers of signals."""

from __future__ import annotations

import os
import signal

import pytest

from builder.cli.signals import Signals
from builder.errors import (
    Interrupted,
)
from builder.host.cancel import Cancel


def test_signal_handlers_are_restored() -> None:
    known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)
    before = [signal.getsignal(number) for number in known]
    cancel = Cancel()
    signals = Signals(cancel)
    with signals.handled():
        assert signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert cancel.signum == signal.SIGTERM
        with cancel.shield():
            os.kill(os.getpid(), signal.SIGINT)
        assert cancel.requests == 2
    os.kill(os.getpid(), signal.SIGTERM)  # what it came to is told first
    assert cancel.requests == 2
    signals.restore()
    assert [signal.getsignal(number) for number in known] == before


def test_sighup_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals(Cancel())
        with signals.handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signals.restore()
    finally:
        signal.signal(signal.SIGHUP, before)
