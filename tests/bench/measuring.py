"""Timing several ways to do one thing in turn, and writing down what came out and under which conditions.

Each round runs every way once, so that whatever else the machine does meets all of them; a ratio is taken between
medians of one and the same run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.engine.client import Engine

ROOT = Path(__file__).resolve().parents[2]
#: Where the JSON documents go.
RESULTS = Path(os.environ.get("WARM_CACHE_BENCH_DIR") or ROOT / ".demo" / "bench")
#: The command-line client that is measured against.
CLI = os.environ.get("DOCKER", "docker")

Way = Callable[[], float | None]


@dataclass
class Series:
    """Seconds of one way, round by round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    remark: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)


def in_turn(rounds: int, ways: Mapping[str, Way], *, warm_up: int = 1) -> dict[str, Series]:
    """Runs every way once per round. A way returns its seconds, or None to be timed from outside."""
    found = {name: Series(name) for name in ways}
    for number in range(-warm_up, rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            own = way()
            seconds = time.perf_counter() - begun if own is None else own
            if number >= 0:
                found[name].seconds.append(seconds)
    return found


def ratio(of: Series, to: Series) -> float:
    return of.median / to.median


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def milliseconds(series: Series) -> list[str]:
    return [series.name, f"{series.median * 1e3:.0f} ms", f"{series.least * 1e3:.0f} ms", series.remark]


def write_down(name: str, engine: Engine | None, series: Sequence[Series], **more: Any) -> Path:
    """The measurement and its conditions, as JSON."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {
        "bench": name,
        "conditions": conditions(engine),
        "series": [
            {"name": one.name, "median": one.median, "min": one.least, "seconds": one.seconds, "remark": one.remark}
            for one in series
        ],
        **more,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"  -> {path}")
    return path


def conditions(engine: Engine | None) -> dict[str, Any]:
    """What a number means nothing without. engine: None where none took part."""
    info = engine.info if engine is not None else {}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(sys.argv),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "kernel": os.uname().release,
        "python": platform.python_version(),
        "docker-py": metadata.version("docker"),
        "requests": metadata.version("requests"),
        "engine": info.get("ServerVersion"),
        "storage": info.get("Driver"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "client": _output(CLI, "--version"),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return "unknown"


def environment(place: Path) -> dict[str, str]:
    """For Python processes that are measured: bytecode is kept, in one place for all of them, as an installation
    has it.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WARM_CACHE_", "GITHUB_"))}
    env["WARM_CACHE_CREATE"] = "1"
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**env, "PYTHONPYCACHEPREFIX": str(place / "bytecode"), "PYTHONPATH": str(ROOT)}


def quietly(command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> str:
    """Runs the command to its good end; its stdout."""
    done: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, env=env, **options)
    assert done.returncode == 0, f"{' '.join(command)[:200]}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
