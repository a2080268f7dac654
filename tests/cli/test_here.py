"""--here: the program inside a test job, by a Python that has nothing but its standard library and a copied folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from builder import processes
from builder.cache import memos
from tests.actions import Runner
from tests.program import ROOT, TINY, assemble

IMAGE = "sha256:" + "0f1e" * 16
SHAPE = "GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"
DENSE = {"model": "org/dense", "recipe": "shapes", "shapes": [SHAPE], "m_values": [64]}
#: A process that asks sglang for the kernels of that task.
JIT = """
from sglang.srt.layers.deep_gemm_wrapper import compile_utils as c
c._compile_deep_gemm_one_type_all(
    kernel_type=c.DeepGemmKernelType.GEMM_NT_F8F8BF16, n=4096, k=7168, num_groups=1, m_list=[64]
)
"""
#: Starts the program with this folder and the job's packages on its path, and tells at the end what it loaded.
START = """
import os, sys
sys.path[:0] = sys.argv.pop(1).split(":")
from builder.__main__ import main
status = main()
foreign = {"docker", "requests", "rich", "tenacity", "psutil", "pynvml", "torch"} & set(sys.modules)
sys.exit(f"it loaded {foreign}" if foreign else status)
"""


class Job:
    """A test job's container: its packages, its compilers, its environment, and a cache root mounted at ``jit``."""

    def __init__(self, place: Path, site: Path) -> None:
        self.place, self.root, self.path = place, place / "jit", place / "manifest.json"
        self.tools = place / "tools"
        shutil.copytree(ROOT / "builder", place / "copy" / "builder", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(TINY, self.tools, ignore=shutil.ignore_patterns("src"))
        self._site = site
        self.environ = {
            "PATH": f"{self.tools}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(site),
            "HOME": str(place),
            "CUDA_HOME": str(place),
            "TMPDIR": str(place),
            "LC_ALL": "C.UTF-8",
        }
        self.manifest(DENSE)

    def manifest(self, *tasks: Mapping[str, Any], **sections: Mapping[str, Any]) -> None:
        """As JSON, which every Python can read."""
        cache = {"root": "/data/elsewhere", "mount": str(self.root)}
        usual = {"schema": 1, "image": {"ref": "tiny:1"}, "cache": cache, "gpus": {"count": 0}, "run": {"grace": "1s"}}
        self.path.write_text(json.dumps({**usual, **sections, "task": tasks}))

    def start(self, verb: str, *words: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        python = [sys.executable, "-S", "-I", "-c", START, f"{self.place / 'copy'}:{self._site}"]
        create = ["--create"] if verb == "warm" else []
        return subprocess.Popen(
            [*python, verb, *words, *create],
            cwd=self.place,
            env={**self.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, verb: str, *words: str, status: int, environ: Mapping[str, str] | None = None) -> tuple[str, str]:
        """stdout and stderr of one invocation with this manifest, which has to end with this status."""
        process = self.start(verb, "--here", "--manifest", str(self.path), *words, environ=environ)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, out + err
        assert "Traceback" not in err
        return out, err

    def document(self, verb: str, *words: str, status: int, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(verb, "--json", *words, status=status, environ=environ)[0])
        return found

    def warm(self, *words: str) -> None:
        self.run("warm", "--image", IMAGE, *words, status=0)

    def reasons(self, *words: str, environ: Mapping[str, str] | None = None) -> list[str]:
        return [task["reason"] for task in self.document("check", *words, status=10, environ=environ)["tasks"]]

    def nvcc(self, old: str, new: str) -> None:
        """Another compiler."""
        path = self.tools / "nvcc"
        path.write_text(path.read_text().replace(old, new))

    def entries(self) -> set[str]:
        return {path.name for path in self.root.glob("deep_gemm/*/cache/*")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("site"))


@pytest.fixture
def job(tmp_path: Path, site: Path) -> Job:
    return Job(tmp_path, site)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Job:
    """Warm; nobody changes it."""
    job = Job(tmp_path_factory.mktemp("warmed"), site)
    job.warm()
    return job


@pytest.fixture
def other(warmed: Job, tmp_path: Path, site: Path) -> Job:
    """A job elsewhere whose root has what the warm one has; another mount is another toolchain for Triton alone."""
    shutil.copytree(warmed.root, tmp_path / "jit", symlinks=True)
    return Job(tmp_path, site)


def test_here_copied_folder_checks_and_warms(job: Job) -> None:
    assert job.reasons() == [f"no-marker: there is no directory {job.root} here"]
    job.root.mkdir()
    assert job.reasons() == [f"no-marker: {job.root} is empty"]
    said = job.run("warm", "--image", IMAGE, status=0)[0]
    assert "dense: warmed" in said and "task   state" in said, "a table without a library"
    assert job.entries()
    document = job.document("check", "--strict", status=0)
    assert document["tasks"][0]["state"] == "warm" and document["toolchain"]
    assert "Nothing to do" in job.run("warm", status=0)[0], "and not even the image has to be known"


def test_here_names_differing_factor_per_family(other: Job) -> None:
    other.nvcc("V13.0.88", "V13.1.2")
    document = other.document("check", status=10)
    assert re.match(
        r"compile: deep_gemm is compiled anew \(nvcc 13\.0\.88 → 13\.1\.2\)", document["tasks"][0]["reason"]
    )
    families = {family["family"]: family for family in document["families"]}
    assert families["deep_gemm"]["state"] == "differs"
    (factor,) = families["deep_gemm"]["factors"]
    assert factor["factor"] == "deep_gemm_nvcc" and "V13.1.2" in factor["is"]
    assert families["inductor"]["state"] == "found", "it does not depend on nvcc"
    assert [factor["factor"] for factor in families["triton"]["factors"]] == ["mount"]
    said = other.run("explain", status=0)[0]
    assert "dense: cold, because compile: deep_gemm" in said


def test_here_without_manifest_compares_families(other: Job) -> None:
    process = other.start("check", "--here", "--cache", str(other.root))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 10, out + err
    assert "triton, " in err and " of this environment: not in " in err
    assert re.search(r"triton +differs +[0-9a-f]{16} +mount was \S+/jit is \S+/jit", out)


def test_here_switches_of_the_job_count(warmed: Job) -> None:
    switched = {"DG_JIT_WITH_LINEINFO": "1", "SGLANG_IS_IN_CI": "true", "SGLANG_DG_CACHE_DIR": "/elsewhere"}
    reasons = warmed.reasons(environ=switched)
    assert reasons == ["coverage: env DG_JIT_WITH_LINEINFO was absent is 1"]
    del switched["DG_JIT_WITH_LINEINFO"]
    assert warmed.document("check", status=0, environ=switched)["tasks"][0]["state"] == "warm"


def test_here_secret_is_no_switch(job: Job) -> None:
    job.run("warm", "--image", IMAGE, status=0, environ={"SGLANG_API_KEY": "sesame-open"})
    written = [path.read_bytes() for path in job.root.rglob("*.json")]
    assert written and not any(b"sesame-open" in text for text in written)


class TestImage:
    """Nothing inside a container says which image it was made of, and no family needs that."""

    def serve(self, job: Job, **commit: str) -> None:
        """A task that claims a family whose key once had the image."""
        code = (
            "import os, shutil; p = os.environ['FLASHINFER_WORKSPACE_BASE'] + '/cached_ops/op';"
            "os.makedirs(p, exist_ok=True); os.path.exists(p + '/op.so') or shutil.copy('/bin/true', p + '/op.so');"
            "print('READY')"
        )
        job.manifest(
            {
                "model": "org/ops",
                "recipe": "command",
                "argv": ["python3", "-c", code],
                "success": "READY",
                "families": ["flashinfer"],
            }
        )
        job.run("warm", "--image", IMAGE, status=0, environ=commit)

    def test_here_families_are_found_without_the_image(self, job: Job) -> None:
        self.serve(job)
        document = job.document("check", status=0)
        assert document["image"]["id"] is None and "nothing here says which build" in document["image_known"]
        families = {each["family"]: each["state"] for each in document["families"]}
        assert families["flashinfer"] == families["deep_gemm"] == "found"
        assert "FLASHINFER_WORKSPACE_BASE" in job.run("env", status=0)[0]
        job.run("warm", status=0)

    def test_here_other_compiler_is_another_cache(self, job: Job) -> None:
        self.serve(job)
        job.nvcc("V13.0.88", "V13.1.2")
        assert job.reasons()[0].startswith("compile: flashinfer is compiled anew (nvcc 13.0.88 → 13.1.2)")

    def test_here_image_variable_names_the_image(self, job: Job) -> None:
        self.serve(job)
        named = {"WARM_CACHE_IMAGE_ID": IMAGE}
        assert job.document("check", status=0, environ=named)["image"]["id"] == IMAGE

    def test_here_image_is_recognised_by_commit_and_factors(self, job: Job) -> None:
        commit = {"SGLANG_BUILD_COMMIT": "b71d74673c"}
        self.serve(job, **commit)
        document = job.document("check", status=0, environ=commit)
        assert document["image"]["id"] == IMAGE and "build b71d74673c" in document["image_known"]
        other = {"SGLANG_BUILD_COMMIT": "5d78fcde60"}
        assert "knows no image of build 5d78fcde60" in job.document("check", status=0, environ=other)["image_known"]
        memo = memos.memo_path(job.root, IMAGE)
        twin = memo.read_text().replace(IMAGE, "sha256:" + "a" * 64)
        (memo.parent / f"sha256-{'a' * 64}.json").write_text(twin)
        assert "2 images of build" in job.document("check", status=0, environ=commit)["image_known"]


def test_here_foreign_root_is_cold_with_reason(other: Job) -> None:
    os.mkfifo(other.root / "deep_gemm" / f"{'a' * 16}.json")
    (other.root / "triton" / f"{'b' * 16}.json").write_text("{")
    (other.root / "triton" / f"{'b' * 16}").mkdir()
    (other.root / "images" / "sha256-1.json").write_text('{"image": [], "memos": 3}')
    assert other.document("check", status=0)["tasks"][0]["state"] == "warm"
    (other.root / "layout.json").unlink()
    (other.root / "notes.txt").write_text("mine")
    assert other.reasons() == [f"no-marker: {other.root} is no cache root (notes.txt is in it)"]


@pytest.mark.parametrize("form", ["shell", "github", "json"])
def test_here_env_process_adds_no_entries(warmed: Job, form: str) -> None:
    text = warmed.run("env", "--format", form, status=0)[0]
    if form == "json":
        variables = json.loads(text)["env"]
        assert warmed.document("env", "--format", "json", status=0)["env"] == json.loads(text)
    elif form == "github":
        variables = dict(line.split("=", 1) for line in text.splitlines())
    else:
        variables = dict(word.split("=", 1) for word in shlex.split(text) if word != "export")
    before = warmed.entries()
    done = subprocess.run(
        [sys.executable, "-c", JIT], env={**warmed.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert warmed.entries() == before


#: The variable that each cache of sglang is found by, in wheels of these versions (srt/environ.py, deep_gemm_wrapper,
#: kernels/jit): the defaults moved below SGLANG_CACHE_DIR in 0.5.18, and what is set wins in all of them.
READ = {
    "0.5.17": "SGLANG_DG_CACHE_DIR TVM_FFI_CACHE_DIR TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR "
    "FLASHINFER_WORKSPACE_BASE TORCH_EXTENSIONS_DIR",
    "0.5.18": "SGLANG_DG_CACHE_DIR SGLANG_JIT_CACHE_DIR SGLANG_CACHE_DIR TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR "
    "CUDA_CACHE_PATH FLASHINFER_WORKSPACE_BASE TORCH_EXTENSIONS_DIR",
    "0.5.20": "SGLANG_DG_CACHE_DIR DG_JIT_CACHE_DIR SGLANG_JIT_CACHE_DIR SGLANG_CUTE_AOT_CACHE_DIR SGLANG_CACHE_DIR "
    "TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR CUDA_CACHE_PATH FLASHINFER_WORKSPACE_BASE TORCH_EXTENSIONS_DIR",
}


@pytest.mark.parametrize("version", READ)
def test_here_env_prints_every_family_variable(warmed: Job, version: str) -> None:
    text = warmed.run("env", "--format", "json", status=0, environ={"WARM_CACHE_IMAGE_ID": IMAGE})[0]
    variables = json.loads(text)["env"]
    for name in READ[version].split():
        assert Path(variables[name]).is_relative_to(warmed.root), name
    assert variables["SGLANG_DG_CACHE_DIR"] == variables["DG_JIT_CACHE_DIR"], "sglang sets the one to the other"


def test_here_env_docker_format_is_refused(warmed: Job) -> None:
    assert "--format docker starts a container" in warmed.run("env", "--format", "docker", status=2)[1]


def test_here_env_without_cache_prints_nothing(job: Job) -> None:
    out, err = job.run("env", status=10)
    assert out == "" and f"there is no directory {job.root} here" in err


def test_here_check_on_cold_warn_is_a_warning(job: Job) -> None:
    github = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_OUTPUT": str(job.place / "o"),
        "GITHUB_STEP_SUMMARY": str(job.place / "s"),
    }
    out, _ = job.run("check", "--on-cold", "warn", status=0, environ=github)
    assert "::warning title=dense cold::no-marker" in out and "::error" not in out
    assert "state=cold\n" in (job.place / "o").read_text()
    assert "| dense | 🟡 cold |" in (job.place / "s").read_text()
    out, _ = job.run("check", status=10, environ=github)
    assert "::error title=dense cold::no-marker" in out


def test_here_hold_runs_the_command(warmed: Job) -> None:
    process = warmed.start("hold", "--cache", str(warmed.root), "--", "sh", "-c", "echo held; exit 7")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (7, "held\n", "")


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="a later Python reads TOML by itself")
def test_here_python_without_tomli_reads_toml_by_pip() -> None:
    """A copied folder is enough for a packaged manifest there too."""
    pytest.importorskip("pip._vendor.tomli")
    code = "import sys; sys.modules['tomli'] = None\n"
    code += "from builder.manifest.load import load; print(len(load(profile='h200').tasks))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and int(done.stdout) > 1, done.stderr


def test_here_without_toml_reader_is_one_sentence(job: Job) -> None:
    """Python 3.10 has none."""
    job.path = job.place / "manifest.toml"
    job.path.write_text("schema = 1\n")
    blocked = START.replace("import os, sys", "import os, sys\nsys.modules['tomllib'] = sys.modules['tomli'] = None")
    code = blocked.replace("from builder", "import builder.manifest.document as d; d.HAS_TOML = False\nfrom builder", 1)
    if sys.version_info >= (3, 11):
        code = code.replace("sys.modules['tomllib'] = ", "")
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-I",
            "-c",
            code,
            str(job.place / "copy"),
            "check",
            "--here",
            "--manifest",
            str(job.path),
        ],
        env=job.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "json.dump(tomllib.load(" in done.stderr and "Traceback" not in done.stderr


# --- a warm-up that is ended early
# ---------------------------------------------------------------------------------------------------------------------

#: Two generations that leave their session and refuse SIGTERM.
HANGS = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
print("HANGING", flush=True)
open(f"hangs-{os.getpid()}", "w").close()
time.sleep(600)
"""


def hanging(job: Job, **task: Any) -> None:
    job.manifest(
        {
            "model": "org/hangs",
            "recipe": "command",
            "argv": ["python3", "-c", HANGS],
            "success": "NEVER",
            "families": [],
            **task,
        }
    )


def below(pid: int) -> set[int]:
    return processes.descendants(pid)


@pytest.fixture
def running(job: Job, until: Callable[..., None]) -> subprocess.Popen[str]:
    """A warm-up whose command hangs, with everything that it started."""
    hanging(job)
    process = job.start("warm", "--here", "--manifest", str(job.path), "--image", IMAGE)
    # Not by counting processes: compilers that are asked for their version are some, too.
    until(lambda: len(list(job.place.glob("hangs-*"))) == 3 or process.poll() is not None, what="a hanging command")
    return process


def gone(pids: set[int], until: Callable[..., None]) -> None:
    until(lambda: all(processes._state(pid) in ("", "Z") for pid in pids), seconds=10, what="the end of every process")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_here_warm_ended_leaves_no_process(
    job: Job, running: subprocess.Popen[str], until: Callable[..., None], signum: int, status: int
) -> None:
    pids = below(running.pid)
    began = time.monotonic()
    running.send_signal(signum)
    out, err = running.communicate(timeout=30)
    assert running.returncode == status, out + err
    assert time.monotonic() - began < 7.5
    gone(pids, until)
    if signum != signal.SIGKILL:
        assert "hangs: cold in" in out
    assert not list((job.root / "markers").glob("*/*"))


@pytest.mark.parametrize(
    ("task", "words", "status", "reason"),
    [
        ({"timeout": "2s"}, (), 11, "timeout: not finished after 2 s"),
        ({"silence": "1s"}, (), 11, "silence: no output for 1 s"),
        ({}, ("--budget", "2s"), 14, "budget: the run's budget ended while it was compiling"),
    ],
)
def test_here_warm_deadlines_hold(
    job: Job, task: dict[str, Any], words: tuple[str, ...], status: int, reason: str
) -> None:
    hanging(job, **task)
    document = job.document("warm", "--image", IMAGE, *words, status=status)
    assert document["tasks"][0]["reason"] == reason


def test_here_warm_failure_shows_log_tail(job: Job) -> None:
    job.manifest(
        {**DENSE, "env": {"TINY_PLAY": "exit-3"}},
        {
            "model": "org/fails",
            "recipe": "command",
            "argv": ["python3", "-c", "print('so near'); exit(3)"],
            "success": "READY",
        },
    )
    out, err = job.run("warm", "--image", IMAGE, status=11)
    assert "fails: failed: exit status 3" in out and "  │ so near" in out
    assert "1 failed" in err


def test_here_warm_second_waits_for_the_lock(
    job: Job, running: subprocess.Popen[str], until: Callable[..., None]
) -> None:
    pids = below(running.pid)
    err = job.run("warm", "--image", IMAGE, "--lock-timeout", "0s", status=15)[1]
    assert f"{job.root} is in use" in err
    running.kill()
    running.communicate(timeout=30)
    gone(pids, until)


#: Leaves a process in a session of its own, says whose it is, and fails or goes on for a while.
LEAVES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    open(f"left-{sys.argv[1]}-{os.getpid()}", "w").close()
    time.sleep(600)
if sys.argv[1] == "fails":
    while not os.path.exists("goes-on"):
        time.sleep(0.02)
    sys.exit(3)
open("goes-on", "w").close()
while not os.path.exists("end"):
    time.sleep(0.02)
print("READY")
"""


def left(job: Job, name: str) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in job.place.glob(f"left-{name}-*")}


def test_concurrent_task_outlives_the_end_of_another(job: Job, until: Callable[..., None]) -> None:
    """Only what the ended one left is killed with it."""
    usual = {"recipe": "command", "success": "READY", "families": []}
    tasks = [{"model": name, "argv": ["python3", "-c", LEAVES, name], **usual} for name in ("fails", "works")]
    job.manifest(*tasks, run={"grace": "1s", "parallel": 2})
    process = job.start("warm", "--here", "--manifest", str(job.path), "--image", IMAGE, "--json")
    until(lambda: left(job, "works") and left(job, "fails"), what="both tasks")
    gone(left(job, "fails"), until)
    assert not [pid for pid in left(job, "works") if processes._state(pid) in ("", "Z")]
    (job.place / "end").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 11, out + err
    states = {task["label"]: task["state"] for task in json.loads(out)["tasks"]}
    assert states == {"fails": "failed", "works": "warmed"}
    gone(left(job, "works"), until)
    assert "fails: failed: exit status 3" in err


def test_warm_reports_time_space_and_duplicates_as_on_the_host(job: Job) -> None:
    other = "GEMM_NT_F8F8BF16 N=512, K=7168, num_groups=1"
    job.manifest({**DENSE, "shapes": [SHAPE, other]}, {**DENSE, "shapes": [other, SHAPE]})
    document = job.document("warm", "--image", IMAGE, status=0)
    first, second = document["tasks"]
    assert sum(first["added_bytes"].values()) > 0
    assert second["reason"].startswith(f"the same work as {first['label']}")
    assert document["expected"]["never_timed"] == [first["label"]]
    document = job.document("warm", "--image", IMAGE, "--force", "--budget", "0.1s", status=0)
    assert document["tasks"][0]["reason"].startswith("budget: ")


def test_here_other_python_is_a_warning(job: Job) -> None:
    (job.tools / "python3").symlink_to("/bin/sh")
    assert f"python3 on PATH is {job.tools}/python3" in job.run("check", status=10)[0]


# --- the action, and the job of the example workflow for a runner that is a container
# ---------------------------------------------------------------------------------------------------------------------


def runner(job: Job, event: str) -> Runner:
    place = job.place / event
    place.mkdir()
    names = {
        "WARM_CACHE_INSIDE": "h200-container",
        "WARM_CACHE_MANIFEST": str(job.path),
        "WARM_CACHE_MOUNT": str(job.root),
        "WARM_CACHE_TEST": f"python3 -c '{JIT}' && echo TESTED in $DG_JIT_CACHE_DIR",
    }
    return Runner(place, job.environ, event, names)


def test_here_pre_test_workflow_checks(job: Job) -> None:
    """Cold is a warning for a pull request, whose tests run all the same; warmed, a push's tests find everything."""
    run = runner(job, "pull_request")
    job.environ["DG_JIT_CACHE_DIR"] = str(job.place / "private")
    found = run.job("pre-test.yml", "inside")
    assert found is not None and found["cache"]["state"] == "cold", run.log
    assert "::warning title=dense cold::" in run.log and f"TESTED in {job.place}/private" in run.log, run.log
    job.environ["WARM_CACHE_IMAGE_ID"] = IMAGE
    job.root.mkdir()
    run = runner(job, "push")
    good, outputs = run.action(mode="here-warm", manifest=str(job.path), budget="1m")
    assert good and outputs["state"] == "warm" and outputs["docker-args"] == "", run.log
    before = job.entries()
    run = runner(job, "schedule")
    found = run.job("pre-test.yml", "inside")
    assert found is not None and found["cache"]["state"] == "warm", run.log
    assert re.search(rf"TESTED in {job.root}/deep_gemm/[0-9a-f]{{16}}\n", run.log)
    assert before and job.entries() == before
    assert [step.status for step in run.steps] == [0, 0, 0, None, 0]


def test_here_workflow_cold_fails_a_push(job: Job) -> None:
    run = runner(job, "push")
    run.job("pre-test.yml", "inside")
    assert "::error title=dense cold::no-marker" in run.log and "TESTED" not in run.log
    assert [step.status for step in run.steps] == [0, 10, None, None, None]


def test_here_warm_with_linked_markers_is_refused(job: Job) -> None:
    job.warm()
    job.nvcc("V13.0.88", "V13.1.2")
    (job.root / "markers").rename(job.root / "kept")
    (job.root / "markers").symlink_to("kept")
    err = job.run("warm", "--image", IMAGE, status=12)[1]
    assert "cannot be written: markers: it is a symbolic link, which is not followed" in err


def test_here_prebuild_without_gpus_proves_nothing_and_leaves_nothing_to_compile(job: Job) -> None:
    """Neither a GPU nor the image's name is needed; the simulated GPU's driver is not compiled here."""
    (job.tools / "cc").write_text("#!/bin/sh\nexit 0\n")
    (job.tools / "cc").chmod(0o755)
    (job.place / "include").mkdir()
    (job.place / "include" / "cuda.h").touch()
    job.root.mkdir()
    job.manifest(DENSE, gpus={"count": 8, "name": "H200"})
    document = job.document("warm", "--prebuild-only", status=0)
    stage = document["prebuild"]
    assert (stage["state"], stage["made"]) == ("done", 2)
    assert {path.name for path in job.root.glob("deep_gemm/*/cache/*")} == job.entries() != set()
    assert [task["state"] for task in document["tasks"]] == ["cold"] and not list(job.root.glob("markers/*/*"))
    assert job.document("warm", "--prebuild-only", status=0)["prebuild"]["present"] == 2

    job.manifest({**DENSE, "shapes": ["GEMM_OF_NOBODY N=64, K=128, num_groups=1"]}, gpus={"count": 8, "name": "H200"})
    out, _ = job.run("warm", "--prebuild-only", status=11)
    assert "this sglang knows no such kernel type" in out
    job.manifest(DENSE, gpus={"count": 8, "name": "RTX"})
    assert "set name, or pretend, to one of H200, H100, B200" in job.run("warm", "--prebuild-only", status=2)[1]


def test_here_reset_gives_a_container_its_own_warm_cache(warmed: Job, tmp_path: Path) -> None:
    """By a copied folder and the standard library alone; the kernels are all there, and nothing else is."""
    own = tmp_path / "own"
    (own / "locks").mkdir(parents=True)
    (own / "layout.json").write_text("of an earlier job")
    process = warmed.start("here-reset", "--source", str(warmed.root), "--target", str(own), "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    found = json.loads(out)["reset"]
    assert found["copied"] > 0 and found["skipped"] == []
    assert {path.name for path in own.glob("deep_gemm/*/cache/*")} == warmed.entries()
    for options in ((), ("--source", "relative"), ("--source", str(warmed.root), "--target", str(warmed.root))):
        process = warmed.start("here-reset", *options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == (12 if "--target" in options else 2), out + err
        assert "Traceback" not in err
