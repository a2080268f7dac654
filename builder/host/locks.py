"""Waiting for kernel locks that other builders hold: how long, and what is printed meanwhile.

The locks are on files that are never unlinked: a lock on a name that was replaced would exclude nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from builder import flock
from builder.errors import BusyError, PreflightError
from builder.flock import holder, try_lock
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline, poll

#: Seconds between two attempts to take a lock, and the longest delay before a cancellation is noticed.
_RETRY, _NOTICE = 0.2, 0.05


def open_lock(path: Path, *, root: Path | None = None) -> int:
    """Return a descriptor of an existing lock file. Raises OSError, and PreflightError for what cannot be a lock.

    root: see `flock.open_lock`.
    """
    try:
        return flock.open_lock(path, root=root)
    except flock.NotALockError as error:
        raise PreflightError(f"{path} {error.strerror}") from None


class LockWait:
    """One wait for other builders, for however many locks; its time runs from construction on.

    seconds: for all locks together.
    say: prints a line for people.
    waited: gets the seconds of each wait at its end.
    """

    def __init__(
        self,
        seconds: float,
        *,
        say: Callable[[str], None],
        cancel: Cancel,
        waited: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._seconds = seconds
        self._limit = Deadline(seconds)
        self._say = say
        self._cancel = cancel
        self._waited = waited

    def acquire(self, descriptor: int, *, holder_action: str, busy: str) -> None:
        """Lock this file exclusively, waiting while another builder holds it. Raises BusyError, Interrupted.

        holder_action: what the other builder does with it, for the line that is printed once (``holds GPU 3``).
        busy: what is unavailable, for the error (``GPU 3 is in use``).
        """
        began = time.monotonic()
        try:
            self._acquire(descriptor, holder_action, busy)
        finally:
            self._waited(time.monotonic() - began)

    def _acquire(self, descriptor: int, holder_action: str, busy: str) -> None:
        announced = False
        while not try_lock(descriptor):
            self._cancel.check()
            if not announced:
                self._say(f"waiting for {holder(descriptor)}, which {holder_action}")
                announced = True
            if self._limit.expired:
                raise self.timeout_error(f"{busy} by {holder(descriptor)}")
            poll(lambda: self._cancel.is_set, self._limit.within(_RETRY), every=_NOTICE)

    def timeout_error(self, problem: str) -> BusyError:
        """Return the error for a wait that took too long. problem: ``GPU 3 is in use by pid 7``."""
        return BusyError(f"{problem}, still after {self._seconds:.0f} s. Wait for it, or raise --lock-timeout.")
