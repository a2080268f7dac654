"""How many entries there are, while a child makes them: for people, so names are counted and nothing is judged."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from builder.agent.output import Output
from builder.cache.families import FAMILY
from builder.events import EntryCounts

SECONDS = 5.0  # between two `entries` events
LIMIT = 50_000  # files of one family; a number for people need not be larger


class Counter:
    """Emits an `entries` event now and then, when there is more than the last time. directories: by family."""

    def __init__(self, output: Output, directories: Mapping[str, Path], seconds: float = SECONDS) -> None:
        self._output, self._directories, self._seconds = output, directories, seconds
        self._first = self._said = self._counts()
        self._counted = time.monotonic()

    def tick(self) -> None:
        """To be called often."""
        if time.monotonic() - self._counted < self._seconds:
            return
        counts = self._counts()
        self._counted = time.monotonic()
        if any(count > self._said[name] for name, count in counts.items()):
            self._said = counts
            added = {name: max(0, count - self._first[name]) for name, count in counts.items()}
            self._output.event(EntryCounts(counts, added))

    def _counts(self) -> dict[str, int]:
        return {name: _count(FAMILY[name].layout, directory) for name, directory in self._directories.items()}


def _count(layout: str, directory: Path) -> int:
    if layout == "files":
        total = 0
        for _, _, files in os.walk(directory):
            total += len(files)
            if total > LIMIT:
                break
        return total
    try:
        return sum(1 for _ in (directory / "cache" if layout == "deep_gemm" else directory).iterdir())
    except OSError:
        return 0
