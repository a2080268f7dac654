"""The executor of --here: one probe for each environment, and the GPUs that are here."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.cache import marker_writing
from builder.cache.marker_format import Observed
from builder.cache.toolchain import Record
from builder.errors import PreflightError
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.manifest.load import without_tasks
from builder.manifest.sections import GpusSpec, RunSpec
from builder.report.console import Console
from builder.report.results import Report
from builder.run import local_job
from builder.run.context import Context, Options
from builder.run.local_executor import LocalExecutor
from builder.task import Task
from tests.generations import image, record

PROBED = list[dict[str, str]]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> PROBED:
    """The task environments that were probed. The record has the GPUs of the variable GPUS of the environment."""
    seen: PROBED = []

    def probe(environ: Mapping[str, str], _root: Path, env: Mapping[str, str], _gpu: Any) -> Record:
        seen.append(dict(env))
        gpus = [{"name": "H200", "index": index} for index in range(int(environ.get("GPUS", "0")))]
        return {**record(1), "gpus": gpus}

    monkeypatch.setattr(local_job, "probe", probe)
    return seen


def local(root: Path, *tasks: Task, count: int = 8, named: str | None = image(1), **environ: str) -> LocalExecutor:
    manifest = replace(without_tasks(), tasks=tasks, gpus=GpusSpec(count=count), run=RunSpec(parallel=3))
    context = Context(
        manifest=manifest,
        options=Options(log_dir=root / "logs", state_dir=root, environ=environ),
        console=Console(io.StringIO(), terminal=False),
        report=Report("warm"),
        cancel=Cancel(),
        budget=Deadline(None),
        run_id="0123456789ab",
    )
    return LocalExecutor(context, root, named)


def task(label: str = "one", **more: Any) -> Task:
    return Task(label=label, model=f"org/{label}", recipe="command", argv=("true",), families=(), **more)


def test_each_environment_is_probed_once(tmp_path: Path, probed: PROBED) -> None:
    tasks = task(), task("two"), task("three", env={"CUDA_HOME": "/other", "X": "1"})
    executor = local(tmp_path, *tasks)
    assert probed == []
    executor.plan(tasks)
    executor.plan(tasks[:1])
    assert probed == [{}, {"CUDA_HOME": "/other"}]


@pytest.mark.parametrize(
    ("gpus", "count", "widths", "devices"),
    [
        ("8", 8, (4, 4), 8),
        ("4", 8, (4, 2), 4),  # fewer are here than the manifest has
        ("8", 2, (2, 1), 2),
        ("0", 8, (4, 4), 0),
        ("2", 8, (4, 1, 1), 2),  # a task that is too wide makes no GPU of another job visible to the others
        ("0", 0, (0, 0), 0),
    ],
)
def test_capacity_is_of_the_gpus_here(
    tmp_path: Path, probed: PROBED, gpus: str, count: int, widths: tuple[int, ...], devices: int
) -> None:
    tasks = [task(f"task{number}", gpus=width) for number, width in enumerate(widths)]
    capacity = local(tmp_path, *tasks, count=count, GPUS=gpus).capacity()
    assert (capacity.devices, capacity.slots) == (tuple(range(devices)), 3)


@pytest.mark.parametrize(
    ("visible", "devices", "names"),
    [(None, (2, 3), "2,3"), ("4,5,6,7", (2, 3), "6,7"), ("GPU-a,GPU-b", (1,), "GPU-b"), ("", (0,), "0")],
)
def test_visible_gpus_count_among_those_visible_here(visible: str | None, devices: tuple[int, ...], names: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert ",".join(local_job.visible_gpus(environ, devices)) == names


def test_task_wider_than_the_gpus_here_is_a_problem_of_its_own(tmp_path: Path, probed: PROBED) -> None:
    wide, narrow = task("wide", gpus=4), task("narrow", gpus=1)
    plan = local(tmp_path, wide, narrow, GPUS="2").plan((wide, narrow))
    assert [item.config_problem for item in plan.items] == ["it needs 4 GPUs, and 2 can be seen here", None]


def test_record_is_that_of_the_first_task(tmp_path: Path, probed: PROBED) -> None:
    executor = local(tmp_path, task(env={"CUDA_HOME": "/other"}), task("two"))
    executor.records(executor.context.manifest.tasks)
    assert executor.record is executor.records(())[(("CUDA_HOME", "/other"),)]


def test_unknown_image_can_be_warmed(tmp_path: Path, probed: PROBED) -> None:
    executor = local(tmp_path, task(), named=None)
    executor.prepare()
    assert executor.image.id is None and executor.missing_root() == ""


def test_prepare_lays_out_the_root(tmp_path: Path, probed: PROBED) -> None:
    root = tmp_path / "jit"
    executor = local(root, task())
    assert executor.missing_root() == f"there is no directory {root} here"
    with pytest.raises(PreflightError) as caught:
        executor.prepare()
    assert [problem.remedy for problem in caught.value.problems] == ["To make one, pass --create."]
    root.symlink_to("nowhere")
    assert executor.missing_root() == f"{root} is no directory"
    with pytest.raises(PreflightError) as caught:
        executor.prepare()
    assert [problem.remedy for problem in caught.value.problems] == ["Name a directory."]
    root.unlink()
    root.mkdir()
    executor.prepare()
    assert executor.missing_root() == ""
    with executor.run_lock():
        assert (root / "locks" / "run.lock").exists()


def test_plan_prefers_marker_of_this_run(tmp_path: Path, probed: PROBED) -> None:
    executor = local(tmp_path, task())
    for run, proof in (("another", "nothing-claimed"), (executor.context.run_id, "pretended")):
        known: dict[str, Any] = {"claims": [], "entries": {}, "shapes": [], "second_pass_added": None, "proof": proof}
        marker = marker_writing.build(task(), record=record(1), config_digest=None, observed=Observed(run=run), **known)
        marker_writing.publish(tmp_path, marker)
    (item,) = executor.plan((task(),)).items
    assert item.judgement.marker is not None
    assert item.judgement.marker.observed.run == executor.context.run_id
