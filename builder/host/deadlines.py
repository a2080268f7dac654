"""Deadlines on the monotonic clock, and what may be tried again.

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
    """A moment on the monotonic clock; ``None`` seconds means never. Wall-clock jumps do not move it."""

    def __init__(self, seconds: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = math.inf if seconds is None else clock() + seconds

    def left(self) -> float:
        """Seconds until then: 0 when it is over, infinity when it never is."""
        return max(0.0, self._at - self._clock())

    @property
    def over(self) -> bool:
        """Whether the moment has passed."""
        return self._clock() >= self._at

    def extend(self, seconds: float) -> None:
        """At least this many seconds from now on."""
        self._at = max(self._at, self._clock() + seconds)

    def within(self, seconds: float) -> Deadline:
        """The earlier of this deadline and one in ``seconds``."""
        return Deadline(min(self.left(), seconds), clock=self._clock)


def poll(predicate: Callable[[], T], deadline: Deadline, every: float) -> T:
    """Asks until the answer is true or the deadline over, at once and then every so many seconds; returns the last
    answer.
    """
    pause = threading.Event()
    while True:
        answer = predicate()
        if answer or deadline.over:
            return answer
        pause.wait(min(every, deadline.left()))


class Attempt(Generic[T]):
    """A call in a thread of its own, begun at once, so that nobody has to wait for its end. It cannot be taken back."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._answers: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="attempt", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread is left on this machine: better waited for than not done
            self._run(call)

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._answers.append(call())
        except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
            self._error = error

    def result(self) -> T:
        """The answer; raises what came instead of it. Only once it does not run any more."""
        if self._error is not None:
            raise self._error
        return self._answers[0]

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)


def retry_reads(read: Callable[[], T], transient: Callable[[BaseException], bool], *, seconds: float = 2.0) -> T:
    """Runs ``read``, again while it fails in a way that ``transient`` knows, for about so many seconds; then the last
    error.

    Only for what may be asked twice: ping, inspect, list. A create, start or build whose answer was lost may have
    happened.
    """
    try:
        return read()
    except Exception as error:
        if not transient(error):
            raise
    # Imported only after a first failure: the fast path has no use for it, and it costs 60 ms.
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    again = Retrying(
        retry=retry_if_exception(transient),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.05, max=0.5),
        reraise=True,
    )
    return again(read)
