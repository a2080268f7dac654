"""Since when removals are kept waiting, by a hold or by files that jobs touch.

Jobs may delay a removal by `job_max` in all: whatever ran when it was first refused has ended by then, and what was
started since then knew better. So the time of the first refusal is kept in the root, where no job can write, until the
removal is done or is not wanted any more.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builder.beneath import Tree
from builder.files import UnreadableError

FILE = "aside/blocked.json"
#: Among names of family directories: the hold on the whole root, and a root that is above its limit.
HOLD, SIZE = "hold", "size"

_LIMIT = 1 << 20


@dataclass(frozen=True)
class Waits:
    """since: name → seconds since the epoch of the first refusal. now, job_max: as in `retention.plan`."""

    since: Mapping[str, float]
    now: float
    job_max: float

    def is_over(self, name: str) -> bool:
        """Return whether a removal that this name stands for has waited for long enough."""
        return name in self.since and self.now - self.since[name] >= self.job_max

    def still(self, names: Iterable[str]) -> dict[str, float]:
        """Return the record after a prune in which these were refused."""
        return {name: min(self.since.get(name, self.now), self.now) for name in sorted(set(names))}

    def seconds(self, names: Iterable[str]) -> float:
        """Return how long the one of these that has waited longest has waited."""
        return max((self.now - first for first in self.still(names).values()), default=0.0)


def read(root: Path, *, now: float, job_max: float) -> Waits:
    """Return what the root's record has. A damaged one counts as none."""
    try:
        with Tree(root) as tree:
            found = tree.read_json(FILE, _LIMIT)
    except (UnreadableError, OSError):
        found = None
    rows = found.items() if isinstance(found, dict) else ()
    return Waits(
        {name: float(at) for name, at in rows if isinstance(at, (int, float)) and 0 <= at < 1e12}, now, job_max
    )


def write(root: Path, since: Mapping[str, float]) -> None:
    """Replace the record. Never raises OSError: the next prune tries again."""
    with contextlib.suppress(OSError), Tree(root) as tree:
        if since or tree.exists(FILE):
            tree.write_atomically(FILE, json.dumps(dict(since)).encode())
