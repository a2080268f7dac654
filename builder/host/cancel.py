"""Cancellation of a run, by a signal or by another thread."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from builder.errors import EngineTimeoutError, Interrupted
from builder.host.deadlines import Attempt, Deadline

T = TypeVar("T")

#: Seconds after the first signal at which the builder stops waiting for an engine's answer, for a container to stop,
#: and for its removal. All ends within 5 s whatever the engine does, because CI systems kill a cancelled step after
#: 7.5 s. Giving up on a hanging engine is safe: once the builder has exited, the leases end its containers.
ANSWER_WITHIN, STOP_WITHIN, REMOVE_WITHIN = 1.5, 3.0, 3.6
#: Seconds after the first signal at which the builder stops waiting for what only tells of the run.
TOLD_WITHIN = 4.0
#: Seconds that every request to an engine gets, however late after the signal it is made.
LEAST_WAIT = 0.3


class Cancel:
    """A request to end the run: the first one asks for an orderly end, the second for an immediate one.

    `set` takes no lock, so a signal handler may call it whatever code it interrupted.

    part_of: a wider cancellation; if that one began earlier, `elapsed` counts from there.
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
        """Request the end, as this signal would."""
        if not self._signums:
            self._since = time.monotonic()
        self._signums.append(signum)
        if len(self._signums) == 1:
            os.write(self._writer, b".")

    @property
    def is_set(self) -> bool:
        return bool(self._signums)

    @property
    def requests(self) -> int:
        """How many times the end was requested."""
        return len(self._signums)

    @property
    def signum(self) -> int | None:
        """The first signal."""
        return self._signums[0] if self._signums else None

    @property
    def elapsed(self) -> float:
        """Seconds since the first request; 0 before it."""
        if not self._signums:
            return 0.0
        return max(time.monotonic() - self._since, self._part_of.elapsed if self._part_of else 0.0)

    def is_due(self, seconds: float) -> bool:
        """Return whether the end was requested at least `seconds` ago."""
        return self.is_set and self.elapsed >= seconds

    def left_too_late(self) -> bool:
        """Return whether what tells of the run (metrics, a webhook) is not waited for any more."""
        return self.requests > 1 or self.is_due(TOLD_WITHIN)

    def call_with_deadline(self, call: Callable[[], T], action: str, *, within: float = ANSWER_WITHIN) -> T:
        """Return `call()`'s result; after a cancellation, stop waiting for it.

        Waits without limit before a cancellation, and at most `within` seconds since the first signal (but at least
        LEAST_WAIT) after it. Then raises EngineTimeoutError; the request may still take effect.

        action: for the message, e.g. ``create NAME``.
        """
        attempt, least = Attempt(call), Deadline(LEAST_WAIT)
        while attempt.running:
            attempt.join(0.05)
            if least.expired and self.is_due(within):
                break
        if attempt.running:
            raise EngineTimeoutError(f"the engine gave no answer in time to the request to {action}")
        return attempt.result()

    def check(self) -> None:
        """Raise Interrupted once the end was requested."""
        if self._signums:
            raise Interrupted(self._signums[0])

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Keep signal handlers from raising inside: the code there checks `is_set` itself between its steps."""
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
        """Wait for the first `set`, for one of these descriptors to be readable, or `seconds`; return `is_set`."""
        poller = select.poll()
        for descriptor in (self._reader, *also):
            poller.register(descriptor, select.POLLIN)
        poller.poll(max(0.0, seconds) * 1000)
        return self.is_set


class LimitedCancel(Cancel):
    """A cancellation that is part of another one, and also begins when its time is over. A context manager.

    seconds: from the entry on.
    """

    def __init__(self, part_of: Cancel, seconds: float) -> None:
        super().__init__(part_of)
        self._wider, self._seconds, self._ended = part_of, seconds, threading.Event()
        self.late = False

    def __enter__(self) -> LimitedCancel:
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        limit = Deadline(self._seconds)
        while not (self._ended.wait(0.05) or self.is_set):
            if self._wider.is_set or limit.expired:
                self.late = not self._wider.is_set
                self.set(self._wider.signum or signal.SIGALRM)

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        with self._wider.shield(), super().shield():
            yield


def _close_all(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
