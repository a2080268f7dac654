"""A cache of real kernels by way of a real registry: warm on another root, and nothing is compiled there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registries import StandIn, stand_in
from tests.stand_in.test_real_sglang import MANIFEST, ROOT, warm_cache

pytestmark = [pytest.mark.stand_in, pytest.mark.timeout(600)]

#: tvm-ffi's own loader, by ninja and the host's compiler, as sglang's JIT used it up to 0.5.17.
NINJA = """
from tvm_ffi import cpp
module = cpp.load_inline("warm", cpp_sources="int64_t answer(int64_t x) { return x + 41; }", functions=["answer"])
assert module.answer(1) == 42
print("NINJA READY")
"""
TASK = f"""
[[task]]
model = "stand-in/ninja"
recipe = "command"
argv = ["python3", "-c", {json.dumps(NINJA)}]
success = "NINJA READY"
families = ["tvm_ffi"]
"""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[StandIn]:
    with stand_in(tmp_path / "registry") as found:
        yield found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, stand_in_image: str) -> Path:
    """A warm root, beside the manifest."""
    folder = tmp_path_factory.mktemp("sharing")
    manifest = folder / "manifest.toml"
    manifest.write_text(MANIFEST.format(image=stand_in_image) + TASK)
    words = ("--manifest", manifest, "--cache", folder / "first", "--log-dir", folder / "logs", "--json")
    made = warm_cache("warm", *words)
    assert made.status == 0, made.err
    return folder / "first"


def test_pulled_kernels_are_used_and_none_is_compiled(registry: StandIn, tmp_path: Path, first: Path) -> None:
    other, common = tmp_path / "other", ("--manifest", first.parent / "manifest.toml", "--json")
    # The stand-in's own variables are no switches, so that its tasks have to be named.
    pushed = warm_cache("push", f"{registry.host}/real/cache", *common, "--cache", first, "--only", "stand-in/*")
    assert pushed.status == 0, pushed.err
    pulled = warm_cache("pull", f"{registry.host}/real/cache", *common, "--cache", other)
    assert pulled.status == 0, pulled.err
    families = {row["family"]: row for row in pulled.document["pull"]["families"]}
    assert families.keys() == {"deep_gemm", "triton", "tvm_ffi"} and not pulled.document["pull"]["left"]
    check = warm_cache("check", "--strict", "--no-probe", *common, "--cache", other)
    assert check.status == 0, check.err
    built = {path.name: path.stat().st_mtime_ns for path in other.glob("tvm_ffi/**/*") if path.is_file()}
    assert {"warm.so", "build.ninja", ".ninja_deps"} <= built.keys()
    again = warm_cache("warm", "--force", *common, "--cache", other, "--log-dir", tmp_path / "logs")
    assert again.status == 0, again.err
    assert [(task["verified"], task["entries_added"]) for task in again.document["tasks"]] == [(True, 0)] * 3
    for path in other.glob("tvm_ffi/**/*.*o"):
        assert path.stat().st_mtime_ns == built[path.name], f"ninja built {path.name} again"


def test_baked_kernels_are_warm_and_ninja_builds_nothing(first: Path, docker_host: str) -> None:
    """Layers of images keep whole seconds, which ninja takes for what it built."""
    tag = f"warm-cache-test-baked:{os.urandom(4).hex()}"
    manifest = first.parent / "manifest.toml"
    environ = {**os.environ, "DOCKER_HOST": docker_host}
    baked = warm_cache("bake", tag, "--manifest", manifest, "--cache", first, "--json")
    assert baked.status == 0, baked.err
    script = f"""
set -e
list() {{ find /jit/tvm_ffi -type f -name '*.*o' -printf '%p %T@\\n' | sort; }}
list >/tmp/before
python3 -m builder check --here --strict --manifest /manifest.toml --cache /jit
python3 -c {shlex.quote(NINJA)}
list >/tmp/after
[ "$(cat /tmp/before)" = "$(cat /tmp/after)" ]
grep -c warm.so /tmp/after
"""
    mounts = ["-v", f"{ROOT / 'builder'}:/src/builder:ro", "-v", f"{manifest}:/manifest.toml:ro", "-w", "/src"]
    argv = ["docker", "run", "--rm", "--network", "none", *mounts, tag, "sh", "-c", script]
    try:
        inside = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=300)
    finally:
        subprocess.run(["docker", "rmi", "-f", tag], env=environ, capture_output=True, timeout=60)
    assert inside.returncode == 0, inside.stdout + inside.stderr
    assert "3 of 3 tasks warm" in inside.stdout and inside.stdout.rstrip().endswith("1")
