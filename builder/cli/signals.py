"""Signals of the process: SIGINT, SIGTERM and SIGHUP end a run in order, SIGTSTP is ignored."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from builder.errors import Interrupted
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline

#: Seconds at the end of a run in which a further signal is ignored, so that the outcome is reported.
REPORTING = 2.0


class Signals:
    """Handlers from `handled` to `restore`. Ctrl-Z is ignored, because a stopped reader blocks its container.

    After the block of `handled` a signal only sets `late`, for REPORTING seconds; after that it raises Interrupted.
    """

    def __init__(self, cancel: Cancel) -> None:
        self._cancel = cancel
        self._previous: dict[int, Any] = {}
        self._reporting: Deadline | None = None
        #: A signal that came while the outcome was reported.
        self.late: int | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Set the cancellation and raise Interrupted at a signal, or only set it while that is shielded."""
        if not self._previous:
            ending = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
            if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
                ending.remove(signal.SIGHUP)
            handlers: dict[int, Any] = {**dict.fromkeys(ending, self._handle), signal.SIGTSTP: signal.SIG_IGN}
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._reporting = None
        try:
            yield
        finally:
            self._reporting = Deadline(REPORTING)

    def restore(self) -> None:
        """Install the handlers that were there before `handled`."""
        previous, self._previous = self._previous, {}
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        if self._reporting is None:
            self._cancel.set(signum)
            if not self._cancel.shielded:
                raise Interrupted(signum)
        elif not self._reporting.expired:
            self.late = signum
        else:
            raise Interrupted(signum)
