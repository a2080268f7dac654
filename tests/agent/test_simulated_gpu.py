"""A GPU that is not there: what a manifest asks, what a marker says, and what it never passes for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder import events
from builder.cache import marker_files, markers, memos
from builder.cache.coverage import coverage
from builder.cache.toolchain import Record
from builder.errors import UsageError
from builder.manifest import load
from builder.run.job_environment import common_env
from builder.task import PRETEND_VARIABLE, ServingImage, Shape, Task
from tests.program import Program

TEXT = """
schema = 1
image.ref = "x"
cache.volume = "xy"
{gpus}
[defaults]
recipe = "{recipe}"
[[task]]
model = "org/m"
argv = ["--tp", "8"]
shapes = ["GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"]
"""
RECORD: Record = {
    "schema": 2,
    "factors": {"compute_capability": "9.0", "mount": "/jit"},
    "gpus": [{"name": "NVIDIA H200"}],
    "sglang": {"version": "0.5.23", "commit": None, "sources": None},
    "variables": {},
    "observed": {"driver": None, "python": "3.12", "problems": [], "pretended": None},
}


def read(place: Path, gpus: str, recipe: str = "shapes") -> load.Manifest:
    path = place / "m.toml"
    path.write_text(TEXT.format(gpus=gpus, recipe=recipe))
    return load.load(path)


def test_simulated_and_real_gpu_share_a_marker(tmp_path: Path) -> None:
    pretended, real = read(tmp_path, 'gpus.pretend = "H200"'), read(tmp_path, "gpus.count = 8")
    assert (pretended.gpus.count, real.gpus.count) == (0, 8)
    (one,), (other,) = pretended.tasks, real.tasks
    assert one.label == other.label
    assert coverage(one, record=RECORD, config_digest=None) == coverage(other, record=RECORD, config_digest=None)
    assert one.env[PRETEND_VARIABLE] == "H200" and PRETEND_VARIABLE not in other.env
    assert PRETEND_VARIABLE not in common_env(pretended.tasks), "a job has real GPUs"


@pytest.mark.parametrize(
    ("gpus", "recipe", "problem"),
    [
        ('gpus = { pretend = "H200", count = 8 }', "shapes", "set count = 0"),
        ('gpus.pretend = "H20"', "shapes", "there is no GPU to pretend 'H20' (known: H200, H100, B200)"),
        ('gpus.pretend = "H200"', "compile-deep-gemm", "on a pretended GPU nothing runs, and 'compile-deep-gemm' runs"),
    ],
)
def test_simulated_gpu_with_impossible_manifest_is_refused(
    tmp_path: Path, gpus: str, recipe: str, problem: str
) -> None:
    with pytest.raises(UsageError) as refused:
        read(tmp_path, gpus, recipe)
    assert any(problem in f"{found.text} {found.remedy}" for found in refused.value.problems), refused.value.problems


def test_simulated_and_real_records_stay_apart(tmp_path: Path) -> None:
    image = ServingImage("sha256:1")

    def known(env: dict[str, str], **host: str | None) -> Any:
        return memos.read_memo(
            tmp_path, image, mount="/jit", gpus=host.get("gpus"), driver=host.get("driver"), isa=None, env=env
        )

    pretending = {PRETEND_VARIABLE: "H200"}
    marked: Record = {**RECORD, "observed": {**RECORD["observed"], "pretended": "H200"}}
    memos.write_memo(tmp_path, image, marked, env=pretending)
    assert known({}, gpus="NVIDIA H200", driver="580.1") is None
    real: Record = {**RECORD, "observed": {**RECORD["observed"], "driver": "580.1"}}
    memos.write_memo(tmp_path, image, real, env={})
    memos.write_memo(tmp_path, image, marked, env=pretending)
    assert known({}, gpus="NVIDIA H200")["observed"].get("pretended") is None
    assert known({}, gpus="NVIDIA H200", driver="590.0")["factors"]["driver"] == "590.0"
    found = known(pretending, gpus="NVIDIA L4", driver="470.0")
    assert (found["gpus"], found["observed"]["pretended"]) == (marked["gpus"], "H200"), "the host's own do not count"


@pytest.fixture
def stub(program: Program) -> dict[str, str]:
    """A compiler that makes no driver, and a header, so that a task that pretends gets as far as its marker."""
    tools = program.place / "tools"
    tools.mkdir()
    (tools / "cc").write_text("#!/bin/sh\nexit 0\n")
    (tools / "cc").chmod(0o755)
    (program.place / "include").mkdir()
    (program.place / "include" / "cuda.h").touch()
    return {"PATH": f"{tools}:{program.environ['PATH']}"}


def shapes_task(program: Program, **fields: Any) -> Task:
    return program.task(recipe="shapes", argv=(), shapes=(Shape("GEMM_NT_F8F8BF16", 64, 128),), **fields)


def test_simulated_marker_is_cold_under_strict(program: Program, stub: dict[str, str]) -> None:
    task = shapes_task(program, env={PRETEND_VARIABLE: "H200"})
    done = program.run(task, environ=stub)
    assert done.status == 0, done.verdict
    assert (done.verdict.proof, done.verdict.second_pass_added) == ("pretended", 0)
    said = "compiled without a GPU (pretended H200): experimental, not proven on hardware"
    assert done.verdict.reason == said
    path = program.root / done.marker
    marker = json.loads(path.read_text())
    assert (marker["observed"]["compiled-on"], marker["observed"]["pretended"]) == ("no GPU", "H200")
    read = marker_files.read(path)
    assert read is not None
    assert markers.reservation(read) == said
    record = program.record()
    real = shapes_task(program, env={})  # as a machine with GPUs asks, whose family key is the same
    judged = markers.judge(program.root, real, record=record, config_digest=None)
    assert (judged.state, judged.marker) == ("warm", read)
    assert markers.judge(program.root, real, record=record, config_digest=None, strict=True).reason == "unverified"

    assert program.run(real).verdict.proof == "verified"
    assert program.run(task, environ=stub).verdict.marker == done.verdict.marker, "beside the real one's"
    judged = markers.judge(program.root, real, record=record, config_digest=None, strict=True)
    assert judged.state == "warm" and judged.marker is not None
    assert markers.reservation(judged.marker) == "" and judged.marker.observed.others["compiled-on"] == "GPU"


def test_simulated_gpu_without_compiler_is_failed(program: Program, stub: dict[str, str]) -> None:
    (program.place / "tools" / "cc").write_text("#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    task = shapes_task(program, env={PRETEND_VARIABLE: "H200"})
    done = program.run(task, environ=stub)
    assert (done.status, done.verdict.state) == (20, "failed")
    assert done.verdict.reason.startswith("the stub driver cannot be compiled")
    assert done.verdict.reason.endswith("x.c:1: error: no such thing")
    done = program.run(task, mode="probe", environ=stub)
    assert done.status == 20 and not done.all(events.ToolchainProbed)
    assert b"x.c:1: error: no such thing" in done.stderr
