"""Progress of a running task from its events: phase, done of total, rate, and time left."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable

from builder import events
from builder.text import duration, readable, span

#: A rate is measured over the last so many seconds.
_WINDOW = 30.0
#: The in-container program numbers the shapes that sglang asks for: ``DeepGEMM 11: GEMM_NT_F8F8BF16 N=…``.
_SHAPE = re.compile(r"DeepGEMM (\d+): (.+)")
#: Units of `progress` that count a part of a task (the Ms of one shape), not all of it.
PARTS = ("Ms", "shards")


class TaskProgress:
    """Progress of one task. Written by the thread that drains its log, read by the thread that draws.

    where: GPUs, for people.
    expected: seconds that the task is expected to take, None if unknown.
    shapes: number of shapes of the task, 0 if unknown.
    parts: units of progress that count only a part of the task.
    """

    def __init__(
        self,
        label: str,
        where: str = "",
        *,
        expected: float | None = None,
        shapes: int = 0,
        parts: tuple[str, ...] = PARTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.where = label, where
        self._expected, self._shapes, self._parts, self._clock = expected, shapes, parts, clock
        self._began = clock()
        self._phase = "starting"
        self._shape = 0
        self._done: tuple[float, float, str] | None = None
        self._kernels = 0
        self._history: deque[tuple[float, float, str]] = deque(maxlen=256)

    def on_event(self, event: events.Event) -> None:
        """Take an event of the task's container into account."""
        match event:
            case events.Phase():
                self._enter(readable(event.phase))
            case events.Progress() if event.total > 0:
                self._take(float(event.done), float(event.total), readable(event.unit))
            case events.EntryCounts():
                self._kernels = sum(event.added.values())
                if self._done is None:
                    self._history.append((self._clock(), float(self._kernels), "kernels"))

    def _enter(self, phase: str) -> None:
        found = _SHAPE.fullmatch(phase)
        self._shape = int(found[1]) if found else 0
        self._phase = "DeepGEMM" if found else phase
        self._done = None
        self._history.clear()

    def _take(self, done: float, total: float, unit: str) -> None:
        if self._done is None or self._done[1:] != (total, unit) or done < self._done[0]:
            self._history.clear()
        self._done = (done, total, unit)
        self._history.append((self._clock(), done, unit))

    # --- read by the drawing thread ---

    @property
    def seconds(self) -> float:
        """Return the seconds since the task began."""
        return self._clock() - self._began

    @property
    def left(self) -> float | None:
        """Return the expected seconds left; None if unknown, 0 if overdue."""
        done = self._done
        if done is not None and done[2] not in self._parts and 0 < done[0] <= done[1]:
            rate = self._rate()
            if rate:
                return (done[1] - done[0]) / rate
        return None if self._expected is None else max(0.0, self._expected - self.seconds)

    def _rate(self) -> float | None:
        """Return units per second over the last half minute; None with too few samples."""
        history = list(self._history)
        now = self._clock()
        recent = [one for one in history if one[0] >= now - _WINDOW]
        if len(recent) < 2:
            recent = history[-2:]
        if len(recent) < 2 or now - recent[0][0] < 1.0 or recent[-1][1] <= recent[0][1]:
            return None
        return (recent[-1][1] - recent[0][1]) / (now - recent[0][0])

    def parts(self) -> list[str]:
        """Return phase, done of total, kernels, rate and time left, as far as known."""
        texts = [self._phase_text()]
        if self._done is not None:
            done, total, unit = self._done
            texts.append(f"{done:.0f}/{total:.0f} {unit}")
        if self._kernels:
            texts.append(f"{self._kernels} kernel{'' if self._kernels == 1 else 's'}")
        rate = self._rate()
        if rate is not None:
            texts.append(f"{rate:.0f}/s" if rate >= 100 else f"{rate:.1f}/s")
        left = self.left
        if left is not None:
            texts.append(f"about {span(left)} left" if left > 0 else "longer than expected")
        return texts

    def _phase_text(self) -> str:
        if not self._shape:
            return self._phase
        return f"{self._phase} {self._shape}/{self._shapes} shapes" if self._shapes else f"{self._phase} {self._shape}"

    def line(self) -> str:
        """Return all parts as one log line."""
        return f"{self.label}: {', '.join([*self.parts(), f'{duration(self.seconds)} so far'])}"
