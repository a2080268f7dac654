"""Deadlines on the monotonic clock, polling, calls in the background, and retries of idempotent reads.

Nothing here sleeps unconditionally: every wait ends with its condition or with its deadline.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Deadline:
    """A point on the monotonic clock, `seconds` from now; None: never. Changes of the wall clock do not move it."""

    def __init__(self, seconds: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = math.inf if seconds is None else clock() + seconds

    def left(self) -> float:
        """Return the seconds until the deadline: 0 once it has expired, infinity if it never does."""
        return max(0.0, self._at - self._clock())

    @property
    def expired(self) -> bool:
        return self._clock() >= self._at

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this deadline and one in `seconds`."""
        return Deadline(min(self.left(), seconds), clock=self._clock)


def poll(predicate: Callable[[], T], deadline: Deadline, every: float) -> T:
    """Call `predicate` now and every `every` seconds until it returns a true value or the deadline expires.

    Returns the last value.
    """
    pause = threading.Event()
    while True:
        value = predicate()
        if value or deadline.expired:
            return value
        pause.wait(min(every, deadline.left()))


class Attempt(Generic[T]):
    """A call that runs in its own thread from construction on, so that its caller can stop waiting. Not cancellable."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="attempt", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads on this machine: blocking is better than not making the call
            self._run(call)

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            self._error = error

    def result(self) -> T:
        """Return the call's result or raise its exception. Only valid once `running` is false."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for the call's end, at most this long."""
        self._thread.join(seconds)


def retry_reads(read: Callable[[], T], transient: Callable[[BaseException], bool], *, seconds: float = 2.0) -> T:
    """Return `read()`, retried for about `seconds` while it fails with an error that `transient` accepts.

    Raises the last error. Only for requests that are safe to repeat (ping, inspect, list): a create, start or build
    may have taken effect although its answer was lost.
    """
    try:
        return read()
    except Exception as error:
        if not transient(error):
            raise
    # Imported only after a first failure: the import costs 60 ms, which the fast path would pay for nothing.
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    retrying = Retrying(
        retry=retry_if_exception(transient),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.05, max=0.5),
        reraise=True,
    )
    return retrying(read)
