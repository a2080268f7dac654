"""Progress for people, as throttled events: phases and progress that a log shows, and the number of entries."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

from builder.agent.log_watch import Watch
from builder.agent.output import Output
from builder.beneath import Tree
from builder.cache.families import FAMILY
from builder.events import EntryCounts, Phase, Progress

LOG_SECONDS = 1.0  # between two `Phase` or two `Progress` events
ENTRIES_SECONDS = 5.0  # between two `EntryCounts` events
MOST_FILES = 50_000  # and directories of one family that are looked at; the number is for people


class LogProgress:
    """Writes `Phase` and `Progress` events for what a log shows: at most one of each a second, the last one always."""

    def __init__(self, output: Output, watch: Watch) -> None:
        self._output, self._watch = output, watch
        self._phase, self._done, self._crash_shown = watch.phase, watch.done, False
        self._phase_time = self._done_time = 0.0

    def tick(self, now: float) -> None:
        """Write what is due. Call it often."""
        watch = self._watch
        if watch.crash and not self._crash_shown:
            self._crash_shown = True
            self._output.event(Phase(f"crashed: {watch.crash.name}"))
        if watch.phase != self._phase and now - self._phase_time >= LOG_SECONDS:
            self._phase, self._phase_time = watch.phase, now
            self._output.event(Phase(watch.phase))
        done = watch.done
        if done is not None and done != self._done and now - self._done_time >= LOG_SECONDS:
            self._done, self._done_time = done, now
            self._output.event(Progress(*done))

    def finish(self) -> None:
        """Write what was held back."""
        self._phase_time = self._done_time = 0.0
        self.tick(time.monotonic() + LOG_SECONDS)


class EntryProgress:
    """Writes an `EntryCounts` event when a family has more entries than in the last one. Names are counted, not read.

    directories: by family.
    """

    def __init__(self, output: Output, directories: Mapping[str, Tree], seconds: float = ENTRIES_SECONDS) -> None:
        self._output, self._directories, self._seconds = output, directories, seconds
        self._first = self._reported = self._counts()
        self._counted = time.monotonic()

    def tick(self) -> None:
        """Write an event if one is due. Call it often."""
        if time.monotonic() - self._counted < self._seconds:
            return
        counts = self._counts()
        self._counted = time.monotonic()
        if any(count > self._reported[name] for name, count in counts.items()):
            self._reported = counts
            added = {name: max(0, count - self._first[name]) for name, count in counts.items()}
            self._output.event(EntryCounts(counts, added))

    def _counts(self) -> dict[str, int]:
        return {name: _count(FAMILY[name].layout, directory) for name, directory in self._directories.items()}


def _count(layout: str, directory: Tree) -> int:
    with directory:
        if layout == "files":
            seen = itertools.islice(directory.walk(), MOST_FILES)
            return sum(1 for _, item in seen if item is not None and not item.is_dir)
        return len(directory.some("cache" if layout == "deep_gemm" else "", MOST_FILES) or ())
