"""The wish that a run ends, from a signal or from another thread."""

from __future__ import annotations

import contextlib
import os
import select
import weakref
from collections.abc import Iterator

from builder.errors import Interrupted


class Cancel:
    """Somebody wants it to end: a signal, or another thread. Once is in order, twice is at once.

    `set` may be called in a signal handler whatever the interrupted code was doing: it takes no lock.
    """

    def __init__(self) -> None:
        self._signums: list[int] = []
        self._shields = 0
        self._reader, self._writer = os.pipe()
        self._close = weakref.finalize(self, _close_all, self._reader, self._writer)

    def set(self, signum: int) -> None:
        """Asks for the end, in the name of this signal."""
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

    def check(self) -> None:
        """Raises Interrupted once the end was asked for."""
        if self._signums:
            raise Interrupted(self._signums[0])

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """While something runs that looks at `is_set` itself, and must not be torn out of a step by an exception."""
        self._shields += 1
        try:
            yield
        finally:
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
