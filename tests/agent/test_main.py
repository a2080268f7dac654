"""The in-container program as a whole: modes, verdicts, proofs, markers, and each play of the tiny stand-in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder import events
from builder.cache import history, markers, toolchain
from builder.cache.model_store import config_digest
from builder.job import JOB_VARIABLE, Job, RunOrigin
from builder.task import Shape, Task
from tests.program import ROOT, Program

SHAPE = Shape("GEMM_NT_F8F8BF16", 4096, 7168)


def marker_files(program: Program) -> list[Path]:
    return list(program.root.glob("markers/*/*.json"))


# Modes


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "mode": "run"}'])
def test_job_missing_is_one_sentence(program: Program, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "builder.agent"],
        env={**program.environ, JOB_VARIABLE: text},
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""


def test_job_text_is_not_escaped_to_longer_text() -> None:
    job = Job("run", "n", "/jit", task=Task("l", "m", "command", argv=("模型" * 15_000,)))
    assert len(job.to_json().encode()) < 92_000
    assert Job.from_json(job.to_json()) == job
    strange = Job("run", "n", "/jit", task=Task("l", "m", "command", argv=("\udcff\ud800 \U0001d11e é \0\x7f\u2028",)))
    assert Job.from_json(strange.to_json().encode("utf-8", "strict").decode()) == strange


def test_job_is_read_in_any_locale(program: Program) -> None:
    task = program.command("pass", model="é模")
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}):
        done = program.run(task, environ=locale)
        assert done.status == 0, done.stderr
        assert json.loads((program.root / done.marker).read_text())["coverage"]["model"] == "é模"


def test_each_run_has_one_line_in_the_history(program: Program) -> None:
    origin = RunOrigin("h1", "0.1", "img", "run-1")
    program.run(program.task(gpus=2), gpus=(3, 5, 7), observed=origin)
    program.run(program.command("raise SystemExit(3)"), observed=origin)
    first, second = history.read(program.root).lines
    assert (first.run, first.state, first.gpus, first.host) == ("run-1", "warmed", (3, 5), "h1")
    assert first.added["deep_gemm"] == first.entries["deep_gemm"] > 0
    assert (second.state, second.gpus) == ("failed", ())
    assert second.reason


def test_job_without_task_is_refused(program: Program) -> None:
    done = program.run(None)
    assert done.status == 2
    assert isinstance(done.events[-1], events.End)


def test_directories_of_killed_processes_are_removed_after_a_day(program: Program, tmp_path: Path) -> None:
    old, new = tmp_path / "tmp" / "warm-cache-agent-1", tmp_path / "tmp" / "warm-cache-agent-2"
    for place in (old, new):
        place.mkdir(parents=True)
    os.utime(old, (0, 0))
    program.run(None, environ={"TMPDIR": str(old.parent)})
    assert list(old.parent.iterdir()) == [new]


def test_probe_reports_toolchain_and_writes_memo(program: Program) -> None:
    done = program.run(None, mode="probe")
    assert done.status == 0
    record = done.all(events.ToolchainProbed)[0].record
    assert toolchain.sound(record)
    assert record["sglang"]["version"] == "0.5.23"
    assert (record["factors"]["deep_gemm"] or "").startswith("0.2.3.post2 ")
    assert "release 13.0" in (record["factors"]["nvcc"] or "")
    assert program.record() == record
    assert done.seconds < 3


def test_probe_of_read_only_root_reports_toolchain(program: Program) -> None:
    program.root.write_text("a file")
    done = program.run(None, mode="probe")
    assert done.all(events.ToolchainProbed)
    assert done.status == 20
    assert b"cannot be written" in done.stderr


# A warm-up that works


def test_task_is_warmed_verified_and_judged_warm(program: Program) -> None:
    task = program.task()
    done = program.run(task)
    assert done.status == 0
    verdict = done.verdict
    assert (verdict.state, verdict.reason, verdict.proof) == ("warmed", "", "verified")
    assert verdict.added == verdict.entries
    assert verdict.added["deep_gemm"] > 8
    assert verdict.second_pass_added == 0
    assert len(verdict.shapes) == 3
    judged = markers.judge(
        program.root,
        task,
        record=program.record(),
        config_digest=config_digest(program.place, task.model, None)[0],
        strict=True,
    )
    assert (judged.state, judged.path) == ("warm", verdict.marker)
    assert [type(event) for event in done.events[-2:]] == [events.Verdict, events.End]


def test_marker_holds_observed_facts_unchanged(program: Program) -> None:
    observed = RunOrigin(host="h é", builder="0.1.0", image="org/image:tag", run="20261124-093647-ab12")
    done = program.run(program.command("pass"), observed=observed)
    found = json.loads((program.root / done.marker).read_text())["observed"]
    assert (found["host"], found["builder"], found["run"]) == ("h é", "0.1.0", "20261124-093647-ab12")
    assert found["image"] == "sha256:0f1e"


def test_second_run_adds_nothing_and_lists_used_entries(program: Program) -> None:
    first = program.run(program.task()).verdict
    again = program.run(program.task()).verdict
    assert (again.state, again.added) == ("warmed", {"deep_gemm": 0})
    assert again.entries == first.entries
    (marker,) = marker_files(program)
    assert len(json.loads(marker.read_text())["entries"]["deep_gemm"]) == first.entries["deep_gemm"]


def test_marker_lists_only_used_entries(program: Program) -> None:
    program.run(program.task())
    fewer = program.run(program.task(label="other", recipe="shapes", argv=(), shapes=(SHAPE,), m_values=(1, 64)))
    assert fewer.verdict.entries["deep_gemm"] > 2
    marker = json.loads((program.root / fewer.marker).read_text())
    assert len(marker["entries"]["deep_gemm"]) == 2


def test_serve_is_verified_by_second_server(program: Program) -> None:
    done = program.run(program.task(recipe="serve", argv=("--tp", "8", "--dp", "2"), requests=((4, 2), (600, 2))))
    assert done.verdict.reason == ""
    assert done.verdict.proof == "verified"
    assert done.verdict.added["triton"] == 2
    assert done.stderr.count(b"Uvicorn running on") == 2
    assert done.stderr.count(b"SIGTERM received") == 2
    assert b"crashed with exit code" not in done.stderr  # its workers were not signalled behind its back


def test_serve_with_steady_proof_is_warmed(program: Program) -> None:
    done = program.run(program.task(recipe="serve", verify="steady"))
    assert (done.status, done.verdict.proof, done.verdict.second_pass_added) == (0, "steady", None)
    assert done.stderr.count(b"Uvicorn running on") == 1


def test_shapes_use_m_list_of_server_flags(program: Program) -> None:
    argv = ("--dp", "8", "--enable-dp-attention")
    done = program.run(program.task(recipe="shapes", argv=argv, shapes=(SHAPE,)))
    assert done.verdict.proof == "verified"
    assert done.stdout.count(b"num_groups=1 over 1024 Ms") == 2
    assert done.log.count(b"warm-cache shapes: all 1 shapes done in ") == 2
    assert b"sweep" not in done.stdout + done.stderr


def test_command_is_run_twice_and_claims_families(program: Program) -> None:
    code = "from triton.cache import compile_kernel; compile_kernel('k', 'x'); print('KERNELS READY')"
    task = program.task(recipe="command", argv=("python3", "-c", code), success="^KERNELS READY$")
    done = program.run(task)
    assert done.verdict.added == {"triton": 1}
    assert done.verdict.proof == "verified"
    assert done.stdout.count(b"KERNELS READY") == 2


@pytest.mark.parametrize(
    ("hit", "reason"),
    [
        (False, "the second pass compiled 1 entry again (first: tvm_ffi/kernel_1/kernel.ptx): it did not use them"),
        (True, ""),
    ],
)
def test_command_rewriting_entry_in_place_is_not_verified(program: Program, hit: bool, reason: str) -> None:
    code = (
        "import os, pathlib, sys; folder = pathlib.Path(os.environ['TVM_FFI_CACHE_DIR'], 'kernel_1')\n"
        "folder.mkdir(exist_ok=True); kernel = folder / 'kernel.ptx'\n"
        "with (folder / 'build.log').open('a') as log: log.write('loaded')\n"
        "if sys.argv[1] == 'False' or not kernel.exists(): kernel.write_text('// kernel')\n"
    )
    done = program.run(program.command(code, str(hit), families=("tvm_ffi",)))
    assert done.verdict.reason == reason
    assert (done.status, done.verdict.proof) == ((0, "verified") if hit else (20, None))
    assert bool(marker_files(program)) == hit


def test_command_is_partial_while_damaged_entry_of_claimed_family_stays(program: Program) -> None:
    """It was written to just now, as after a kill: it may not be quarantined yet, and the program takes it for done."""
    code = (
        "import os, pathlib; folder = pathlib.Path(os.environ['TVM_FFI_CACHE_DIR'])\n"
        "for name in ('kernel_1', 'kernel_2'):\n"
        "    kernel = folder / name / 'kernel.ptx'\n"
        "    kernel.parent.mkdir(exist_ok=True)\n"
        "    if not kernel.exists(): kernel.write_text('// kernel')\n"
    )
    task = program.command(code, families=("tvm_ffi",))
    assert program.run(task).verdict.state == "warmed"
    (damaged,) = program.root.glob("tvm_ffi/*/kernel_1/kernel.ptx")
    damaged.write_text("")
    # By another label the same work has another marker.
    (older,) = marker_files(program)
    label, _, digest = older.parent.name.rpartition("-")
    other = older.parent.with_name(f"{label}-other-{digest}") / older.name
    other.parent.mkdir()
    other.write_text(older.read_text())
    done = program.run(task)
    assert (done.verdict.state, done.verdict.marker) == ("partial", None)
    assert "1 damaged entry could not be quarantined (first: kernel_1" in done.verdict.reason
    assert marker_files(program) == []
    os.utime(damaged, (1, 1))
    os.utime(damaged.parent, (1, 1))
    assert program.run(task).verdict.state == "warmed"


def test_command_without_claims_runs_once(program: Program) -> None:
    done = program.run(program.command("print('done')"))
    assert (done.verdict.proof, done.verdict.state) == ("nothing-claimed", "warmed")
    assert done.log.count(b"done\n") == 1


def test_command_with_inventory_proof_is_warmed(program: Program) -> None:
    done = program.run(program.task(verify="inventory"))
    assert (done.verdict.proof, done.verdict.second_pass_added) == ("inventory", None)
    assert b"warm-cache shapes:" not in done.stdout


# What goes wrong


@pytest.mark.parametrize(
    ("play", "status", "state", "reason"),
    [
        (
            "crash-exit-0",
            20,
            "failed",
            'crash: "Scheduler hit an exception" (RuntimeError: a test double plays a crash)',
        ),
        ("crash-hang", 20, "failed", 'crash: "Scheduler hit an exception" (RuntimeError: a test double plays a crash)'),
        (
            "exit-3",
            20,
            "failed",
            "exit status 3 without the line 'DeepGEMM Kernels compilation finished successfully.'",
        ),
        (
            "exit-0",
            20,
            "failed",
            "exit status 0 without the line 'DeepGEMM Kernels compilation finished successfully.'",
        ),
        ("no-kernels", 20, "failed", "deep_gemm is required and it holds no valid entry"),
        ("reducing-always", 21, "partial", "sglang reduced max_m for lack of memory"),
        ("dies-in-second-pass", 20, "failed", "second pass: 0 of 3 shapes done (first: <G"),
        (
            "grows-in-second-pass",
            20,
            "failed",
            "the second pass added 3 entries (first: deep_gemm/cache/sm90_fp8_gemm_",
        ),
    ],
)
def test_second_pass_adding_entries_writes_no_marker(
    program: Program, play: str, status: int, state: str, reason: str
) -> None:
    done = program.run(program.task(play))
    assert (done.status, done.verdict.state) == (status, state)
    assert done.verdict.reason.startswith(reason)
    assert done.verdict.marker is None
    assert isinstance(done.events[-1], events.End)
    assert not marker_files(program)


@pytest.mark.parametrize("play", ["grandchildren", "binary", "reducing", "flood"])
def test_noise_in_log_and_cache_changes_nothing(program: Program, play: str) -> None:
    environ = {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1", "TINY_PLAY": play, "TINY_LINES": "50000"}
    done = program.run(program.task(env=environ))
    assert (done.status, done.verdict.proof) == (0, "verified")
    assert done.stdout.count(b"flood ") == (50_000 if play == "flood" else 0)


def test_reduced_max_m_is_finished_by_shape_sweep(program: Program) -> None:
    done = program.run(program.task("reducing"))
    assert b"reducing max_m to 2048" in done.stderr
    assert done.stdout.count(b"num_groups=1 over 2560 Ms") == 4  # two dense shapes, finished and then proven


def test_success_line_without_entries_is_failed(program: Program) -> None:
    program.run(program.task(label="other"))
    done = program.run(program.task("no-kernels"))
    assert done.status == 20
    assert "none of its" in done.verdict.reason
    assert len(marker_files(program)) == 1


def test_sweep_over_other_m_list_is_partial(program: Program) -> None:
    code = (
        "from sglang.srt.layers.deep_gemm_wrapper import compile_utils as cu; from sglang import log\n"
        "log.info('Try DeepGEMM JIT Compiling for <GEMM_NT_F8F8BF16> N=64, K=64, num_groups=1 with all Ms.')\n"
        "cu._compile_deep_gemm_one_type_all(cu.DeepGemmKernelType.GEMM_NT_F8F8BF16, 64, 64, 1, list(range(1, 301)))\n"
        "print('DeepGEMM Kernels compilation finished successfully.')\n"
    )
    package = program.place / "other" / "sglang"
    package.mkdir(parents=True)
    site = program.environ["PYTHONPATH"].split(":")[1]
    (package / "__init__.py").write_text(f"__path__.append({site + '/sglang'!r})\n")
    (package / "compile_deep_gemm.py").write_text(code)
    done = program.run(program.task(), environ={"PYTHONPATH": f"{program.place / 'other'}:{ROOT}:{site}"})
    assert (done.status, done.verdict.proof) == (0, "inventory")
    assert "300 Ms" in done.verdict.reason
    assert json.loads((program.root / done.marker).read_text())["proof"] == "inventory"


def test_failing_shape_makes_task_partial(program: Program) -> None:
    done = program.run(program.task(recipe="shapes", argv=(), shapes=(SHAPE, Shape("NO_SUCH_KIND", 1, 1))))
    assert (done.status, done.verdict.state) == (21, "partial")
    assert "1 of 2 shapes done (first: <NO_SUCH_KIND>" in done.verdict.reason
    assert not marker_files(program)


CONTIG = Shape("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 64, 128, 32)


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_shape_worker_is_named_and_rest_continues(program: Program, workers: int) -> None:
    shapes = (CONTIG, SHAPE, Shape("GEMM_NT_F8F8BF16", 512, 256), Shape("GEMM_NT_F8F8BF16", 64, 64))
    environ = {"TINY_PLAY": "dies-at-contig", "TINY_COMPILE_SECONDS": "0.2"}
    task = program.task(env=environ, recipe="shapes", argv=(), shapes=shapes, m_values=(64, 128), workers=workers)
    done = program.run(task)
    assert (done.status, done.verdict.state) == (21, "partial")
    reason = done.verdict.reason
    assert reason.startswith(f"3 of 4 shapes done (first: <{CONTIG.kernel}> N=64, K=128, num_groups=32: its worker was")
    assert "killed by SIGKILL" in reason
    assert (b"[worker 2] " in done.log) == (workers == 3), "who says what is told where there are several"
    assert not marker_files(program)


def test_several_workers_make_same_entries_and_one_progress_bar(program: Program) -> None:
    shapes = tuple(Shape("GEMM_NT_F8F8BF16", 64 * number, 128) for number in range(1, 7))
    task = program.task(recipe="shapes", argv=(), shapes=shapes, workers=3)
    done = program.run(task)
    assert (done.status, done.verdict.proof, done.verdict.second_pass_added) == (0, "verified", 0)
    bars = done.all(events.Progress)
    assert {bar.total for bar in bars} == {6 * 2560}, "all shapes together, from the first word on"
    assert bars[-1].done == 6 * 2560
    assert b"DeepGEMM warmup:" not in done.stdout + done.stderr
    assert b"all 6 shapes done" in done.log and b"by 3 workers" in done.log and b"by 1 worker" in done.log
    names = {path.name for path in program.root.glob("deep_gemm/*/cache/*")}
    shutil.rmtree(program.root)
    assert program.run(replace(task, workers=1)).status == 0
    assert {path.name for path in program.root.glob("deep_gemm/*/cache/*")} == names


def test_each_worker_has_its_own_gpu(program: Program) -> None:
    watch = "import os, sys; print('worker sees', os.environ.get('CUDA_VISIBLE_DEVICES'), file=sys.stderr)\n"
    spy = program.place / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(f"import sys\nif 'report' in ' '.join(sys.orig_argv):\n    {watch}")
    shapes = tuple(Shape("GEMM_NT_F8F8BF16", 64 * number, 128) for number in range(1, 4))
    environ = {"TINY_COMPILE_SECONDS": "0.2"}
    task = program.task(env=environ, recipe="shapes", argv=(), shapes=shapes, m_values=(64,), gpus=2)
    done = program.run(task, environ={"PYTHONPATH": f"{spy}:{program.environ['PYTHONPATH']}"})
    assert done.status == 0, done.verdict
    assert b"[worker 0] worker sees 0\n" in done.log and b"[worker 1] worker sees 1\n" in done.log


def test_server_dying_before_health_is_failed(program: Program) -> None:
    done = program.run(program.task("exit-4", recipe="serve"))
    assert done.status == 20
    assert done.verdict.reason.startswith("the server ended before it was healthy: exit status 4")


@pytest.mark.parametrize(
    ("success", "reason"), [("^READY$", "exit status 0, but no line matched '^READY$'"), ("(", "success is no regular")]
)
def test_command_without_success_line_is_failed(program: Program, success: str, reason: str) -> None:
    done = program.run(program.command("print('not READY')", success=success))
    assert done.status == 20
    assert done.verdict.reason.startswith(reason)


def test_required_family_without_entries_is_failed(program: Program) -> None:
    done = program.run(program.command("pass", families=("triton",)))
    assert done.status == 20
    assert done.verdict.reason.startswith("triton is required and it holds no valid entry")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"recipe": "nonsense"}, "no recipe is called 'nonsense'"),
        ({"families": ("cuda",)}, "no claimable family is called 'cuda'"),
        ({"families": ("what",)}, "no claimable family is called 'what'"),
        ({"recipe": "shapes"}, "the task names no shapes"),
        ({"recipe": "command", "argv": ()}, "the task has no command"),
    ],
)
def test_impossible_task_is_failed_with_reason(program: Program, fields: dict[str, Any], reason: str) -> None:
    done = program.run(program.task(**fields))
    assert done.status == 20
    assert done.verdict.reason == reason
    assert b"Traceback" not in done.stderr


def test_read_only_root_fails_the_task(program: Program) -> None:
    program.root.write_text("a file")
    done = program.run(program.task())
    assert done.status == 20
    assert "cannot be written" in done.verdict.reason
    assert b"Traceback" not in done.stderr


# Models


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_model_skips_the_task(program: Program, missing: str) -> None:
    (program.model / missing).unlink()
    done = program.run(program.task())
    assert (done.status, done.verdict.state) == (22, "skipped")
    assert str(program.model) in done.verdict.reason


def test_dummy_weights_without_checkpoint_warm(program: Program) -> None:
    (program.model / "model.safetensors").unlink()
    argv = ("--tp", "8", "--model-loader-extra-config", '{"num_threads": 64}')
    done = program.run(program.task(argv=argv, load="dummy", layers=4))
    assert done.status == 0
    assert b"'load_format': 'dummy'" in done.stderr
    assert b'{"num_hidden_layers": 4}' in done.stderr


def test_dangling_store_link_skips_the_task(program: Program) -> None:
    home = program.place / "hf" / "hub" / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc" / "config.json").write_text("{}")
    (home / "snapshots" / "abc" / "model.safetensors").symlink_to("/nowhere/model.safetensors")
    task = program.task(model="org/name")
    environ = {"HF_HOME": str(program.place / "hf")}
    assert program.run(task, environ=environ).verdict.state == "skipped"
    (home / "snapshots" / "abc" / "more.bin").write_text("weights")
    assert program.run(task, environ=environ).verdict.state == "warmed"


def test_empty_writable_store_is_accepted(program: Program) -> None:
    env = {"HF_HUB_OFFLINE": "0", "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
    assert program.run(program.task(model="org/absent", env=env)).status == 0


# Surroundings


def test_child_environment_has_family_variables_and_no_job(program: Program) -> None:
    code = "import json, os; json.dump(dict(os.environ), open('environ', 'w'))"
    env = {"TRITON_CACHE_DIR": "/elsewhere", "MINE": "1", "HF_HUB_OFFLINE": "0"}
    done = program.run(program.command(code, env=env))
    seen = json.loads((program.place / "environ").read_text())
    key = done.all(events.Started)[0].family_keys["triton"]
    assert seen["TRITON_CACHE_DIR"] == f"{program.root}/triton/{key}"
    assert (seen["MINE"], seen["HF_HUB_OFFLINE"], seen["PYTHONUNBUFFERED"]) == ("1", "0", "1")
    assert JOB_VARIABLE not in seen
    assert not Path(seen["HF_MODULES_CACHE"]).parent.exists()  # private to the run, and gone with it
    factors = json.loads((program.root / "triton" / f"{key}.json").read_text())["factors"]
    assert factors["mount"] == str(program.root)


def test_leftovers_and_host_specific_files_are_removed(program: Program) -> None:
    start = program.run(program.command("pass")).all(events.Started)[0]
    keys = start.family_keys
    build = program.root / "deep_gemm" / keys["deep_gemm"] / "tmp" / "7-dead"
    build.mkdir(parents=True)
    young = build.with_name("8-alive")
    young.mkdir()
    broken = program.root / "deep_gemm" / keys["deep_gemm"] / "cache" / "k.00000000000000000000000000000000"
    broken.mkdir(parents=True)
    os.utime(build, (time.time() - 3600,) * 2)
    os.utime(broken, (time.time() - 3600,) * 2)
    host = program.root / "sglang_cache" / keys["sglang_cache"] / "gpu_p2p_access_cache_for_0,1.json"
    host.write_text("{}")
    done = program.run(program.task())
    assert {(event.family, event.path) for event in done.all(events.Quarantined)} == {
        ("deep_gemm", "tmp/7-dead"),
        ("deep_gemm", "cache/k.00000000000000000000000000000000"),
    }
    assert not build.exists()
    assert young.exists()
    assert not host.exists()
    assert len(list((program.root / "aside" / f"deep_gemm-{keys['deep_gemm']}").iterdir())) == 2


def test_families_are_locked_shared_during_run(program: Program) -> None:
    code = (
        "import fcntl, glob, sys\n"
        "paths = glob.glob('jit/locks/*-*.lock')\n"
        "def refused(path, kind):\n"
        "    try: fcntl.flock(open(path), kind | fcntl.LOCK_NB)\n"
        "    except BlockingIOError: return True\n"
        "print(len(paths), *(sum(bool(refused(p, kind)) for p in paths) for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH)))"
    )
    done = program.run(program.command(code))
    count = len(done.all(events.Started)[0].family_keys)
    assert f"{count} {count} 0\n".encode() in done.log


def test_root_full_of_garbage_is_warmed(program: Program) -> None:
    start = program.run(program.command("pass")).all(events.Started)[0]
    for family, key in start.family_keys.items():
        folder = program.root / family / key
        (folder / "cache").mkdir(exist_ok=True)
        (folder / "cache" / "what.json").write_bytes(b"\xff")
        (folder / "loop").symlink_to(folder)
        os.mkfifo(folder / "fifo")
    for place in ("images", "markers", "locks"):
        (program.root / place / "garbage").mkdir()
    assert program.run(program.task()).status == 0
