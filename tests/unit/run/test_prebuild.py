"""The stage before the tasks: whether it runs, what it asks for, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder import events
from builder.cache.toolchain import Record
from builder.errors import BuilderError, TasksError, UsageError
from builder.host import machine
from builder.job import PlannedShape, PrebuildRequest
from builder.manifest.load import without_tasks
from builder.manifest.sections import GpusSpec, PrebuildSpec
from builder.report.results import TaskResult
from builder.run import prebuild, prebuild_jobs, proofs
from builder.run.plan import make_plan
from builder.run.prebuild import Stage
from builder.task import PRETEND_VARIABLE, Shape, Task
from tests.unit.run import test_warm as story

DENSE, OTHER = Shape("GEMM_NT_F8F8BF16", 4096, 7168), Shape("GEMM_NT_F8F8BF16", 512, 7168)
H200 = {"name": "NVIDIA H200", "compute_capability": "9.0", "sm_count": 132, "memory_bytes": 140 << 30}

ON = PrebuildSpec(enabled=True)
OnEvent = Callable[[events.Event], None]


def shapes_task(label: str, *shapes: Shape, **more: Any) -> Task:
    return Task(label=label, model=f"org/{label}", recipe="shapes", shapes=shapes, **more)


class FakeExecutor(story.FakeExecutor):
    """Plans two kernels for each shape, one of which all shapes share, and compiles what `missing` does not name."""

    def __init__(self, root: Path, *tasks: Task, spec: PrebuildSpec = ON, only: bool = False):
        super().__init__(root, *tasks)
        manifest = replace(self.context.manifest, prebuild=spec)
        options = replace(self.context.options, prebuild_only=only)
        self.context = replace(self.context, manifest=manifest, options=options)
        self.requests: list[tuple[str, PrebuildRequest]] = []
        self.in_use, self.missing, self.fails = "", set[str](), ""
        self.unverified: tuple[str, str] | None = None
        self.modules: tuple[str, ...] = ()

    def records(self, tasks: Any) -> dict[Any, Record]:
        return {(): {**story.record(), "gpus": [dict(H200)]}}

    def gpus_in_use(self) -> str:
        return self.in_use

    def run_prebuild(self, mode: str, env: Any, request: PrebuildRequest, seconds: float, on_event: OnEvent) -> str:
        self.requests.append((mode, request))
        if self.fails:
            raise BuilderError(self.fails)
        if mode == "plan":
            for task in request.models if self.modules else ():
                on_event(events.ModelWalked(task.label, "sglang", (), modules=self.modules))
            if self.unverified:
                on_event(events.PrebuildProblem((self.unverified[0],), "task", self.unverified[1]))
            for each in request.shapes:
                kernels = ((1, ("shared.00", f"kernel-{each.shape.n}.00")), (64, (f"kernel-{each.shape.n}.01",)))
                on_event(events.KernelsPlanned(str(each.shape), each.m_values, 8192, kernels))
            return ""
        if request.modules:
            on_event(events.PrebuildProblem(("norm",), "modules", "ninja: build stopped"))
            on_event(events.ModulesPrebuilt(len(request.modules) - 1))
            return ""
        names = {name for shape in request.shapes for _, names in shape.kernels for name in names}
        left = tuple(sorted(names & self.missing))
        if left:
            on_event(events.PrebuildProblem(left, "entries", "NVCC compilation failed"))
        on_event(events.KernelsPrebuilt(request.key, len(names) - len(left), 0, left, 99, 2, 1 << 29, 9.0, 4.0, 0.0))
        return ""

    def run_stage(self) -> Stage:
        items = make_plan(self.context.manifest.tasks, self.records(()), root=self.root, store=None).items
        return prebuild.run(self, items, prebuild.known_shapes(self.root, items))

    def compiled(self) -> list[str]:
        return [
            name
            for mode, request in self.requests
            if mode == "prebuild"
            for shape in request.shapes
            for _, names in shape.kernels
            for name in names
        ]


def test_kernels_of_all_tasks_are_compiled_once(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE, OTHER), shapes_task("two", DENSE))
    stage = executor.run_stage()
    assert sorted(executor.compiled()) == [
        "kernel-4096.00",
        "kernel-4096.01",
        "kernel-512.00",
        "kernel-512.01",
        "shared.00",
    ]
    assert (stage.state, stage.named, stage.made, stage.missing) == ("done", 5, 5, [])
    (plan, compiling) = [request for _, request in executor.requests]
    assert [each.shape for each in plan.shapes] == [DENSE, OTHER] and plan.gpu.sms == 132
    assert compiling.key and not compiling.gentle
    assert json.loads(executor.context.report.document(0, None))["prebuild"]["state"] == "done"
    assert "5 kernels named, 0 there, 5 made (99 B) by 2 workers of 536.9 MB" in executor.output.getvalue()


def test_shape_with_missed_kernels_is_planned_over_every_m(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE, argv=("--chunked-prefill-size", "4096")))
    items = make_plan(executor.context.manifest.tasks, executor.records(()), root=tmp_path, store=None).items
    missed = prebuild.Known(missed={"org/one": (OTHER,), "org/two": (DENSE,)})
    stage = prebuild.run(executor, items, missed)
    (plan,) = (request for mode, request in executor.requests if mode == "plan")
    assert plan.shapes == (PlannedShape(DENSE, (), 4096), PlannedShape(OTHER, (), 4096, every=True))
    (key,) = {request.key for mode, request in executor.requests if mode == "prebuild"}
    assert [item.prebuilt for item in prebuild.with_keys(stage, items)] == [{"deep_gemm": key}]
    stage.state = "incomplete"
    assert [item.prebuilt for item in prebuild.with_keys(stage, items)] == [{}], "it did not make all that it named"


def test_modules_of_models_are_built_once_and_those_missing_are_named(tmp_path: Path) -> None:
    tasks = [Task(label=name, model="", recipe="command", argv=("x",)) for name in ("one", "two")]
    servers = [replace(task, model=str(tmp_path), recipe="serve", argv=()) for task in tasks]
    (tmp_path / "config.json").write_text("{}")
    executor = FakeExecutor(tmp_path, *servers)
    executor.modules = ('[["activation"], {}]', '[["norm"], {}]')
    stage = executor.run_stage()
    (request,) = (request for mode, request in executor.requests if mode == "prebuild")
    assert request.modules == executor.modules and request.jit_key and not request.shapes
    assert (stage.modules, stage.modules_missing) == (1, ["norm: ninja: build stopped"])
    assert "prebuild: norm: ninja: build stopped" in executor.context.report.warnings


def test_environments_of_tasks_are_kept_apart_and_share_kernels(tmp_path: Path) -> None:
    executor = FakeExecutor(
        tmp_path, shapes_task("one", DENSE), shapes_task("two", DENSE, OTHER, env={"SGLANG_X": "1"})
    )
    executor.run_stage()
    assert [mode for mode, _ in executor.requests] == ["plan", "plan", "prebuild"]
    assert len(executor.compiled()) == len(set(executor.compiled())) == 5


def test_kernels_on_gpus_are_counted_after_the_stage(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE))
    stage = executor.run_stage()
    executor.context.report.tasks = [TaskResult("one", "one", "k", "warmed", added={"deep_gemm": 2, "triton": 7})]
    prebuild.finish(executor, stage)
    assert json.loads(executor.context.report.document(0, None))["prebuild"]["gpu_kernels"] == 2
    assert "3 made on CPU cores before, 2 by tasks on GPUs" in executor.output.getvalue()


@pytest.mark.parametrize(
    ("spec", "use", "state", "reason"),
    [
        (PrebuildSpec(), "", "off", "not proven on NVIDIA H200"),
        (PrebuildSpec(enabled=False), "", "off", "[prebuild] enabled is false"),
        (
            ON,
            "GPU 3 is held by pid 7",
            "unfit",
            "GPU 3 is held by pid 7, and [prebuild] when is",
        ),
    ],
)
def test_stage_that_does_not_run_has_a_reason(
    tmp_path: Path, spec: PrebuildSpec, use: str, state: str, reason: str
) -> None:
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE), spec=spec)
    executor.in_use = use
    stage = executor.run_stage()
    assert stage.state == state and stage.reason.startswith(reason), stage
    assert executor.requests == []


def test_proven_gpu_turns_the_stage_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "find", lambda name: name == "NVIDIA H200" or None)
    assert FakeExecutor(tmp_path, shapes_task("one", DENSE), spec=PrebuildSpec()).run_stage().state == "done"


def test_beside_running_jobs_it_takes_what_is_free_and_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(free=9 << 30, available=20 << 30))
    spec = PrebuildSpec(enabled=True, when="always", workers=7)
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE), spec=spec)
    executor.in_use = "GPU 3 is held by pid 7"
    executor.run_stage()
    for _, request in executor.requests:
        assert request.gentle and request.cpus and (request.memory, request.workers) == (9 << 30, 7)


def test_too_little_free_memory_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(free=1 << 30, available=20 << 30))
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE), spec=PrebuildSpec(enabled=True, when="always"))
    executor.in_use = "GPU 3 is held by pid 7"
    stage = executor.run_stage()
    assert (stage.state, stage.reason) == ("failed", "1.1 GB of memory are free for it, and it needs at least 2.1 GB")
    executor.in_use = ""
    assert executor.run_stage().state == "done", "beside nothing else, what is available counts"


def test_tasks_without_deep_gemm_need_no_stage(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, story.task("one"), shapes_task("two", DENSE, families=("triton",)))
    assert executor.run_stage().reason == "no cold task asks for kernels of DeepGEMM"


def test_missing_kernel_is_a_warning_before_tasks_and_an_error_alone(tmp_path: Path) -> None:
    for only in (False, True):
        executor = FakeExecutor(tmp_path, shapes_task("one", DENSE), only=only)
        executor.missing = {"kernel-4096.01"}
        if only:
            with pytest.raises(TasksError, match=r"the prebuild is not complete: kernel-4096\.01: NVCC"):
                executor.run_stage()
        else:
            executor.run_stage()
        assert json.loads(executor.context.report.document(0, None))["prebuild"]["missing"] == ["kernel-4096.01"]
        assert executor.context.report.warnings == ["prebuild: kernel-4096.01: NVCC compilation failed"]


def test_model_without_a_list_of_shapes_is_named_and_no_failure(tmp_path: Path) -> None:
    server = Task(label="server", model="org/gone", recipe="serve", families=("deep_gemm",))
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE), server, only=True)
    executor.unverified = ("one", "shapes unverified: sglang lacks a name")
    stage = executor.run_stage()
    assert stage.state == "done" and len(stage.unverified) == 2
    assert executor.context.report.warnings == [
        "prebuild: server: shapes unverified: no model store: set [models] store",
        "prebuild: one: shapes unverified: sglang lacks a name",
    ]


def test_stage_that_fails_keeps_no_task_from_running(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, shapes_task("one", DENSE))
    executor.fails = "the image has no nvcc"
    stage = executor.run_stage()
    assert (stage.state, stage.reason) == ("failed", "the image has no nvcc")


def test_long_plans_are_divided_among_jobs() -> None:
    names = tuple((m, (f"sm90_fp8_gemm_1d2d.{m:032x}",)) for m in range(4000))
    batches = list(prebuild_jobs.batches([PlannedShape(DENSE, (1, 2), None, names)]))
    assert len(batches) > 1
    assert tuple(kernel for batch in batches for shape in batch for kernel in shape.kernels) == names


def test_manifest_of_gpus_is_prebuilt_without_any() -> None:
    manifest = replace(without_tasks(), gpus=GpusSpec(count=8, name="H200"), tasks=(shapes_task("one", DENSE),))
    found = prebuild.on_simulated_gpu(manifest)
    assert (found.gpus.count, found.gpus.pretend) == (0, "H200")
    assert found.tasks[0].env[PRETEND_VARIABLE] == "H200"
    for name in (None, "RTX"):
        with pytest.raises(UsageError) as refused:
            prebuild.on_simulated_gpu(replace(manifest, path="m.toml", gpus=GpusSpec(count=8, name=name)))
        assert "set name, or pretend, to one of H200, H100, B200." in str(refused.value.problems[0])
