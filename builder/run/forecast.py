"""Seconds and bytes that the next warm-up will take, learned from the markers of earlier ones.

Time: a marker holds how long its container worked (``observed.seconds``). The marker of the same task under the same
toolchain is the best source, then the same task under another toolchain, then the same launch of the same model under
another sglang. These are good enough not to start what would not end in time. The median of other tasks of the recipe
is a guess, and a task's time-out is only an upper bound.

Space: a marker holds the bytes of its entries, and what its run added to families that it does not claim. A cold task
whose family keys are new needs all of that again; under the same keys its entries exist already. What tasks share is
counted once, in the proportion in which their markers list the same entries.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cache import marker_files, marker_format, survey, toolchain
from builder.cache.coverage import coverage
from builder.errors import CANNOT_RUN, PreflightError, Problem
from builder.run.plan import Item
from builder.text import size

if TYPE_CHECKING:
    from builder.run.executor import Executor

#: What makes two tasks the same launch, whatever the versions around it are (names of coverage factors).
LAUNCH = ("model", "argv", "env", "recipe", "gpus", "load", "layers", "shapes", "m_values", "requests")

#: The source of an estimate that is an upper bound only.
TIME_OUT = "its time-out"


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """How long a task is expected to take."""

    seconds: float
    sure: bool  # learned from the task itself
    source: str  # for people


@dataclass(frozen=True)
class _Timed:
    """What one marker holds about time."""

    folder: str
    written: float
    seconds: float
    toolchain: str
    recipe: str
    launch: str


def expected_seconds(root: Path, items: Iterable[Item]) -> dict[str, Estimate]:
    """Return an estimate for each task, by label. Reads every marker; never raises for what the root holds."""
    seen = sorted(_timed(root), key=lambda one: one.written, reverse=True)
    return {item.task.label: _estimate(item, seen) for item in items}


def _estimate(item: Item, seen: Sequence[_Timed]) -> Estimate:
    suffix = f"-{item.key}"
    launch = _launch(coverage(item.task, record=item.record, config_digest=item.config_digest))
    now = toolchain.digest(toolchain.family_keys(item.record))
    same = [one for one in seen if one.folder.endswith(suffix)]
    nearest = [
        ("the same task", [one for one in same if one.toolchain == now]),
        ("the same task, under another toolchain", same),
        ("the same launch, of another version", [one for one in seen if one.launch == launch]),
    ]
    for source, found in nearest:
        if found:
            return Estimate(found[0].seconds, True, source)
    others = [one.seconds for one in seen if one.recipe == item.task.recipe]
    if others:
        seconds = min(statistics.median(others), item.task.timeout)
        return Estimate(seconds, False, f"other tasks of the recipe {item.task.recipe}")
    return Estimate(item.task.timeout, False, TIME_OUT)


def _timed(root: Path) -> Iterable[_Timed]:
    for found in marker_files.every(root):
        marker = found.marker
        if marker is not None and (seconds := marker.observed.seconds):
            yield _Timed(
                found.folder,
                found.written,
                seconds,
                str(marker.toolchain),
                str(marker.coverage.get("recipe")),
                _launch(marker.coverage),
            )


def _launch(factors: Mapping[str, Any]) -> str:
    try:
        return json.dumps([factors.get(name) for name in LAUNCH], sort_keys=True)
    except RecursionError:  # JSON of any depth
        return ""


# --- space -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """Bytes that cold tasks are expected to add."""

    bytes: int
    known: int  # tasks with a marker of an earlier run
    of: int  # all tasks


def expected_space(root: Path, items: Iterable[Item]) -> Space:
    """Return what these cold tasks will add. Never raises for what the root holds."""
    claimed: dict[tuple[str, str], list[tuple[int, frozenset[str]]]] = {}
    unclaimed, known, number = 0, 0, 0
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
            unclaimed += sum(added for family, added in observed.added_bytes.items() if family not in marker.claims)
    return Space(unclaimed + sum(map(_shared, claimed.values())), known, number)


def _nearest(root: Path, item: Item) -> marker_format.Marker | None:
    """Return the task's newest marker that holds its bytes."""
    found = sorted(marker_files.neighbours(root, item.task.label), key=lambda one: one.written, reverse=True)
    return next((one.marker for one in found if one.marker and one.marker.observed.bytes is not None), None)


def _shared(lists: Sequence[tuple[int, frozenset[str]]]) -> int:
    listed = sum(len(names) for _, names in lists)
    distinct = len(frozenset().union(*(names for _, names in lists)))
    return round(sum(count for count, _ in lists) * distinct / listed) if listed else 0


def require_space(executor: Executor, items: Sequence[Item]) -> None:
    """Raise PreflightError where the cold tasks will not fit. A root that cannot be read from here is not checked."""
    root = executor.direct_root()
    if root is None:
        return
    cold = [item for item in items if not item.warm]
    problems = list(space_problems(root, executor.context.manifest.cache.max_size, expected_space(root, cold)))
    if problems:
        raise PreflightError(CANNOT_RUN, problems)


def space_problems(root: Path, max_size: int | None, expected: Space) -> Iterable[Problem]:
    """Yield a problem where the disk, or ``[cache] max_size``, is too small; with the prune that would help."""
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


def target_size(root: Path, items: Iterable[Item], max_size: int | None) -> int | None:
    """Return the bytes that the root may have before these tasks, so that they fit; None where they fit already."""
    need = expected_space(root, items).bytes
    if not need:
        return None
    held, free = survey.survey(root).bytes, shutil.disk_usage(root).free
    limits: Mapping[str, int] = {
        "disk": held - (need - free),
        **({"max_size": max_size - need} if max_size is not None else {}),
    }
    target = min(limits.values())
    return max(1, target) if target < held else None
