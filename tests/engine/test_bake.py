"""`bake`: a container of the baked image is warm without any volume, and a damaged entry in it is compiled again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.cli import READY, ROOT, Cli, command, shapes

pytestmark = pytest.mark.engine


@pytest.fixture
def tag(cli: Cli) -> Iterator[str]:
    name = f"warm-cache-test-baked:{os.urandom(4).hex()}"
    yield name
    with cli.engine() as engine:
        engine.remove_image(name)


@pytest.fixture
def inside(docker_host: str, cli: Cli) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``inside(tag, words…)``: a container of the image, with this program at /src, and no volume for the cache."""

    def run(tag: str, *words: str) -> subprocess.CompletedProcess[str]:
        mounts = ["-v", f"{ROOT / 'builder'}:/src/builder:ro", "-v", f"{cli.path}:/manifest.toml:ro"]
        argv = ["docker", "run", "--rm", "--network", "none", *mounts, "-w", "/src", tag, *words]
        return subprocess.run(
            argv, env={**os.environ, "DOCKER_HOST": docker_host}, capture_output=True, text=True, timeout=240
        )

    return run


def test_container_of_the_image_is_warm_without_a_volume(
    cli: Cli, tag: str, known_image: Path, inside: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    shutil.copytree(known_image, cli.root)
    cli.manifest(shapes(), command("never", READY))
    assert cli.run("bake", "Not A Name").status == 2
    cli.warm("--only", "shapes", seconds=240)
    nothing = cli.run("bake", tag, "--only", "never")
    assert nothing.status == 10 and "there is nothing warm to pack: never is cold" in nothing.said
    ended = cli.run("bake", tag, "--json", seconds=240)
    assert ended.status == 0, ended.said
    baked = ended.document["bake"]
    assert (baked["tasks"], baked["omitted"]) == (["shapes"], ["never is cold"])
    assert baked["env"]["WARM_CACHE_IMAGE_ID"].startswith("sha256:")
    words = ("--here", "--manifest", "/manifest.toml", "--cache", "/jit", "--only", "shapes")
    checked = inside(tag, "python3", "-m", "builder", "check", *words, "--json")
    assert checked.returncode == 0, checked.stderr
    assert [task["state"] for task in json.loads(checked.stdout)["tasks"]] == ["warm"]
    # overlayfs renames no directory of a lower layer (EXDEV): a bad entry there is quarantined all the same.
    spoil = "for name in /jit/deep_gemm/*/cache/*/kernel.cubin; do echo bad >$name; break; done; "
    mended = inside(tag, "sh", "-c", f"{spoil}python3 -m builder warm {' '.join(words)}")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "quarantined" in mended.stdout and "1 warmed" in mended.stdout
