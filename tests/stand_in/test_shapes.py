"""The recipe `shapes` with real sglang, DeepGEMM and nvcc: how many workers, which driver, killed or not, the same
kernels come out. No kernel is run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in.keys import Headers

pytestmark = [pytest.mark.stand_in, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SITE = "/opt/standin/venv/lib/python3.11/site-packages"

#: Two dense kernels and one of contiguous groups, for few Ms: what counts is that the sets are equal.
MANIFEST = """
schema = 1
[image]
ref = "{image}"
[container]
network = "none"
shm_size = "1g"
[gpus]
{gpus}
[prebuild]
enabled = {prebuild}
[[task]]
model = "stand-in/shapes"
recipe = "shapes"
workers = {workers}
shapes = ["GEMM_NT_F8F8BF16 N=2112, K=7168, num_groups=1", "GEMM_NT_F8F8BF16 N=3072, K=1536, num_groups=1",
  "GROUPED_GEMM_NT_F8F8BF16_CONTIG N=512, K=7168, num_groups=8"]
m_values = [64, 128]
{env}
"""
#: The stand-in's own driver, and the one that travels with the program.
STAND_IN = ("count = 0", 'env = { LD_PRELOAD = "/opt/standin/stubs/fakert.so" }')
PRETENDED = ('pretend = "H200"', "")
SAID = "compiled without a GPU (pretended H200): experimental, not proven on hardware"


class Cache:
    """A cache root of its own, and the program as people run it."""

    def __init__(self, place: Path, image: str, workers: int, driver: tuple[str, str]) -> None:
        place.mkdir()
        self.root, self._place = place / "cache", place
        self.manifest = place / "manifest.toml"
        gpus, env = driver
        prebuild = "true" if driver is PRETENDED else "false"
        self.manifest.write_text(MANIFEST.format(image=image, workers=workers, gpus=gpus, env=env, prebuild=prebuild))

    def start(self, verb: str, *options: str) -> subprocess.Popen[str]:
        more = ["--log-dir", str(self._place / "logs")] if verb == "warm" else []
        said = ["--manifest", str(self.manifest), "--cache", str(self.root), *more, "--json", *options]
        return subprocess.Popen(
            [sys.executable, "-m", "builder", verb, *said],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, verb: str, *options: str) -> tuple[int, dict[str, Any]]:
        out, err = (running := self.start(verb, *options)).communicate(timeout=500)
        assert "Traceback (most recent call last)" not in err, err
        return running.returncode, json.loads(out)

    def kernels(self) -> dict[str, Path]:
        return {path.parent.name: path.parent for path in self.root.glob("deep_gemm/*/cache/*/.committed")}


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory, stand_in_image: str) -> tuple[Cache, dict[str, Any]]:
    """One worker, on a GPU that only the program pretends, after a prebuild."""
    cache = Cache(tmp_path_factory.mktemp("shapes") / "one", stand_in_image, 1, PRETENDED)
    status, document = cache.run("warm")
    assert status == 0, document
    return cache, document


def test_shapes_two_workers_equal_one_and_resume_after_kill(
    tmp_path: Path,
    stand_in_image: str,
    docker_host: str,
    pretended: tuple[Cache, dict[str, Any]],
    until: Callable[..., None],
) -> None:
    one = pretended[0].kernels()
    two = Cache(tmp_path / "two", stand_in_image, 2, STAND_IN)
    running = two.start("warm")
    until(two.kernels, seconds=200, what="the first kernel")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    before = {name: (path / "kernel.cubin").stat() for name, path in two.kernels().items()}
    assert 0 < len(before) < len(one), "it was to be stopped in the middle"

    status, document = two.run("warm")
    (task,) = document["tasks"]
    assert (status, task["state"], task["verified"]) == (0, "warmed", True), task
    assert task["entries_added"] == len(one) - len(before)
    after = two.kernels()
    assert after.keys() == one.keys()
    for name, was in before.items():
        now = (after[name] / "kernel.cubin").stat()
        assert (now.st_mtime_ns, now.st_ino) == (was.st_mtime_ns, was.st_ino), f"{name} was compiled twice"

    headers = Headers([_include(tmp_path, stand_in_image, docker_host)])
    assert {name: headers.key(path) for name, path in after.items()} == {name: name.rpartition(".")[2] for name in one}


def _include(place: Path, image: str, docker_host: str) -> Path:
    """DeepGEMM's headers, out of the image."""
    docker = ["docker", "-H", docker_host]
    made = subprocess.run([*docker, "create", image, "true"], capture_output=True, text=True, check=True)
    container = made.stdout.strip()
    try:
        source = f"{container}:{SITE}/deep_gemm/include"
        subprocess.run([*docker, "cp", source, str(place / "include")], capture_output=True, check=True)
    finally:
        subprocess.run([*docker, "rm", "-f", container], capture_output=True, check=True)
    return place / "include"


def test_prebuild_leaves_tasks_nothing_to_compile(pretended: tuple[Cache, dict[str, Any]]) -> None:
    cache, document = pretended
    stage, (task,) = document["prebuild"], document["tasks"]
    assert (stage["state"], stage["made"], stage["missing"]) == ("done", len(cache.kernels()), [])
    assert (task["entries_added"], stage["gpu_kernels"]) == (0, 0)


def test_simulated_gpu_warm_is_reported_and_cold_under_strict(pretended: tuple[Cache, dict[str, Any]]) -> None:
    cache, document = pretended
    (task,) = document["tasks"]
    assert (task["state"], task["proof"], task["verified"], task["reason"]) == ("warmed", "pretended", False, SAID)
    status, document = cache.run("check")
    assert status == 0 and document["tasks"][0]["reservation"] == SAID
    assert document["warnings"] == [f"shapes: {SAID}"]
    assert cache.run("explain")[1]["explain"][0]["reservation"] == SAID
    assert cache.run("status")[1]["markers"][0]["reservation"] == SAID
    assert cache.run("check", "--strict")[0] == 10
    (path,) = cache.root.glob("markers/shapes-*/*.pretended.json")
    marker = json.loads(path.read_text())
    assert marker["factors"]["deep_gemm"]["sm_count"] == "132"
    assert marker["factors"]["deep_gemm"]["compute_capability"] == "9.0"
    assert marker["observed"]["compiled-on"] == "no GPU"
