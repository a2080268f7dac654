"""Kernels named and compiled without a GPU: the in-container program with the tiny stand-in's fake sglang.

The fake compiles one kernel for each tile of 64 Ms, up to four, and one that all shapes share.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from builder import events, processes
from builder.cache import inventory, marker_files
from builder.cache.families import FAMILY
from builder.cache.marker_format import Prebuild
from builder.job import PlannedShape, PrebuildRequest
from builder.task import GPUS, Shape
from tests.program import Program, Result

DENSE = Shape("GEMM_NT_F8F8BF16", 4096, 7168)
CONTIGUOUS = Shape("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 4096, 7168, 32)
MS = (1, 64, 128, 129, 256)


@pytest.fixture
def stub(program: Program) -> dict[str, str]:
    return stub_of(program)


def stub_of(program: Program) -> dict[str, str]:
    """A compiler that makes no driver, and a header: what simulates a GPU gets as far as the fake sglang."""
    tools = program.place / "tools"
    tools.mkdir()
    (tools / "cc").write_text("#!/bin/sh\nexit 0\n")
    (tools / "cc").chmod(0o755)
    (program.place / "include").mkdir()
    (program.place / "include" / "cuda.h").touch()
    return {"PATH": f"{tools}:{program.environ['PATH']}"}


def plan(program: Program, stub: dict[str, str], *shapes: PlannedShape, **fields: Any) -> Result:
    request = PrebuildRequest(gpu=GPUS["H200"], shapes=shapes, workers=2)
    return program.run(program.task(**fields), mode="plan", prebuild=request, environ=stub)


def planned(done: Result) -> tuple[PlannedShape, ...]:
    found = done.all(events.KernelsPlanned)
    return tuple(PlannedShape(Shape.parse(each.shape), each.m_values, None, each.kernels) for each in found)


def prebuild(program: Program, stub: dict[str, str], *shapes: PlannedShape, play: str = "", **more: Any) -> Result:
    request = PrebuildRequest(gpu=GPUS["H200"], shapes=shapes, workers=2, **more)
    return program.run(program.task(play), mode="prebuild", prebuild=request, environ=stub)


def summary(done: Result) -> events.KernelsPrebuilt:
    return done.all(events.KernelsPrebuilt)[-1]


def entries(program: Program) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in program.root.glob("deep_gemm/*/cache/*/.committed")}


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory, site: Path) -> tuple[Program, Result]:
    """A program that has planned both shapes, and nothing else."""
    program = Program(tmp_path_factory.mktemp("planner"), site)
    done = plan(program, stub_of(program), PlannedShape(DENSE, MS), PlannedShape(CONTIGUOUS, MS))
    assert done.status == 0, (done.events, done.stderr)
    return program, done


@pytest.fixture
def shapes(planner: tuple[Program, Result]) -> tuple[PlannedShape, ...]:
    return planned(planner[1])


def test_plan_names_one_m_for_each_kernel_and_touches_no_cache(
    planner: tuple[Program, Result], shapes: tuple[PlannedShape, ...]
) -> None:
    by_kind = {shape.shape: [m for m, _ in shape.kernels] for shape in shapes}
    assert by_kind == {DENSE: [1, 128, 129, 256], CONTIGUOUS: [128, 256]}
    (first,) = [names for shape in shapes if shape.shape == DENSE for m, names in shape.kernels if m == 1]
    assert {name.partition(".")[0] for name in first} == {"transpose_fp32", "sm90_fp8_gemm_1d2d"}
    assert not planner[0].root.exists()


def test_plan_of_unknown_kernel_type_is_named(program: Program, stub: dict[str, str]) -> None:
    done = plan(program, stub, PlannedShape(Shape("GEMM_OF_NOBODY", 64, 128)), PlannedShape(DENSE, MS))
    (problem,) = done.all(events.PrebuildProblem)
    assert (problem.what, problem.kind) == (("GEMM_OF_NOBODY N=64, K=128, num_groups=1",), "shape")
    assert "this sglang knows no such kernel type" in problem.why
    assert len(planned(done)) == 1


def test_prebuilt_kernels_are_those_a_task_asks_for(
    program: Program, stub: dict[str, str], shapes: tuple[PlannedShape, ...]
) -> None:
    done = prebuild(program, stub, *shapes)
    wanted = {name for shape in shapes for _, names in shape.kernels for name in names}
    assert (summary(done).made, summary(done).present, summary(done).missing) == (len(wanted), 0, ())
    assert entries(program).keys() == wanted
    assert not list(program.root.glob("markers/*/*")), "it proves nothing"
    again = prebuild(program, stub, *shapes)
    assert (summary(again).made, summary(again).present, summary(again).workers) == (0, len(wanted), 0)

    task = program.task(recipe="shapes", shapes=(DENSE, CONTIGUOUS), m_values=MS)
    run = program.run(task)
    assert run.verdict.state == "warmed" and run.verdict.second_pass_added == 0
    assert run.verdict.added.get("deep_gemm", 0) == 0, "the task hits what is there"


def test_kernel_that_a_prebuild_missed_is_in_the_marker_and_in_the_next_plan(
    program: Program, stub: dict[str, str]
) -> None:
    prebuilt = prebuild(program, stub, *planned(plan(program, stub, PlannedShape(DENSE, (1, 64)))))
    keys = {"deep_gemm": summary(prebuilt).key}
    task = program.task(recipe="shapes", shapes=(DENSE, CONTIGUOUS), m_values=MS)
    run = program.run(task, prebuilt=keys)
    assert run.verdict.state == "warmed", run.verdict
    (marker,) = (file.marker for file in marker_files.every(program.root))
    assert marker is not None and marker.prebuild == Prebuild(keys, tuple(sorted(map(str, (DENSE, CONTIGUOUS)))))
    assert marker_files.missed_of(program.root, {task.model})[task.model] == (DENSE, CONTIGUOUS)

    again = planned(plan(program, stub, PlannedShape(DENSE, (), 320, every=True)))
    made = prebuild(program, stub, *again)
    assert summary(made).made == 0 and summary(made).present == 5, "each M names all that the task had to compile"


def test_interrupted_prebuild_keeps_what_is_finished(
    program: Program, stub: dict[str, str], shapes: tuple[PlannedShape, ...], until: Callable[..., None]
) -> None:
    request = PrebuildRequest(gpu=GPUS["H200"], shapes=shapes, workers=1)
    slow = {**stub, "TINY_COMPILE_SECONDS": "0.3"}
    running = program.start(program.task(), mode="prebuild", prebuild=request, environ=slow)
    until(lambda: len(entries(program)) >= 2, what="two kernels")
    running.process.send_signal(signal.SIGTERM)
    assert running.end().status == 128 + signal.SIGTERM
    before = {name: (path / "kernel.cubin").stat().st_mtime_ns for name, path in entries(program).items()}
    done = prebuild(program, stub, *shapes)
    assert summary(done).present == len(before) and summary(done).missing == ()
    for name, written in before.items():
        assert (entries(program)[name] / "kernel.cubin").stat().st_mtime_ns == written


def test_beside_others_workers_give_way(
    program: Program, stub: dict[str, str], shapes: tuple[PlannedShape, ...], until: Callable[..., None]
) -> None:
    """On one processor, at nice 19, and the first to be killed when memory runs out."""
    cpu = min(os.sched_getaffinity(0))
    request = PrebuildRequest(gpu=GPUS["H200"], shapes=shapes, cpus=(cpu,), gentle=True)
    slow = {**stub, "TINY_COMPILE_SECONDS": "1"}
    running = program.start(program.task(), mode="prebuild", prebuild=request, environ=slow)
    until(lambda: list(program.root.glob("deep_gemm/*/tmp/*")) or entries(program), what="a worker at work")
    children = [psutil.Process(pid) for pid in processes.descendants(running.process.pid)]
    facts = {
        (child.nice(), tuple(child.cpu_affinity()), Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip())
        for child in children
    }
    assert facts == {(19, (cpu,), "500"), (19, (cpu,), "1000")}, "the process with the import, and its one worker"
    assert psutil.Process(running.process.pid).nice() < 19
    running.process.terminate()
    running.end()


def test_killed_worker_gets_its_kernel_tried_again(
    program: Program, stub: dict[str, str], shapes: tuple[PlannedShape, ...]
) -> None:
    done = prebuild(program, stub, *shapes, play="worker-dies-once")
    assert summary(done).missing == () and not done.all(events.PrebuildProblem)


@pytest.mark.parametrize(
    ("play", "why"),
    [
        ("worker-dies", "its process was killed, as the kernel does when memory runs out"),
        ("nvcc-fails", "NVCC compilation failed: a test double plays a crash"),
        ("disk-full", "No space left on device"),
    ],
)
def test_prebuild_that_fails_names_what_is_missing(
    program: Program, stub: dict[str, str], shapes: tuple[PlannedShape, ...], play: str, why: str
) -> None:
    done = prebuild(program, stub, *shapes, play=play)
    assert done.status == 0
    missing = set(summary(done).missing)
    problems = done.all(events.PrebuildProblem)
    assert missing and {name for problem in problems for name in problem.what} >= missing
    assert all(problem.kind == "entries" for problem in problems)
    assert any(why in problem.why for problem in problems), problems
    assert entries(program), "what is finished stays"
    assert not missing & entries(program).keys()
    assert not list(program.root.glob("markers/*/*"))


def test_prebuild_gives_up_where_nothing_succeeds(program: Program, stub: dict[str, str]) -> None:
    ms = (65, 129, 193, 257)
    many = [PlannedShape(Shape("GEMM_NT_F8F8BF16", 64 * n, 128), ms) for n in range(1, 5)]
    shapes = planned(plan(program, stub, *many))
    done = prebuild(program, stub, *shapes, play="nvcc-fails")
    whys = [problem.why for problem in done.all(events.PrebuildProblem)]
    assert any(why.startswith("not tried, because ") for why in whys), whys
    named = {name for problem in done.all(events.PrebuildProblem) for name in problem.what}
    assert named >= set(summary(done).missing)


def test_prebuild_under_another_key_is_refused(
    program: Program, stub: dict[str, str], shapes: tuple[PlannedShape, ...]
) -> None:
    done = prebuild(program, stub, *shapes, key="0123456789abcdef")
    (problem,) = done.all(events.PrebuildProblem)
    assert done.status == 20 and problem.kind == "all"
    assert problem.why.startswith("kernels made here would be unused: deep_gemm's key is ")
    assert not program.root.exists()


def test_cubin_of_the_plan_pass_is_no_entry(
    program: Program, stub: dict[str, str], shapes: tuple[PlannedShape, ...], tmp_path: Path
) -> None:
    prebuild(program, stub, *shapes)
    name, entry = next(iter(entries(program).items()))
    cubin = (entry / "kernel.cubin").read_bytes()
    (entry / "kernel.cubin").write_bytes(cubin + b"\0warm_cache_plan_only\0")
    directory = entry.parents[1]
    problem = inventory.check(FAMILY["deep_gemm"], directory, f"cache/{name}")
    assert "kernel.cubin is of the plan pass of a prebuild, and no kernel" in str(problem)
    done = prebuild(program, stub, *shapes)
    assert [each.path for each in done.all(events.Quarantined)] == [f"cache/{name}"]
    assert summary(done).made == 1 and summary(done).missing == ()


def test_walk_that_fails_falls_back_to_the_table(program: Program, stub: dict[str, str]) -> None:
    from tests.agent.test_shapes import V3, V3_TP8

    (program.model / "config.json").write_text(json.dumps(V3))
    known = program.task(label="v3", argv=("--tp", "8"))
    unknown = program.task(label="other", model=str(program.place / "none"), argv=())
    request = PrebuildRequest(gpu=GPUS["H200"], models=(known, unknown), workers=2)
    done = program.run(program.task(), mode="plan", prebuild=request, environ=stub)
    (walked,) = done.all(events.ModelWalked)
    assert (walked.task, walked.source) == ("v3", "table")
    assert set(map(Shape.parse, walked.shapes)) == V3_TP8
    assert walked.note.startswith("sglang lacks: sglang.srt.")
    (problem,) = done.all(events.PrebuildProblem)
    assert (problem.what, problem.kind) == (("other",), "task")
    assert problem.why.startswith("shapes unverified: ")
    assert {Shape.parse(each.shape) for each in done.all(events.KernelsPlanned)} == V3_TP8


def test_modules_of_sglangs_own_jit_are_built_and_found_again(program: Program, stub: dict[str, str]) -> None:
    modules = tuple(json.dumps([[name], {"cuda_wrappers": [["run", "Kernel"]]}]) for name in ("activation", "broken"))
    request = PrebuildRequest(gpu=GPUS["H200"], modules=modules, workers=2)
    failing = program.run(program.task("module-fails"), mode="prebuild", prebuild=request, environ=stub)
    (built,) = failing.all(events.ModulesPrebuilt)
    (problem,) = failing.all(events.PrebuildProblem)
    assert (built.found, problem.kind, problem.what) == (1, "modules", ("broken",))
    assert "ninja: build stopped: subcommand failed" in problem.why
    assert len(list(program.root.glob("sglang_jit/*/sm90a/activation/build-*/deps-*"))) == 1
    done = program.run(program.task(), mode="prebuild", prebuild=request, environ=stub)
    assert [each.found for each in done.all(events.ModulesPrebuilt)] == [2]
    other = replace(request, jit_key="0123456789abcdef")
    refused = program.run(program.task(), mode="prebuild", prebuild=other, environ=stub)
    assert not refused.all(events.ModulesPrebuilt)
    assert "where the tasks run" in refused.all(events.PrebuildProblem)[0].why


def test_plan_without_simulated_gpu_is_impossible(program: Program, stub: dict[str, str]) -> None:
    (program.place / "tools" / "cc").write_text("#!/bin/sh\nexit 1\n")
    done = plan(program, stub, PlannedShape(DENSE, MS))
    (problem,) = done.all(events.PrebuildProblem)
    assert done.status == 20 and problem.kind == "all" and "stub driver cannot be compiled" in problem.why
