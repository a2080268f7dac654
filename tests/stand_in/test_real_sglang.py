"""The whole program on real sglang, real DeepGEMM and real compilers. No kernel is run: the stand-in has no GPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builder.cache.families import FAMILIES
from builder.manifest.load import Overrides, load
from builder.task import Task

pytestmark = [pytest.mark.stand_in, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]

#: Few Ms: what is proven here is that entries are real, not how many there are.
MANIFEST = """
schema = 1
[image]
ref = "{image}"
[container]
network = "none"
shm_size = "1g"
[gpus]
count = 0
[defaults]
recipe = "shapes"
env = {{ LD_PRELOAD = "/opt/standin/stubs/fakert.so", FAKE_CUDA_DEVICES = "1" }}
[[task]]
model = "stand-in/dense"
shapes = ["GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"]
m_values = [64, 128]
[[task]]
model = "stand-in/triton"
recipe = "command"
argv = ["python3", "/opt/standin/tri.py"]
success = "TRITON KERNEL READY"
families = ["triton"]
env = {{ TRITON_DEFAULT_FP_FUSION = "1" }}
"""


@dataclass
class Run:
    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    def task(self, label: str) -> dict[str, Any]:
        return next(task for task in self.document["tasks"] if task["label"] == label)


def warm_cache(*arguments: object, environ: dict[str, str] | None = None) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", "builder", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


@dataclass
class Warmed:
    manifest: Path
    cache: Path
    first: Run


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory, stand_in_image: str) -> Warmed:
    """A cache that the program warmed by real compilation, once for all tests here."""
    folder = tmp_path_factory.mktemp("stand-in")
    manifest = folder / "manifest.toml"
    manifest.write_text(MANIFEST.format(image=stand_in_image))
    cache = folder / "cache"
    run = warm_cache("warm", "--manifest", manifest, "--cache", cache, "--log-dir", folder / "logs", "--json")
    assert run.status == 0, run.err
    return Warmed(manifest, cache, run)


@pytest.fixture
def copy(warmed: Warmed, tmp_path: Path) -> Path:
    """A copy of the warmed cache, to be damaged."""
    return Path(shutil.copytree(warmed.cache, tmp_path / "cache", symlinks=True))


def kernels(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("deep_gemm/*/cache/*") if path.is_dir())


def test_real_kernels_are_compiled_and_verified(warmed: Warmed) -> None:
    dense, triton = warmed.first.task("dense"), warmed.first.task("triton")
    assert dense["state"] == "warmed" and dense["verified"] is True
    assert dense["entries_added"] == len(kernels(warmed.cache)) >= 2
    assert triton["state"] == "warmed" and triton["entries"]["triton"] >= 1
    for kernel in kernels(warmed.cache):
        cubin = (kernel / "kernel.cubin").read_bytes()
        assert cubin[:4] == b"\x7fELF" and int.from_bytes(cubin[18:20], "little") == 190, "EM_CUDA"
        assert "sm_90a" in (kernel / "meta.json").read_text()


def test_real_second_run_is_warm(warmed: Warmed) -> None:
    run = warm_cache("warm", "--manifest", warmed.manifest, "--cache", warmed.cache, "--json")
    assert run.status == 0
    assert [task["state"] for task in run.document["tasks"]] == ["warm", "warm"]
    assert warm_cache("check", "--strict", "--manifest", warmed.manifest, "--cache", warmed.cache).status == 0


def drop_committed(cache: Path) -> str:
    (kernels(cache)[0] / ".committed").unlink()
    return "0 missing, 1 invalid"


def drop_cubin(cache: Path) -> str:
    (kernels(cache)[0] / "kernel.cubin").unlink()
    return "0 missing, 1 invalid"


def drop_cubin_and_committed(cache: Path) -> str:
    (kernels(cache)[0] / ".committed").unlink()
    return drop_cubin(cache)


def empty_cubin(cache: Path) -> str:
    (kernels(cache)[0] / "kernel.cubin").write_bytes(b"")
    return "0 missing, 1 invalid"


def cut_cubin(cache: Path) -> str:
    cubin = kernels(cache)[0] / "kernel.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-512])
    return "0 missing, 1 invalid"


def drop_entry(cache: Path) -> str:
    shutil.rmtree(kernels(cache)[0])
    return "1 missing, 0 invalid"


@pytest.mark.parametrize(
    "damage", [drop_committed, drop_cubin, drop_cubin_and_committed, empty_cubin, cut_cubin, drop_entry]
)
def test_real_check_names_broken_entry(warmed: Warmed, copy: Path, damage: Callable[[Path], str]) -> None:
    name = kernels(copy)[0].name
    counts = damage(copy)
    run = warm_cache("check", "--manifest", warmed.manifest, "--cache", copy, "--json")
    assert run.status == 10
    assert run.task("triton")["state"] == "warm"
    assert re.match(rf"entries: {counts} \(first: deep_gemm/cache/{re.escape(name)}", run.task("dense")["reason"])


def test_real_check_names_triton_kernels_of_other_mount(warmed: Warmed, copy: Path) -> None:
    """Triton's group files hold absolute paths: a cache that was filled under another mount path is not this one."""
    group = next(copy.glob("triton/*/*/__grp__*.json"))
    group.write_text(group.read_text().replace("/jit/", "/elsewhere/"))
    run = warm_cache("check", "--manifest", warmed.manifest, "--cache", copy, "--json")
    assert run.status == 10 and run.task("dense")["state"] == "warm"
    assert run.task("triton")["reason"].startswith("entries: 0 missing, 1 invalid (first: triton/")


