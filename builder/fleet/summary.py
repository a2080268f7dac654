"""What became of many runs: sums up their JSON reports, with the one exit status that matters most.

A scheduler keeps the highest status of its jobs, so that 17 (nothing was done) would hide 11 (tasks failed).
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder import files
from builder.errors import FIRST_OF_SEVERAL
from builder.files import UnreadableError

#: Bytes of the largest report that is read.
_LARGEST = 64 << 20
#: The highest exit status of a process, and more seconds than any run takes.
_HIGHEST, _LONGEST = 255, 1e9
#: Statuses after a signal's, in the order in which they count.
_ORDER = (*FIRST_OF_SEVERAL, 12, 2, 10, 15, 17, 0)
#: Status of a run that left no report: it was killed, or never began.
_NO_REPORT = 11


@dataclass(frozen=True)
class RunReport:
    """One run. status: None where it left no report. states: number of tasks in each state."""

    name: str
    status: int | None
    verb: str = ""
    image: str = ""
    toolchain: str = ""
    states: Mapping[str, int] = field(default_factory=dict)
    failed: Sequence[str] = ()  # labels of tasks that are not warm
    seconds: float = 0.0
    why: str = ""


def read(path: Path) -> RunReport:
    """Return the report in a file. Raises OSError for a file that cannot be read.

    Whoever runs jobs may have written it: a pipe in its place is not opened, and a number counts if it can be one.
    """
    name = str(path)
    path.stat()
    try:
        raw = files.read_bytes(name, _LARGEST)
        found = files.parsed(raw) if raw.strip() else None
    except UnreadableError as unusable:
        if unusable.refused:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), name) from None
        return RunReport(name, None, why=f"this is no report of warm-cache --json: it {unusable}")
    if not raw.strip():
        return RunReport(name, None, why="the report is empty: the run was killed, or has not ended")
    status = found.get("exit") if isinstance(found, dict) else None
    if not isinstance(found, dict) or type(status) is not int or not 0 <= status <= _HIGHEST:
        return RunReport(name, None, why="this is no report of warm-cache --json")
    tasks = [each for each in _list(found.get("tasks")) if isinstance(each, dict)]
    error, image = found.get("error"), found.get("image")
    return RunReport(
        name=name,
        status=status,
        verb=_text(found.get("verb")),
        image=_text(image.get("ref")) if isinstance(image, dict) else "",
        toolchain=_text(found.get("toolchain")),
        states=dict(Counter(_text(task.get("state")) or "unknown" for task in tasks)),
        failed=[_text(task.get("label")) for task in tasks if task.get("state") not in ("warm", "warmed")],
        seconds=_number(found.get("seconds")),
        why=_text(error.get("message")) if isinstance(error, dict) else "",
    )


def status_of(reports: Sequence[RunReport]) -> int:
    """Return the status that counts most: a signal's, then as one run orders them; 11 for a run without a report."""
    found = [_NO_REPORT if report.status is None else report.status for report in reports]
    return min(found, key=lambda status: (_rank(status), -status), default=0)


def rows(reports: Sequence[RunReport]) -> list[list[str]]:
    """Return the rows of a table: report, status, states of tasks, seconds, and why."""
    return [
        [
            report.name,
            "–" if report.status is None else str(report.status),
            ", ".join(f"{number} {state}" for state, number in sorted(report.states.items())) or "–",
            f"{report.seconds:.0f} s",
            report.why or signal_name(report.status),
        ]
        for report in reports
    ]


def signal_name(status: int | None) -> str:
    """Return the signal that ended a run, by its status; "" for none."""
    if status is None or status <= 128:
        return ""
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return ""


def _rank(status: int) -> int:
    if status > 128:
        return -1
    return _ORDER.index(status) if status in _ORDER else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < _LONGEST else 0.0
