"""Shape workers that are forked of one import, where the GPU is simulated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder import processes
from builder.agent.guard import SCRATCH
from builder.agent.shape_forks import Imported
from builder.task import PRETEND_VARIABLE, Shape, Task
from tests.agent.test_prebuild import stub_of
from tests.program import ROOT, Program

SHAPES = tuple(Shape("GEMM_NT_F8F8BF16", 64 * number, 128) for number in range(1, 5))
POOL = ROOT / "builder" / "agent" / "shape_pool.py"
CONTIG = Shape("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 64, 128, 32)


@pytest.fixture
def simulating(program: Program) -> Program:
    program.environ |= stub_of(program)
    return program


def task_of(program: Program, *shapes: Shape, workers: int = 2, **env: str) -> Task:
    env = {PRETEND_VARIABLE: "H200", "TINY_IMPORTS": str(program.place / "imports"), **env}
    return program.task(recipe="shapes", argv=(), shapes=shapes, m_values=(64, 128), workers=workers, env=env)


def imports(program: Program) -> int:
    return len((program.place / "imports").read_text().splitlines())


def test_both_passes_and_all_workers_share_one_import(simulating: Program) -> None:
    done = simulating.run(task_of(simulating, *SHAPES))
    assert (done.verdict.state, done.verdict.second_pass_added) == ("warmed", 0), done.verdict
    assert b"by 2 workers" in done.log and b"by 1 worker" in done.log
    assert imports(simulating) == 1
    real = replace(task_of(simulating, *SHAPES), env={"TINY_IMPORTS": str(simulating.place / "imports")})
    assert simulating.run(real).verdict.state == "warmed"
    assert imports(simulating) == 1 + 3, "a real driver does not survive a fork: each worker imports"


def test_second_pool_has_no_kernel_in_memory(simulating: Program) -> None:
    """The fake, as the original, does not look at the disk for a kernel that its process has loaded."""
    env = {**simulating.environ, PRETEND_VARIABLE: "H200", "DG_JIT_CACHE_DIR": str(simulating.place / "dg")}
    env |= {"SGLANG_DG_CACHE_DIR": env["DG_JIT_CACHE_DIR"], "TINY_IMPORTS": str(simulating.place / "imports")}
    made = []
    with Imported(env, str(simulating.place)) as imported:
        request = {"shapes": [["GEMM_NT_F8F8BF16", 64, 128, 1]], "m_values": [64, 128], "chunked_prefill_size": 0}
        request |= {"workers": 1, "devices": [], "imported": imported.socket()}
        for _ in range(2):
            subprocess.run([sys.executable, str(POOL), json.dumps(request)], env=env, check=True, capture_output=True)
            made.append({path.name for path in Path(env["DG_JIT_CACHE_DIR"], "cache").iterdir()})
            shutil.rmtree(env["DG_JIT_CACHE_DIR"])
    assert len(made[0]) == 3 and made[1] == made[0]
    assert imports(simulating) == 1


def test_pass_that_grows_is_seen(simulating: Program) -> None:
    done = simulating.run(task_of(simulating, *SHAPES, TINY_PLAY="grows-in-second-pass"))
    assert done.verdict.state == "failed" and "the second pass added 4 entries" in done.verdict.reason


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_fork_is_named_and_rest_continues(simulating: Program, workers: int) -> None:
    task = task_of(simulating, CONTIG, *SHAPES, workers=workers, TINY_PLAY="dies-at-contig")
    done = simulating.run(task)
    assert (done.status, done.verdict.state) == (21, "partial")
    assert "4 of 5 shapes done" in done.verdict.reason and "killed by SIGKILL" in done.verdict.reason
    assert imports(simulating) == 1


def test_pass_goes_on_without_the_process_it_was_forked_of(simulating: Program, until: Callable[..., None]) -> None:
    running = simulating.start(task_of(simulating, *SHAPES, workers=1, TINY_COMPILE_SECONDS="0.2"))
    until(lambda: b"Try DeepGEMM JIT Compiling" in running.stdout, what="a worker at work")
    (imported,) = (int(pid) for pid in (simulating.place / "imports").read_text().split())
    os.kill(imported, signal.SIGKILL)
    done = running.end()
    assert (done.verdict.state, done.verdict.second_pass_added) == ("warmed", 0), done.verdict
    assert imports(simulating) == 2, "the worker finished its work, and that of the second pass imported sglang itself"


def test_import_that_fails_is_shown_by_a_worker_of_its_own(simulating: Program) -> None:
    module = simulating.place / "broken" / "deep_gemm"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    path = f"{module.parent}:{simulating.environ['PYTHONPATH']}"
    done = simulating.run(task_of(simulating, *SHAPES), environ={"PYTHONPATH": path})
    assert done.verdict.state == "failed"
    assert "libcudart.so.13: cannot open shared object file" in done.verdict.reason


def test_nothing_is_left_after_a_stop(simulating: Program, tmp_path: Path, until: Callable[..., None]) -> None:
    task = task_of(simulating, *SHAPES, TINY_COMPILE_SECONDS="30")
    running = simulating.start(task, environ={"TMPDIR": str(tmp_path)})
    until(lambda: b"Try DeepGEMM JIT Compiling" in running.stdout, what="a worker at work")
    below = processes.descendants(running.process.pid)
    assert len(below) >= 6, "the pool, the import, and two workers with those that wait for them"
    running.process.terminate()
    running.end()
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.glob(f"{SCRATCH}*"))
