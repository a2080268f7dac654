"""On a real Hopper GPU: does what was compiled without one have the names that it asks for, and does it load?

Runs wherever there is a GPU and sglang: in an image (WARM_CACHE_GPU_IMAGE, on the engine of DOCKER_HOST), else with
the Python of WARM_CACHE_GPU_PYTHON (default: ``python3``) right here. An H100 will do for an H200: DeepGEMM's kernels
depend on compute capability and number of SMs, which are the same.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder import events
from builder.job import JOB_VARIABLE, Job
from builder.task import PRETEND_VARIABLE, Shape, Task
from tests.program import NONCE, ROOT, Result

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

IMAGE = os.environ.get("WARM_CACHE_GPU_IMAGE", "")
PYTHON = os.environ.get("WARM_CACHE_GPU_PYTHON", "python3")

#: Of DeepSeek-V3 with tp 8; every kind that the pretended sweep is for.
TASK = Task(
    label="shapes",
    model="gpu/shapes",
    recipe="shapes",
    shapes=(
        Shape("GEMM_NT_F8F8BF16", 2112, 7168),
        Shape("GEMM_NT_F8F8BF16", 7168, 2048),
        Shape("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 4096, 7168, 32),
        Shape("GROUPED_GEMM_NT_F8F8BF16_MASKED", 4096, 7168, 32),
    ),
    m_values=(1, 16, 64, 128, 512, 1024, 4096),
)


def run(root: Path, task: Task) -> Result:
    """The in-container program, in the image or right here. root: the cache root, empty."""
    job = Job("run", NONCE, str(root), task=task, workdir="/").to_json()
    if IMAGE:
        gpus = [] if PRETEND_VARIABLE in task.env else ["--gpus", "device=0"]
        mounts = ["-v", f"{ROOT}:/opt/warm-cache:ro", "-v", f"{root}:{root}"]
        command = ["docker", "run", "--rm", "--init", "--network", "none", "--entrypoint", "python3", *gpus, *mounts]
        command += ["-e", JOB_VARIABLE, "-w", "/opt/warm-cache", IMAGE, "-m", "builder.agent"]
    else:
        command = [PYTHON, "-m", "builder.agent"]
    env = {**os.environ, JOB_VARIABLE: job}
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=1500)
    found = Result(done.returncode, done.stdout, done.stderr, 0.0)
    assert done.returncode == 0, (found.all(events.Verdict), done.stdout[-3000:], done.stderr[-3000:])
    return found


def kernels(root: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in root.glob("deep_gemm/*/cache/*/.committed")}


@pytest.fixture(scope="module")
def cuda() -> Iterator[ctypes.CDLL]:
    """The driver, with a context on the first GPU, which is a Hopper one."""
    driver = ctypes.CDLL("libcuda.so.1")
    major = ctypes.c_int()
    assert driver.cuInit(0) == 0
    assert driver.cuDeviceGetAttribute(ctypes.byref(major), 75, 0) == 0
    if major.value != 9:
        pytest.skip(f"the GPU here has compute capability {major.value}.x, not 9.0")
    context = ctypes.c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxSetCurrent(context) == 0
    yield driver
    driver.cuDevicePrimaryCtxRelease_v2(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches, each filled from nothing: on the GPU, and on a pretended one."""
    if not IMAGE:
        found = shutil.which(PYTHON) and subprocess.run([PYTHON, "-c", "import sglang, deep_gemm"], capture_output=True)
        if not found or found.returncode:
            pytest.skip("no sglang here: set WARM_CACHE_GPU_IMAGE, or WARM_CACHE_GPU_PYTHON")
    place = tmp_path_factory.mktemp("gpu")
    real, pretended = place / "real", place / "pretended"
    run(real, replace(TASK, gpus=1))
    run(pretended, replace(TASK, env={PRETEND_VARIABLE: "H200"}))
    return real, pretended


def test_gpu_run_asks_for_prebuilt_names(cuda: ctypes.CDLL, made: tuple[Path, Path]) -> None:
    real, pretended = map(kernels, made)
    assert real.keys() == pretended.keys() and len(real) > 4
    families = [{path.name for path in (root / "deep_gemm").iterdir() if path.is_dir()} for root in made]
    assert families[0] == families[1], "the family key is that of the real GPU"


def test_gpu_loads_kernels_made_without_gpu(cuda: ctypes.CDLL, made: tuple[Path, Path]) -> None:
    for name, path in kernels(made[1]).items():
        module = ctypes.c_void_p()
        image = (path / "kernel.cubin").read_bytes()
        assert cuda.cuModuleLoadData(ctypes.byref(module), image) == 0, name
        cuda.cuModuleUnload(module)


def test_gpu_shape_sweep_finds_all_prebuilt(cuda: ctypes.CDLL, made: tuple[Path, Path]) -> None:
    before = kernels(made[1]).keys()
    done = run(made[1], replace(TASK, gpus=1))
    assert kernels(made[1]).keys() == before
    assert done.verdict.proof == "verified" and done.verdict.second_pass_added == 0
    (path,) = [path for path in made[1].glob("markers/shapes-*/*.json") if "pretended" not in path.name]
    assert json.loads(path.read_text())["observed"]["compiled-on"] == "GPU"
