"""Kernel locks on files that are never unlinked: how long one builder waits for another, and what it says meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from builder import flock
from builder.errors import BusyError, PreflightError
from builder.flock import holder, try_lock
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline, poll


def open_lock(path: Path) -> int:
    """Return a descriptor of an existing lock file. Raises OSError, and PreflightError for what cannot be a lock."""
    try:
        return flock.open_lock(path)
    except flock.NotALockError as error:
        raise PreflightError(f"{path} {error.strerror}") from None


class Patience:
    """A wait for other builders, however many locks it is for: ``seconds`` from now on. say: where people look."""

    def __init__(self, seconds: float, *, say: Callable[[str], None], cancel: Cancel) -> None:
        self._seconds = seconds
        self._limit = Deadline(seconds)
        self._say = say
        self._cancel = cancel

    def take(self, descriptor: int, *, doing: str, busy: str) -> None:
        """Locks this file, waiting while another builder has it, and saying for whom: ``doing`` is what that one
        does. Raises BusyError, which begins with ``busy``, when it still has it in the end.
        """
        told = False
        while not try_lock(descriptor):
            self._cancel.check()
            if not told:
                self._say(f"waiting for {holder(descriptor)}, which {doing}")
                told = True
            if self._limit.over:
                raise self.exhausted(f"{busy} by {holder(descriptor)}")
            poll(lambda: self._cancel.is_set, self._limit.within(0.2), every=0.05)

    def exhausted(self, what: str) -> BusyError:
        """The end of it."""
        return BusyError(f"{what}, still after {self._seconds:.0f} s. Wait for it, or raise --lock-timeout.")
