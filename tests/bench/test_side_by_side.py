"""Eight simulated GPUs: how near a run of tasks whose times are known comes to what no schedule can beat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.cache import layout
from builder.engine.client import Engine
from builder.run.schedule import Capacity, PlannedTask, lower_bound
from tests.bench.measuring import Series, show, write_down
from tests.engine.cli import READY, command
from tests.engine.gpumachine import GpuCli, gpu_image
from tests.stub_nvml.stub import Driver

pytestmark = [pytest.mark.bench, pytest.mark.engine, pytest.mark.timeout(900)]

GPUS = 8
#: (GPUs, seconds), in no good order. Real ones take minutes.
TASKS = (
    *((1, 30), (8, 30), (2, 50), (4, 50), (1, 30), (1, 20), (1, 30), (1, 30)),
    *((4, 100), (2, 50), (1, 20), (8, 40), (1, 30), (1, 30)),
)


@pytest.fixture
def machine(
    tmp_path: Path, docker_host: str, tiny_image: str, driver: Driver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GpuCli]:
    driver.gpus = GPUS
    driver.write()
    with gpu_image(tmp_path_factory.mktemp("image"), docker_host, tiny_image, GPUS) as image:
        (tmp_path / "user").mkdir()
        cli = GpuCli.on(tmp_path / "user", docker_host, image, driver)
        yield cli
        cli.close()


def test_side_by_side_makespan(machine: GpuCli, engine: Engine) -> None:
    """Everything counts: the process, containers, the in-container program, and the waits until GPUs are free again."""
    wait = "import time; time.sleep({0} * float(open('/jit/scale').read()))\n" + READY
    machine.gpus(
        *(command(f"t{number}", wait.format(seconds), gpus=gpus) for number, (gpus, seconds) in enumerate(TASKS))
    )
    layout.prepare(machine.root)
    scale = machine.root / "scale"
    scale.write_text("0.01")
    machine.warm()
    for path in machine.markers():
        marker = json.loads(path.read_text())
        marker["observed"]["seconds"] = float(TASKS[int(marker["label"][1:])][1])
        path.write_text(json.dumps(marker))
    scale.write_text("1")
    ended = machine.run("warm", "--json", "--force", seconds=600)
    assert ended.status == 0, ended.said
    bound = lower_bound([PlannedTask("", gpus, seconds) for gpus, seconds in TASKS], Capacity(tuple(range(GPUS))))
    planned = ended.document["expected"]["seconds"]
    one_by_one = float(sum(seconds for _, seconds in TASKS))
    rows = [
        [f"{len(TASKS)} tasks on {GPUS} simulated GPUs", "seconds", "to the lower bound"],
        ["lower bound: max(longest, GPU-seconds / 8)", f"{bound:.1f}", "1.00"],
        ["planned", f"{planned:.1f}", f"{planned / bound:.2f}"],
        ["warm-cache warm, the whole process", f"{ended.seconds:.1f}", f"{ended.seconds / bound:.2f}"],
        ["one after the other, without any overhead", f"{one_by_one:.1f}", f"{one_by_one / bound:.2f}"],
    ]
    show("Tasks side by side", rows)
    series = [Series("warm", [ended.seconds]), Series("planned", [planned]), Series("bound", [bound])]
    write_down("side_by_side", engine, series, ratio=ended.seconds / bound)