def test_real_leftovers_of_kill_stay_warm(warmed: Warmed, copy: Path) -> None:
    root = kernels(copy)[0].parents[1]
    (root / "tmp" / "0d7c").mkdir(parents=True)
    (root / "tmp" / "0d7c" / "kernel.cu").write_text("half")
    (root / "rw:").mkdir()
    assert warm_cache("check", "--manifest", warmed.manifest, "--cache", copy).status == 0


def test_real_damaged_entry_alone_is_recompiled(warmed: Warmed, copy: Path, tmp_path: Path) -> None:
    drop_cubin(copy)
    run = warm_cache(
        "warm",
        "--manifest",
        warmed.manifest,
        "--cache",
        copy,
        "--log-dir",
        tmp_path / "logs",
        "--json",
        "--only",
        "dense",
    )
    assert run.status == 0, run.err
    assert run.task("dense")["entries_added"] == 1
    assert "quarantined deep_gemm/" in run.err
    assert warm_cache("check", "--manifest", warmed.manifest, "--cache", copy).status == 0


#: What a test job asks of the two families: the kernels of the task `dense`, through sglang, and Triton's.
JOB = """
from sglang.srt.layers.deep_gemm_wrapper import compile_utils as c
c._compile_deep_gemm_one_type_all(c.DeepGemmKernelType.GEMM_NT_F8F8BF16, 4096, 7168, 1, [64, 128])
"""
#: Where sglang looks for its caches, whatever it has made of the variables.
LOOKS = """
import json, os
print("LOOKS", json.dumps({name: value for name, value in os.environ.items() if value.startswith("/jit/")}))
"""
JIT = f"python3 -c {shlex.quote(JOB)} && TRITON_DEFAULT_FP_FUSION=1 python3 /opt/standin/tri.py"


