"""Whether the next warm-up fits the disk, learned from markers of earlier ones, before it takes its 40 minutes.

A marker says how many bytes its entries have, and what its run added to families that it does not vouch for. A cold
task whose family keys are new needs all of that again; under the same keys it finds what is there. What tasks share is
counted once, in the proportion in which their markers list the same entries.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.cache import marker_files, survey, toolchain
from builder.errors import CANNOT_RUN, PreflightError, Problem
from builder.run.container_executor import ContainerExecutor
from builder.run.plan import Item
from builder.text import size


@dataclass(frozen=True)
class Forecast:
    """bytes: that the cold tasks are expected to add. known: of how many tasks an earlier run tells; of: how many."""

    bytes: int
    known: int
    of: int


def learn(root: Path, items: Iterable[Item]) -> Forecast:
    """What these cold tasks will add. Never raises for what lies in the root."""
    claimed: dict[tuple[str, str], list[tuple[int, frozenset[str]]]] = {}
    beside, known, number = 0, 0, 0
    for item in items:
        number += 1
        marker = _nearest(root, item)
        if marker is None:
            continue
        known += 1
        keys, observed = toolchain.family_keys(item.record), marker.observed
        for family, claim in marker.claims.items():
            if claim.key != keys.get(family) or not (root / family / claim.key).is_dir():
                took = (observed.bytes or {}).get(family, 0)
                claimed.setdefault((family, claim.key), []).append((took, frozenset(claim.entries)))
        if marker.toolchain != toolchain.digest(keys):
            beside += sum(added for family, added in observed.added_bytes.items() if family not in marker.claims)
    return Forecast(beside + sum(map(_shared, claimed.values())), known, number)


def _nearest(root: Path, item: Item) -> marker_files.Marker | None:
    """The task's newest marker that says how much it took."""
    found = sorted(marker_files.neighbours(root, item.task.label), key=lambda one: one.written, reverse=True)
    return next((one.marker for one in found if one.marker and one.marker.observed.bytes is not None), None)


def _shared(lists: Sequence[tuple[int, frozenset[str]]]) -> int:
    listed = sum(len(names) for _, names in lists)
    distinct = len(frozenset().union(*(names for _, names in lists)))
    return round(sum(count for count, _ in lists) * distinct / listed) if listed else 0


def refuse(executor: ContainerExecutor, items: Sequence[Item]) -> None:
    """Raises PreflightError where the cold tasks among these will not fit. Where the root cannot be read from here,
    nobody can tell.
    """
    root = executor.cache.direct()
    if root is None:
        return
    cold = [item for item in items if not item.warm]
    problems = list(problems_of(root, executor.context.manifest.cache.max_size, learn(root, cold)))
    if problems:
        raise PreflightError(CANNOT_RUN, problems)


def problems_of(root: Path, max_size: int | None, expected: Forecast) -> Iterable[Problem]:
    need = expected.bytes
    if not need:
        return
    free = shutil.disk_usage(root).free
    took = f"what this warm-up will add took {size(need)} last time"
    if free < need:
        held = survey.survey(root).bytes
        yield Problem("disk", f"{root} has {size(free)} free, and {took}.", _remedy(held - (need - free), "Free space"))
    elif max_size is not None:
        held = survey.survey(root).bytes
        if held + need > max_size:
            text = f"{root} has {size(held)} of the {size(max_size)} that [cache] max_size allows, and {took}."
            yield Problem("disk", text, _remedy(max_size - need, "Raise it"))


def _remedy(target: int, otherwise: str) -> str:
    if target <= 0:
        return f"{otherwise}: pruning alone will not do."
    shown = f"{target >> 30}G" if target >= 1 << 30 else f"{max(1, target >> 20)}M"
    return f"{otherwise}, or run: warm-cache prune --max-size {shown}"


def room(root: Path, items: Iterable[Item], max_size: int | None) -> int | None:
    """How large the root may be so that these tasks fit afterwards; None where it is small enough already."""
    need = learn(root, items).bytes
    if not need:
        return None
    held, free = survey.survey(root).bytes, shutil.disk_usage(root).free
    limits: Mapping[str, int] = {
        "disk": held - (need - free),
        **({"max_size": max_size - need} if max_size is not None else {}),
    }
    target = min(limits.values())
    return max(1, target) if target < held else None
