"""What a prebuild gains: the same three tasks, whose shapes overlap, from an empty cache in three ways.

upstream: each task alone, one kernel after the other, as the scripts do that this program replaces. tasks: the tasks
with a worker for each core. prebuild: the stage before them, and then the tasks, which hit. The stage is compared with
floor 1 (nvcc's CPU seconds divided by the cores, and one import), and the tasks after it with those on a warm cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine
from tests.bench.measuring import ROOT, Series, quietly, show, write_down

pytestmark = [pytest.mark.bench, pytest.mark.stand_in, pytest.mark.timeout(3600)]

CORES = len(os.sched_getaffinity(0))
AIM = 1.1
#: Of each task: dense and grouped shapes, some of them another task's too.
DENSE, OTHER = "GEMM_NT_F8F8BF16 N=2112, K=7168, num_groups=1", "GEMM_NT_F8F8BF16 N=3072, K=1536, num_groups=1"
GROUPED = "GROUPED_GEMM_NT_F8F8BF16_{} N=512, K=7168, num_groups=8"
TASKS = {
    "one": [DENSE, GROUPED.format("CONTIG")],
    "two": [DENSE, OTHER],
    "three": [OTHER, GROUPED.format("MASKED")],
}
M_VALUES = [16, 64, 128, 256, 1024]


@dataclass
class Run:
    """One invocation: its wall time, its document, and the kernels that are there after it."""

    seconds: float
    document: dict[str, Any]
    kernels: set[str]

    @property
    def tasks(self) -> float:
        return float(sum(task["seconds"] for task in self.document["tasks"]))


class Way:
    """One cache root, and how it is filled."""

    def __init__(self, place: Path, image: str, *, workers: int, prebuild: bool) -> None:
        place.mkdir()
        self._place = place
        head = f'schema = 1\n[image]\nref = "{image}"\n[cache]\nroot = "{place}/cache"\n[gpus]\npretend = "H200"\n'
        head += f'[container]\nnetwork = "none"\nshm_size = "1g"\n[prebuild]\nenabled = {str(prebuild).lower()}\n'
        tasks = [
            f'[[task]]\nmodel = "bench/{name}"\nrecipe = "shapes"\nworkers = {workers}\nm_values = {M_VALUES}\n'
            f"shapes = {json.dumps(shapes)}\n"
            for name, shapes in TASKS.items()
        ]
        (place / "manifest.toml").write_text(head + "".join(tasks))

    def warm(self, *options: str) -> Run:
        command = [sys.executable, "-m", "builder", "warm", "--json", *options]
        command += ["--manifest", str(self._place / "manifest.toml"), "--log-dir", str(self._place / "logs")]
        begun = time.perf_counter()
        document = json.loads(quietly(command, cwd=ROOT))
        seconds = time.perf_counter() - begun
        return Run(
            seconds, document, {path.parent.name for path in self._place.glob("cache/deep_gemm/*/cache/*/.committed")}
        )


def test_prebuild_against_tasks_alone(tmp_path: Path, engine: Engine, stand_in_image: str) -> None:
    ways = {
        "upstream's order": Way(tmp_path / "upstream", stand_in_image, workers=1, prebuild=False),
        f"tasks, {CORES} workers": Way(tmp_path / "tasks", stand_in_image, workers=CORES, prebuild=False),
        "prebuild, then tasks": Way(tmp_path / "prebuild", stand_in_image, workers=1, prebuild=True),
    }
    runs = {name: way.warm() for name, way in ways.items()}
    upstream, _, built = runs.values()
    assert all(run.kernels == upstream.kernels for run in runs.values())
    stage = built.document["prebuild"]
    assert stage["gpu_kernels"] == 0
    warm = ways["prebuild, then tasks"].warm("--force")
    floor = stage["cpu_seconds"] / CORES + stage["import_seconds"]
    ratios = {
        "stage to floor 1": stage["seconds"] / floor,
        "tasks after it to tasks on a warm cache": built.tasks / warm.tasks,
    }
    rows = [
        ["", "wall", "tasks"],
        *([name, f"{run.seconds:.1f} s", f"{run.tasks:.1f} s"] for name, run in runs.items()),
    ]
    show("prebuild", rows)
    show("ratios", [["", "", ""], *([name, f"{value:.2f}", f"aim {AIM}"] for name, value in ratios.items())])
    series = [Series(name, [run.seconds], f"load {os.getloadavg()[0]:.1f}") for name, run in runs.items()]
    write_down("prebuild", engine, series, ratios=ratios, stage=stage, kernels=len(upstream.kernels), m_values=M_VALUES)
