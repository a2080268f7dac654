"""How long tasks will take, learned from the markers of earlier runs; of the nearest one where this very task has none.

A marker says how long its container was at work (``observed.seconds``). The same task under the same toolchain tells
most, then the same task under another one, then the same launch of the same model under another sglang. All these are
good enough to not start what would not end in time. What other tasks of the recipe took is a guess, and a task's
time-out is only what it cannot exceed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.cache import marker_files, toolchain
from builder.cache.coverage import coverage
from builder.run.plan import Item

#: What makes two tasks the same launch, whatever the versions around it are (names of coverage factors).
LAUNCH = ("model", "argv", "env", "recipe", "gpus", "load", "layers", "shapes", "m_values", "requests")

#: The source of an estimate that only says what cannot be exceeded.
TIME_OUT = "its time-out"


@dataclass(frozen=True)
class Estimate:
    """seconds: how long a task is expected to take. sure: learned from the task itself. source: for people."""

    seconds: float
    sure: bool
    source: str


@dataclass(frozen=True)
class _Seen:
    """One marker, as far as it tells about time."""

    folder: str
    written: float
    seconds: float
    toolchain: str
    recipe: str
    launch: str


def learn(root: Path, items: Iterable[Item]) -> dict[str, Estimate]:
    """An estimate for each of these tasks, by label. Reads every marker below ``root``; never raises for what it
    finds.
    """
    seen = sorted(_seen(root), key=lambda one: one.written, reverse=True)
    return {item.task.label: _estimate(item, seen) for item in items}


def _estimate(item: Item, seen: Sequence[_Seen]) -> Estimate:
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


def _seen(root: Path) -> Iterable[_Seen]:
    for found in marker_files.every(root):
        marker = found.marker
        if marker is not None and (seconds := marker.observed.seconds):
            yield _Seen(
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
    except RecursionError:  # somebody's nesting
        return ""
