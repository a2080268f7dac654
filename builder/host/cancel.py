"""The wish that a run ends, from a signal or from another thread."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from builder.errors import EngineTimeoutError, Interrupted
from builder.host.deadlines import Attempt, Deadline

T = TypeVar("T")

#: Seconds from the first signal on. Within 5 s everything has ended, whatever the engine does: a cancelled CI step has
#: 7.5. An engine that hangs must not hold the builder, because leases end what it has as soon as the builder has ended.
ANSWER, STOP, REMOVE = 1.5, 3.0, 3.6
#: Seconds that an engine gets for an answer, however late it is asked.
LEAST = 0.3


class Cancel:
    """Somebody wants it to end: a signal, or another thread. Once is in order, twice is at once.

    `set` may be called in a signal handler whatever the interrupted code was doing: it takes no lock. part_of: of the
    same end, which may have begun before.
    """

    def __init__(self, part_of: Cancel | None = None) -> None:
        self._part_of = part_of
        self._since = 0.0
        self._signums: list[int] = []
        self._shields = 0
        self._shielding = threading.Lock()
        self._reader, self._writer = os.pipe()
        self._close = weakref.finalize(self, _close_all, self._reader, self._writer)

    def set(self, signum: int) -> None:
        """Asks for the end, in the name of this signal."""
        if not self._signums:
            self._since = time.monotonic()
        self._signums.append(signum)
        if len(self._signums) == 1:
            os.write(self._writer, b".")

    @property
    def is_set(self) -> bool:
        return bool(self._signums)

    @property
    def times(self) -> int:
        """How often it was asked for."""
        return len(self._signums)

    @property
    def signum(self) -> int | None:
        """The first signal."""
        return self._signums[0] if self._signums else None

    @property
    def ago(self) -> float:
        """Seconds since it was asked for; 0 before."""
        if not self._signums:
            return 0.0
        return max(time.monotonic() - self._since, self._part_of.ago if self._part_of else 0.0)

    def is_due(self, seconds: float) -> bool:
        """Whether it was asked for so many seconds ago."""
        return self.is_set and self.ago >= seconds

    def answer(self, ask: Callable[[], T], what: str, *, by: float = ANSWER) -> T:
        """What the engine says. by: seconds from the first signal on, after which nobody waits for it any more; then
        EngineTimeoutError, and what was asked may be done all the same. what: it was asked for, in words.
        """
        attempt, least = Attempt(ask), Deadline(LEAST)
        while attempt.running:
            attempt.join(0.05)
            if least.over and self.is_due(by):
                break
        if attempt.running:
            raise EngineTimeoutError(f"the engine gave no answer in time when it was asked {what}")
        return attempt.result()

    def check(self) -> None:
        """Raises Interrupted once the end was asked for."""
        if self._signums:
            raise Interrupted(self._signums[0])

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """While something runs that looks at `is_set` itself, and must not be torn out of a step by an exception."""
        with self._shielding:
            self._shields += 1
        try:
            yield
        finally:
            with self._shielding:
                self._shields -= 1

    @property
    def shielded(self) -> bool:
        return self._shields > 0

    def wait(self, seconds: float, *also: int) -> bool:
        """Waits for so long, for the first `set`, or until one of these descriptors is readable; says whether it is
        set.
        """
        poller = select.poll()
        for descriptor in (self._reader, *also):
            poller.register(descriptor, select.POLLIN)
        poller.poll(max(0.0, seconds) * 1000)
        return self.is_set


def _close_all(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
