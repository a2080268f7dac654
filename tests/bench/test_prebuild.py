"""What a prebuild gains: the same three tasks, whose shapes overlap, from an empty cache in three ways.

upstream's order: each task alone by one worker, one kernel after the other, without a proof, as the scripts do that
this program replaces. tasks: the tasks with a worker for each core, and their second pass. prebuild: the stage before
them, and then the tasks, which hit. The stage is compared with floor 1 (nvcc's CPU seconds divided by the cores, and
one import), and the tasks after it with those on a warm cache.

CPU seconds are those of the containers, by their control groups as a thread sees them while they run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine
from tests.bench.measuring import CLI, ROOT, Series, quietly, show, write_down
from tests.bench.model import Stage

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
SHAPES = {shape for shapes in TASKS.values() for shape in shapes}
M_VALUES = [16, 64, 128, 256, 512, 1024, 2048, 4096]


@dataclass
class Cpu:
    """CPU seconds of containers of one engine, by container."""

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def look(self) -> None:
        for container in quietly([CLI, "ps", "-q", "--no-trunc"]).split():
            with suppress(OSError, ValueError):
                used = Path(f"/sys/fs/cgroup/cpuacct/docker/{container}/cpuacct.usage").read_text(encoding="ascii")
                self.seconds[container] = int(used) / 1e9
            with suppress(OSError, ValueError, IndexError):
                stat = Path(f"/sys/fs/cgroup/system.slice/docker-{container}.scope/cpu.stat")
                self.seconds[container] = int(stat.read_text(encoding="ascii").split()[1]) / 1e6


@contextmanager
def cpu_of_containers() -> Iterator[Cpu]:
    """Looks at them until the context ends: what one used after the last look, a third of a second before its end at
    most, is missing.
    """
    found, over = Cpu(), threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            found.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@dataclass
class Run:
    """One invocation: its wall time, the CPU time of its containers, its document, and the kernels after it."""

    seconds: float
    cpu: float
    document: dict[str, Any]
    kernels: set[str]
    load: float

    @property
    def tasks(self) -> float:
        return float(sum(task["seconds"] for task in self.document["tasks"]))


class Way:
    """One cache root, and how it is filled."""

    def __init__(
        self, place: Path, image: str, *, workers: int, prebuild: int | None = None, verify: str = "second-pass"
    ) -> None:
        place.mkdir()
        self._place = place
        head = f'schema = 1\n[image]\nref = "{image}"\n[cache]\nroot = "{place}/cache"\n[gpus]\npretend = "H200"\n'
        head += f'[container]\nnetwork = "none"\nshm_size = "1g"\n[prebuild]\nenabled = {str(bool(prebuild)).lower()}\n'
        head += f"workers = {prebuild}\n" if prebuild else ""
        tasks = [
            f'[[task]]\nmodel = "bench/{name}"\nrecipe = "shapes"\nworkers = {workers}\nm_values = {M_VALUES}\n'
            f'verify = "{verify}"\nshapes = {json.dumps(shapes)}\n'
            for name, shapes in TASKS.items()
        ]
        (place / "manifest.toml").write_text(head + "".join(tasks))

    def warm(self, *options: str) -> Run:
        command = [sys.executable, "-m", "builder", "warm", "--json", *options]
        command += ["--manifest", str(self._place / "manifest.toml"), "--log-dir", str(self._place / "logs")]
        with cpu_of_containers() as cpu:
            begun = time.perf_counter()
            document = json.loads(quietly(command, cwd=ROOT))
            seconds = time.perf_counter() - begun
        kernels = {path.parent.name for path in self._place.glob("cache/deep_gemm/*/cache/*/.committed")}
        return Run(seconds, cpu.total, document, kernels, os.getloadavg()[0])


@pytest.fixture(scope="module")
def image_is_ready(stand_in_image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The warm-up image is built, and the image's files are in the page cache."""
    quietly([CLI, "run", "--rm", "--network", "none", "--entrypoint", "python3", stand_in_image, "-c", "import torch"])
    return stand_in_image


def test_prebuild_against_tasks_alone(tmp_path: Path, engine: Engine, image_is_ready: str) -> None:
    image = image_is_ready
    ways = {
        "upstream's order": Way(tmp_path / "upstream", image, workers=1, verify="inventory"),
        f"tasks, {CORES} workers": Way(tmp_path / "tasks", image, workers=CORES),
        "prebuild, then tasks": Way(tmp_path / "prebuild", image, workers=1, prebuild=CORES),
    }
    runs = {name: way.warm() for name, way in ways.items()}
    upstream, _, built = runs.values()
    assert all(run.kernels == upstream.kernels for run in runs.values())
    stage = built.document["prebuild"]
    assert stage["gpu_kernels"] == 0
    runs["tasks on a warm cache"] = warm = ways["prebuild, then tasks"].warm("--force")
    one = Way(tmp_path / "one", image, workers=1, prebuild=1).warm("--prebuild-only").document["prebuild"]
    floor = stage["cpu_seconds"] / CORES + stage["import_seconds"]
    ratios = {
        "stage to floor 1": stage["seconds"] / floor,
        "tasks after it to tasks on a warm cache": built.tasks / warm.tasks,
        "prebuild, then tasks, to upstream's order": built.seconds / upstream.seconds,
    }
    rows = [
        ["", "wall", "CPU", "tasks", "load"],
        *(
            [name, f"{run.seconds:.1f} s", f"{run.cpu:.1f} s", f"{run.tasks:.1f} s", f"{run.load:.1f}"]
            for name, run in runs.items()
        ),
    ]
    show(f"prebuild: {len(upstream.kernels)} kernels, {CORES} cores", rows)
    show(
        "the stage",
        [
            ["", ""],
            ["wall", f"{stage['seconds']:.1f} s"],
            ["compilers and their workers, CPU", f"{stage['cpu_seconds']:.1f} s by {stage['workers']} workers"],
            ["an import", f"{stage['import_seconds']:.1f} s"],
            ["floor 1", f"{floor:.1f} s"],
        ],
    )
    show("ratios", [["", "", ""], *([name, f"{value:.2f}", f"aim {AIM}"] for name, value in ratios.items())])
    paper = [["", "the model", "measured"]]
    for found, cores in ((one, 1), (stage, CORES)):
        model = Stage(found["made"], found["cpu_seconds"], len(SHAPES), import_seconds=found["import_seconds"])
        paper.append([f"{cores} workers", f"{model.seconds(cores):.1f} s", f"{found['seconds']:.1f} s"])
    show("the stage on paper (tests/bench/model.py)", paper)
    series = [Series(name, [run.seconds], f"CPU {run.cpu:.1f} s, load {run.load:.1f}") for name, run in runs.items()]
    write_down(
        "prebuild",
        engine,
        series,
        ratios=ratios,
        stage=stage,
        kernels=len(upstream.kernels),
        m_values=M_VALUES,
        paper=paper,
    )