def entries(cache: Path) -> dict[str, int]:
    """Every file of every family but locks, with the time of its last change of content: a hit only touches a stamp."""
    return {
        str(path.relative_to(cache)): 0 if path.name == ".committed" else path.stat().st_mtime_ns
        for family in FAMILIES
        for path in (cache / family.name).glob("*/**/*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def in_container(docker_host: str, image: str, arguments: list[str], script: str) -> str:
    """What a shell in a container of the serving image says, which has to succeed."""
    command = ["docker", "-H", docker_host, "run", "--rm", "--init", "--network", "none", *arguments]
    done = subprocess.run([*command, image, "sh", "-ec", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def work(task: Task) -> str:
    """The work of a task in words of its own, as a test job would do it."""
    if task.recipe == "command":
        return shlex.join(task.argv)
    asks = [
        f"c._compile_deep_gemm_one_type_all(c.DeepGemmKernelType.{shape.kernel}, {shape.n}, {shape.k}, {shape.groups}, "
        f"{list(task.m_values)})"
        for shape in task.shapes
    ]
    code = ["from sglang.srt.layers.deep_gemm_wrapper import compile_utils as c", *asks, LOOKS]
    return f"python3 -c {shlex.quote(chr(10).join(code))}"


def test_real_job_hits_every_task_of_the_profile_under_its_own_env(
    warmed: Warmed, copy: Path, docker_host: str, stand_in_image: str, tmp_path: Path
) -> None:
    profile = ["--profile", "stand-in", "--image", stand_in_image, "--cache", copy]
    done = warm_cache("warm", *profile, "--log-dir", tmp_path / "logs")
    assert done.status == 0, done.err
    before = entries(copy)
    for task in load(profile="stand-in", overrides=Overrides(cache=str(copy))).tasks:
        printed = warm_cache("env", *profile, "--only", task.label)
        assert printed.status == 0 and "warning" not in printed.err, printed.err
        said = in_container(docker_host, warmed.first.document["image"]["id"], shlex.split(printed.out), work(task))
        if task.recipe == "command":
            assert task.success is not None and task.success in said
        else:
            looks = json.loads(re.search("^LOOKS (.*)$", said, re.MULTILINE)[1])  # type: ignore[index]
            words = [word for word in shlex.split(printed.out) if re.match("[A-Z_]+=/jit/", word)]
            assert looks == dict(word.split("=", 1) for word in words)
    assert before and entries(copy) == before
    every = warm_cache("env", *profile)
    assert "TRITON_DEFAULT_FP_FUSION is not set here, because only triton has it" in every.err
    elsewhere = in_container(
        docker_host,
        warmed.first.document["image"]["id"],
        ["-e", "LD_PRELOAD=/opt/standin/stubs/fakert.so", "-e", "DG_JIT_CACHE_DIR=/tmp/cold"],
        f"SGLANG_DG_CACHE_DIR=/tmp/cold python3 -c {shlex.quote(JOB)}; ls /tmp/cold/cache | wc -l",
    )
    assert int(elsewhere.split()[-1]) >= 2, "without them it compiles, so that nothing above is empty"


def test_real_here_check_agrees_with_host(warmed: Warmed, copy: Path, docker_host: str, tmp_path: Path) -> None:
    """A runner's container, with the cache mounted and a copied folder: what the host warmed is warm in there."""
    shutil.copytree(ROOT / "builder", tmp_path / "copied" / "builder", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(warmed.manifest, tmp_path / "copied" / "manifest.toml")
    mounts = ["-v", f"{copy}:/jit", "-v", f"{tmp_path}/copied:/copied:ro"]
    image = warmed.first.document["image"]["id"]
    here = "PYTHONPATH=/copied:$PYTHONPATH PYTHONDONTWRITEBYTECODE=1 python3 -m builder"
    before = entries(copy)
    options = "--here --manifest /copied/manifest.toml --cache /jit"
    document = json.loads(in_container(docker_host, image, mounts, f"{here} check --strict {options} --json"))
    assert [task["state"] for task in document["tasks"]] == ["warm", "warm"]
    states = {family["family"]: family["state"] for family in document["families"]}
    assert states["deep_gemm"] == states["triton"] == "found"
    assert states["flashinfer"] == "found" and document["image"]["id"] is None, "nobody has said which image this is"
    said = in_container(docker_host, image, mounts, f'eval "$({here} env {options} --format shell)"; {JIT}')
    assert "TRITON KERNEL READY" in said
    assert before and entries(copy) == before
    host = warm_cache("env", "--format", "json", "--manifest", warmed.manifest, "--cache", copy)
    variables = json.loads(host.out)["env"]
    named = [*mounts, "-e", f"WARM_CACHE_IMAGE_ID={variables['WARM_CACHE_IMAGE_ID']}"]
    document = json.loads(in_container(docker_host, image, named, f"{here} check {options} --json"))
    assert {family["state"] for family in document["families"]} == {"found"}
    assert document["toolchain"] == warmed.first.document["toolchain"]


#: Makes of the image's sglang an editable install of a checkout at another commit. Links: a copy takes its time.
CHECKOUT = """
site=/opt/standin/venv/lib/python3.11/site-packages
mkdir -p /tree/.git /tree/python && cp -rs $site/sglang /tree/python/sglang
echo {commit} > /tree/.git/HEAD
rm -r $site/sglang-0.5.23.dist-info
new=$site/sglang-0.5.23.dev7+g{commit:.9}.dist-info && mkdir $new
printf 'Metadata-Version: 2.1\\nName: sglang\\nVersion: 0.5.23.dev7+g{commit:.9}\\n' > $new/METADATA
echo '{{"url": "file:///tree/python", "dir_info": {{"editable": true}}}}' > $new/direct_url.json
export PYTHONPATH=/tree/python:/copied:$PYTHONPATH PYTHONDONTWRITEBYTECODE=1
"""
#: A change after which sglang asks DeepGEMM for another size.
CHANGE = """
file=/tree/python/sglang/srt/layers/deep_gemm_wrapper/compile_utils.py
sed 's/^def _compile_deep_gemm_one_type_all(/def _compile_deep_gemm_one_type_all(t, n, k, g, m):\\n'\\
'    return _as_before(t, 512, k, g, [64])\\n\\n\\ndef _as_before(/' $file > /tmp/changed && mv /tmp/changed $file
"""


def test_real_checkout_at_another_commit_is_warm(warmed: Warmed, copy: Path, docker_host: str, tmp_path: Path) -> None:
    """What sglang's own CI does: each commit is another build, in a container of an older image."""
    shutil.copytree(ROOT / "builder", tmp_path / "copied" / "builder", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(warmed.manifest, tmp_path / "copied" / "manifest.toml")
    commit = "b71d74673c" * 4
    options = "--here --manifest /copied/manifest.toml --cache /jit"
    run = "python3 -m builder"
    before = entries(copy)
    script = f"""{CHECKOUT.format(commit=commit)}
{run} check {options} --strict --json > /out/other.json
eval "$({run} env {options} --format shell)"
{JIT}
find /jit/deep_gemm /jit/triton -newer /out/other.json -type f ! -name .committed ! -name '*.lock' > /out/added
{CHANGE}
{run} check {options} --json > /out/changed.json
{run} check {options} --build same || echo $? > /out/same
{run} audit --here --cache /jit --before /out/before
python3 -c {shlex.quote(JOB)}
{run} audit --here --cache /jit --after /out/before --json > /out/audit.json
"""
    (tmp_path / "out").mkdir(mode=0o777)
    mounts = ["-v", f"{copy}:/jit", "-v", f"{tmp_path}/copied:/copied:ro", "-v", f"{tmp_path}/out:/out"]
    in_container(docker_host, warmed.first.document["image"]["id"], mounts, script)

    def written(name: str) -> Any:
        return json.loads((tmp_path / "out" / name).read_text())

    for task in written("other.json")["tasks"]:
        assert (task["state"], task["build"], task["kernel_sources"]) == ("warm", "other", "same")
        assert 0 <= task["proof_age"] < 3600
    assert (tmp_path / "out" / "added").read_text() == "", "DeepGEMM and Triton compiled nothing"
    changed = written("changed.json")
    assert {(task["state"], task["kernel_sources"]) for task in changed["tasks"]} == {("warm", "changed")}
    warning = "1 kernel-relevant file differs: expect compilation in deep_gemm"
    assert any(warning in text for text in changed["warnings"]), changed["warnings"]
    assert (tmp_path / "out" / "same").read_text() == "10\n"
    findings = written("audit.json")["audit"]["findings"]
    assert [(finding["kind"], finding["family"]) for finding in findings] == [("compiled", "deep_gemm")]
    assert {name: entries(copy).get(name) for name in before} == before


#: What sglang does for one shape: its lock, then its loop.
ASK = """
from sglang.srt.layers.deep_gemm_wrapper import compile_utils as c
kind = c.DeepGemmKernelType.GEMM_NT_F8F8BF16
def ask(n, k, ms):
    with c._local_rank_compile_lock(kind, n, k, 1):
        c._compile_deep_gemm_one_type_all(kind, n, k, 1, ms)
ask(4096, 7168, [64, 128])
"""


def test_real_view_job_hits_and_keeps_new_kernels_in_view(warmed: Warmed, copy: Path, docker_host: str) -> None:
    """sglang's locks want a place that can be written to: a read-only mount of a warm cache would crash it."""
    where = ["--manifest", warmed.manifest, "--cache", copy]
    before = {str(path): path.read_bytes() for path in kernels(copy)[0].iterdir()}

    def job(name: str, code: str) -> dict[str, Any]:
        printed = warm_cache("view", "create", name, *where)
        assert printed.status == 0, printed.err
        run = ["docker", "-H", docker_host, "run", "--rm", "--init", "--network", "none", *shlex.split(printed.out)]
        run += ["-e", "LD_PRELOAD=/opt/standin/stubs/fakert.so", warmed.first.document["image"]["id"]]
        done = subprocess.run([*run, "python3", "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = warm_cache("view", "audit", name, *where, "--json").document["audit"]
        return found

    try:
        hits = job("hits", ASK)
        assert (hits["jit"], hits["findings"], hits["used"]) == (0, [], len(kernels(copy)))
        made = job("makes", ASK + "ask(512, 7168, [64])\n")
        shapes = {row["shape"] for row in made["findings"]}
        assert made["jit"] == len(made["findings"]) >= 1 and shapes == {"GEMM_NT_F8F8BF16 N=512, K=7168, num_groups=1"}
        assert made["seconds"] > 1
        assert {str(path): path.read_bytes() for path in kernels(copy)[0].iterdir()} == before
    finally:
        for name in ("hits", "makes"):
            warm_cache("view", "drop", name, *where)


SERVE = """
schema = 1
[image]
ref = "{image}"
[container]
network = "none"
shm_size = "1g"
[gpus]
count = 0
[defaults]
env = {{ SGLANG_USE_CPU_ENGINE = "1" }}
timeout = "5m"
[[task]]
model = "/opt/standin/tiny"
recipe = "{recipe}"
verify = "inventory"
requests = [[4, 8], [64, 8]]
argv = ["--device", "cpu", "--load-format", "dummy", "--attention-backend", "torch_native", "--sampling-backend",
  "pytorch", "--mem-fraction-static", "0.2", "--max-total-tokens", "4096"]
"""


def serve_manifest(tmp_path: Path, image: str, recipe: str) -> Path:
    text = SERVE.format(image=image, recipe=recipe)
    if recipe != "serve":
        text = text.replace("requests = [[4, 8], [64, 8]]\n", "")
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(text)
    return manifest


#: What sglang's JIT modules, Triton's driver module and FlashInfer look for while they compile.
TOOLS = """
import importlib.metadata as metadata, os, shutil, sysconfig
from packaging.requirements import Requirement
wanted = [Requirement(text) for text in metadata.requires("torch") if text.startswith("triton")]
assert all(metadata.version(each.name) in each.specifier for each in wanted), metadata.version("triton")
assert shutil.which("ninja") and shutil.which("c++")
assert os.path.isfile(sysconfig.get_path("include") + "/Python.h")
assert os.path.isfile(os.environ["CUDA_HOME"] + "/lib64/libcudart.so")
"""


def test_real_image_has_what_jit_looks_for(docker_host: str, stand_in_image: str) -> None:
    command = ["docker", "-H", docker_host, "run", "--rm", "--network", "none", stand_in_image, "python3", "-c", TOOLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_real_server_answers_and_is_warmed(tmp_path: Path, stand_in_image: str) -> None:
    manifest = serve_manifest(tmp_path, stand_in_image, "serve")
    run = warm_cache(
        "warm", "--manifest", manifest, "--cache", tmp_path / "cache", "--log-dir", tmp_path / "logs", "--json"
    )
    assert run.status == 0, run.err[-3000:]
    assert run.document["tasks"][0]["state"] == "warmed"
    log = Path(run.document["tasks"][0]["log"]).read_text()
    assert "The server is fired up and ready to roll!" in log


def test_real_server_with_dummy_weights_starts(tmp_path: Path, stand_in_image: str) -> None:
    """The checkpoint is not there (the image has a config.json and a tokenizer), nor is a flag that would read it."""
    text = serve_manifest(tmp_path, stand_in_image, "serve").read_text()
    text = text.replace('"--load-format", "dummy", ', "'--model-loader-extra-config', '{\"num_threads\": 8}', ")
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(text.replace('recipe = "serve"', 'recipe = "serve"\nload = "dummy"\nlayers = 1'))
    run = warm_cache(
        "warm", "--manifest", manifest, "--cache", tmp_path / "cache", "--log-dir", tmp_path / "logs", "--json"
    )
    assert run.status == 0, run.err[-3000:]
    task = run.document["tasks"][0]
    assert (task["state"], task["loaded"]) == ("warmed", "dummy weights, 1 layer")
    log = Path(task["log"]).read_text()
    assert "'load_format': 'dummy', 'model_loader_extra_config': '{}'" in log
    assert "'json_model_override_args': '{\"num_hidden_layers\": 1}'" in log
    assert "The server is fired up and ready to roll!" in log


#: Asks the real libraries where they keep what they compile, and lets one of them begin (the image has no ninja).
WHERE = """
import contextlib, json, os
from sglang.srt.environ import envs
import sglang.srt.layers.deep_gemm_wrapper.compile_utils
from torch._inductor.runtime.cache_dir_utils import cache_dir
import triton
import tvm_ffi.cpp
with contextlib.suppress(FileNotFoundError):
    tvm_ffi.cpp.load_inline("probe", cpp_sources="int one(int x) { return x + 1; }", functions=["one"])
print("WHERE " + json.dumps({
    "deep_gemm": [envs.SGLANG_DG_CACHE_DIR.get(), os.environ["DG_JIT_CACHE_DIR"]],
    "sglang_cache": [envs.SGLANG_CACHE_DIR.get()],
    "sglang_jit": [envs.SGLANG_JIT_CACHE_DIR.get()],
    "cute_dsl": [envs.SGLANG_CUTE_AOT_CACHE_DIR.get()],
    "inductor": [cache_dir()],
    "triton": [triton.knobs.cache.dir],
}))
"""


def test_real_libraries_compile_below_the_root(tmp_path: Path, stand_in_image: str) -> None:
    manifest = tmp_path / "manifest.toml"
    head = MANIFEST.format(image=stand_in_image).partition("[[task]]")[0]
    task = f"argv = ['python3', '-c', '''{WHERE}''']\nsuccess = 'WHERE'\nfamilies = []\n"
    manifest.write_text(f"{head}[[task]]\nmodel = 'stand-in/where'\nrecipe = 'command'\n{task}")
    run = warm_cache(
        "warm", "--manifest", manifest, "--cache", tmp_path / "cache", "--log-dir", tmp_path / "logs", "--json"
    )
    assert run.status == 0, run.err[-3000:]
    said = Path(run.task("where")["log"]).read_text().partition("WHERE ")[2].partition("\n")[0]
    for family, paths in json.loads(said).items():
        assert all(path.startswith(f"/jit/{family}/") for path in paths), (family, paths)
    assert run.task("where")["added"].keys() == {"tvm_ffi"} and run.task("where")["added_bytes"]["tvm_ffi"] > 100


def test_real_success_line_alone_is_no_proof(tmp_path: Path, stand_in_image: str) -> None:
    """On the CPU compile_deep_gemm prints its success line, exits 0, and compiles nothing at all."""
    manifest = serve_manifest(tmp_path, stand_in_image, "compile-deep-gemm")
    run = warm_cache(
        "warm", "--manifest", manifest, "--cache", tmp_path / "cache", "--log-dir", tmp_path / "logs", "--json"
    )
    assert run.status == 11
    task = run.document["tasks"][0]
    assert task["state"] == "failed" and "deep_gemm" in task["reason"], task
    assert "DeepGEMM Kernels compilation finished successfully." in Path(task["log"]).read_text()
    assert not list((tmp_path / "cache" / "markers").iterdir())


EIGHT = """
schema = 1
[image]
ref = "{image}"
[container]
network = "none"
shm_size = "1g"
[gpus]
count = {count}
name = "{name}"
[[task]]
model = "stand-in/devices"
recipe = "command"
argv = ["sh", "-c", "echo devices $NVIDIA_VISIBLE_DEVICES"]
success = "devices all|devices 0,1,2,3,4,5,6,7"
families = []
"""


@pytest.fixture(scope="module")
def eight_gpu_image(stand_in_image: str, docker_host: str) -> Iterator[str]:
    """The stand-in with eight pretended H200s, whoever looks."""
    tag = "warm-cache-test:eight"
    docker = ["docker", "-H", docker_host]
    text = f"FROM {stand_in_image}\nENV FAKE_CUDA_DEVICES=8\n"
    subprocess.run([*docker, "build", "-q", "-t", tag, "-"], input=text, text=True, check=True, capture_output=True)
    yield tag
    subprocess.run([*docker, "rmi", tag], check=False, capture_output=True)


@pytest.mark.parametrize(("count", "name", "status"), [(8, "H200", 0), (8, "B200", 12), (9, "H200", 12)])
def test_real_all_eight_gpus_are_requested(
    tmp_path: Path, eight_gpu_image: str, count: int, name: str, status: int
) -> None:
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(EIGHT.format(image=eight_gpu_image, count=count, name=name))
    run = warm_cache(
        "warm", "--manifest", manifest, "--cache", tmp_path / "cache", "--log-dir", tmp_path / "logs", "--json"
    )
    if run.status == 12 and "device driver" in run.err:
        pytest.skip("this engine has no GPU device driver, not even a fake one")
    assert run.status == status, run.err
    if status:
        assert "GPUs" in [problem["place"] for problem in run.document["error"]["problems"]]
