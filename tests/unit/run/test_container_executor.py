"""What is judged before a container is started: the GPUs of this machine, each time, and the cache root."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from builder.cache import layout, memos, toolchain
from builder.cache.toolchain import Record
from builder.engine.api import Image
from builder.engine.client import Engine
from builder.errors import ColdError, PreflightError
from builder.host import gpus
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.host.gpus import HostGpus
from builder.manifest.load import load
from builder.report.console import Console
from builder.report.results import Report
from builder.run import container_job, maintenance
from builder.run.container_executor import ContainerExecutor
from builder.run.context import Context, Options
from builder.run.executor import Execution
from builder.run.plan import probe_env
from tests.generations import image, record

MANIFEST = """
schema = 1
[image]
ref = "tiny:1"
[cache]
root = "{root}"
[gpus]
count = 2
name = "H200"
[[task]]
model = "a"
recipe = "command"
argv = ["true"]
success = "x"
"""


class KnownImage:
    """An engine on this machine that has the image, and starts nothing."""

    local, podman = True, False
    info: Mapping[str, Any] = {}

    def image(self, ref: str) -> Image:
        return Image(id=image(1), ref=ref)

    def has_volume(self, _name: str) -> bool:
        return False


class Machine:
    """A cache root whose memo says which GPUs a probe's container got."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = place / "cache"
        self.host: HostGpus | None = None
        self.probes = 0
        self._names: tuple[str, ...] = ()
        self._place = place
        monkeypatch.setattr(gpus, "host_gpus", lambda: self.host)
        monkeypatch.setattr(ContainerExecutor, "probe", self._probe)

    def has(self, *names: str) -> None:
        """Lay out the root, with the memo of a probe that got these GPUs."""
        self._names = names
        layout.prepare(self.root)
        executor = self.executor()
        for task in executor.context.manifest.tasks:
            memos.write_memo(self.root, executor.serving_names, self._record(), env=dict(probe_env(task)))

    def executor(self, **options: Any) -> ContainerExecutor:
        path = self._place / "manifest.toml"
        path.write_text(MANIFEST.format(root=self.root))
        context = Context(
            manifest=load(path),
            options=Options(log_dir=self._place, state_dir=self._place, environ={}, **options),
            console=Console(io.StringIO(), terminal=False),
            report=Report("check"),
            cancel=Cancel(),
            budget=Deadline(None),
            run_id="r",
        )
        return ContainerExecutor(context, cast(Engine, KnownImage()))

    def records(self) -> Any:
        executor = self.executor()
        return executor.records(executor.context.manifest.tasks)

    def _record(self) -> Record:
        seen = [{"name": name, "uuid": f"GPU-{index}"} for index, name in enumerate(self._names)]
        return cast(Record, {**record(1, isa=str(toolchain.isa())), "gpus": seen})

    def _probe(self, _env: object) -> Record:
        self.probes += 1
        raise PreflightError("the probe was refused")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_records_of_memo_with_right_gpus_start_nothing(machine: Machine) -> None:
    machine.has("NVIDIA H200", "NVIDIA H200")
    assert machine.records()
    assert machine.probes == 0


@pytest.mark.parametrize("names", [(), ("NVIDIA H200",), ("NVIDIA H100", "NVIDIA H100")])
def test_records_of_refused_probe_are_probed_again(machine: Machine, names: tuple[str, ...]) -> None:
    machine.has(*names)
    for attempt in (1, 2, 3):
        with pytest.raises(PreflightError):
            machine.records()
        assert machine.probes == attempt
    executor = machine.executor()
    assert not executor.remembers(executor.context.manifest.tasks)


@pytest.mark.parametrize("host", [("NVIDIA H200",), ("NVIDIA H100", "NVIDIA H100")])
def test_records_are_refused_when_this_host_has_other_gpus(machine: Machine, host: tuple[str, ...]) -> None:
    machine.has("NVIDIA H200", "NVIDIA H200")
    machine.host = HostGpus(host, "580")
    with pytest.raises(PreflightError) as caught:
        machine.records()
    assert [problem.location for problem in caught.value.problems] == ["GPUs"]
    assert machine.probes == 0


def test_require_root_asks_for_create_and_names_near_match(machine: Machine) -> None:
    (machine.root.parent / "caches").mkdir()
    with pytest.raises(PreflightError) as caught:
        machine.executor(creates=True).require_root()
    (problem,) = [each for each in caught.value.problems if each.location == "cache"]
    assert problem.text == f"there is no cache at {machine.root}; did you mean 'caches'?"
    assert problem.remedy == "To make a new one there, pass --create."
    assert not machine.root.exists()


def test_require_root_of_verb_that_reads_says_that_there_is_none(machine: Machine) -> None:
    with pytest.raises(PreflightError) as caught:
        machine.executor().require_root()
    assert caught.value.message == f"there is no cache at {machine.root}"


def test_require_root_accepts_empty_directory_and_create(machine: Machine) -> None:
    machine.executor(creates=True, create=True).require_root()
    machine.root.mkdir()
    for creates in (True, False):
        machine.executor(creates=creates).require_root()


def test_require_root_refuses_file(machine: Machine) -> None:
    machine.root.write_text("")
    with pytest.raises(PreflightError) as caught:
        machine.executor(creates=True).require_root()
    assert f"{machine.root} is not a directory." in [problem.text for problem in caught.value.problems]


def test_maintenance_finds_no_root_in_empty_directory_and_refuses_one_of_something_else(machine: Machine) -> None:
    machine.root.mkdir()
    assert not maintenance.has_root(machine.executor())
    (machine.root / "notes.txt").write_text("")
    with pytest.raises(PreflightError) as caught:
        maintenance.has_root(machine.executor())
    (problem,) = caught.value.problems
    assert problem.text == f"{machine.root} is no cache root, and not empty (notes.txt is in it)."


def test_require_root_refuses_volume_that_does_not_exist(machine: Machine) -> None:
    executor = machine.executor()
    cache = replace(executor.context.manifest.cache, root=None, volume="jit")
    executor.context = replace(executor.context, manifest=replace(executor.context.manifest, cache=cache))
    with pytest.raises(PreflightError) as caught:
        executor.require_root()
    assert caught.value.message == "there is no volume jit"


def test_no_probe_builds_nothing_also_where_the_memo_goes_meanwhile(machine: Machine) -> None:
    machine.has("NVIDIA H200", "NVIDIA H200")
    executor = machine.executor(probes=False)
    assert list(executor.unknown(executor.context.manifest.tasks)) == []
    with pytest.raises(ColdError, match="--no-probe builds and starts nothing"):
        _ = executor.warmup


def test_record_of_unseen_gpus_is_that_of_the_task_that_ran(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root was last written to on another machine, whose GPUs stand for those here until a task has run."""
    machine.has("NVIDIA H200", "NVIDIA H200")
    executor = machine.executor()
    tasks = executor.context.manifest.tasks
    task = tasks[0]
    before = dict(executor.records(tasks))

    def run_task(*_: object) -> Execution:
        machine.has("NVIDIA H200 NVL", "NVIDIA H200 NVL")
        return cast(Execution, SimpleNamespace(succeeded=True))

    monkeypatch.setattr(container_job, "run_task", run_task)
    executor.execute(executor.plan(tasks).items[0], cast(Any, None), cast(Any, None))
    now = executor.records(tasks)[probe_env(task)]["factors"]
    assert (before[probe_env(task)]["factors"]["gpu_name"], now["gpu_name"]) == ("NVIDIA H200", "NVIDIA H200 NVL")
