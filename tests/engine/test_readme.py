"""README.md's commands, run as they stand there: only places and the image are this machine's.

A block of shell in README.md has a test here, or this fails. What a block is run on is a machine with eight pretended
H200, an empty cache, and a store that has every model of the profile.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.manifest.load import load
from tests.checkout import Checkout
from tests.engine.cli import ROOT
from tests.engine.gpumachine import GpuCli
from tests.generations import Generations
from tests.stub_nvml.stub import Driver

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

IMAGE = "lmsysorg/sglang:v0.5.23"
#: Blocks of README.md, by a word of their own.
BLOCKS = {
    name: block
    for block in re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    for name in ("make", "doctor", "hold", "--here", "here-reset", "view", "refresh", "import-tests", "explain")
    if re.search(rf"(^|[\s(]){name}\s", block)
}


def test_readme_every_block_has_a_test() -> None:
    count = len(re.findall(r"^```sh$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert len(BLOCKS) == len(set(BLOCKS.values())) == count


@dataclass
class Machine:
    """cli: somebody who has what README.md asks for; place: where `/data` of the text is."""

    cli: GpuCli
    place: Path

    def run(self, line: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One command line in bash. Nothing ever shows a traceback."""
        text = line.replace("/data/", f"{self.place}/data/").replace(IMAGE, self.cli.image)
        environ = {
            **self.cli.environ,
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "WARM_CACHE_IMAGE": self.cli.image,
        }
        done = subprocess.run(
            ["bash", "-c", text], cwd=cwd or self.place, env=environ, capture_output=True, text=True, timeout=500
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def well(self, line: str, status: int = 0) -> str:
        """Runs it to this status, and returns what it said."""
        done = self.run(line)
        assert done.returncode == status, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def lines(name: str) -> list[str]:
    """The commands of a block, without their comments."""
    return [line for line in (re.sub(r"\s+# .*", "", line) for line in BLOCKS[name].splitlines()) if line.strip()]


@pytest.fixture(scope="module", name="image")
def an_image(gpu_images: Callable[[int], str]) -> str:
    return gpu_images(8)


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory, docker_host: str, image: str, nvml_library: Path
) -> Iterator[Machine]:
    place = tmp_path_factory.mktemp("readme")
    for name in ("bin", "user", "data/sglang-jit", "data/huggingface", "data/metrics"):
        (place / name).mkdir(parents=True)
    program = place / "bin" / "warm-cache"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m builder "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    driver = Driver(nvml_library.parent, place / "nvml", gpus=8)
    cli = GpuCli.on(place / "user", docker_host, image, driver)
    cli.store = place / "data" / "huggingface"
    for model in sorted({task.model for task in load(profile="h200").tasks}):
        cli.model(model)
    yield Machine(cli, place)
    cli.close()


@pytest.fixture(scope="module")
def warmed(machine: Machine) -> Machine:
    """The machine after what README.md says first."""
    _install, _link, doctor, warm, check = lines("doctor")
    tasks = len(load(profile="h200").tasks)
    assert f"this machine can run {tasks} tasks" in machine.well(doctor)
    assert f"{tasks} warmed" in machine.well(warm)
    assert f"{tasks} of {tasks} tasks warm" in machine.well(check)
    return machine


def test_readme_make_targets_exist() -> None:
    for line in lines("make"):
        done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_readme_install_block_installs(tmp_path: Path) -> None:
    """What README.md installs, with what the tests have instead of an index."""
    assert lines("doctor")[0].endswith("/bin/pip install .")
    pytest.importorskip("pip", reason="this environment was made without pip")
    words = ["install", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(tmp_path), "."]
    done = subprocess.run([sys.executable, "-m", "pip", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "builder" / "_docker" / "Dockerfile").is_file()


def test_readme_test_job_block_hits_the_cache(warmed: Machine) -> None:
    flags, job, hold = lines("hold")
    said = warmed.well(f"{flags}\n{job}")
    assert "the tests" in said and "something is cold" not in said
    assert "nothing is removed" in warmed.well(hold)


def test_readme_here_block_works_inside_a_container(warmed: Machine, tmp_path: Path) -> None:
    """In a container that was started with what `env` prints, with sh and what the image has, and a copied folder."""
    shutil.copytree(ROOT / "builder", tmp_path / "copied" / "builder", ignore=shutil.ignore_patterns("__pycache__"))
    check, variables, before, after = lines("--here")
    script = "\n".join(["set -e", check, variables, 'test -n "$SGLANG_DG_CACHE_DIR"', before, after])
    (tmp_path / "copied" / "job.sh").write_text(script)
    env = lines("hold")[0].partition("||")[0]
    run = f"docker run --rm --init --gpus all $flags -v {tmp_path}/copied:/copied -w /tmp {IMAGE}"
    job = f"{env}\n{run} sh /copied/job.sh"
    said = warmed.well(job)
    tasks = len(load(profile="h200").tasks)
    assert f"{tasks} of {tasks} tasks warm" in said


def test_readme_here_reset_block_makes_the_target(tmp_path: Path) -> None:
    Generations(tmp_path / "source").warmed(1, ["a"], days=1)
    (line,) = lines("here-reset")
    for path, own in (("/copied", ROOT), ("/mnt/warm-cache", tmp_path / "source"), ("/jit", tmp_path / "target")):
        line = line.replace(path, str(own))
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Generations(tmp_path / "target").markers() == ["a@1"]


def test_readme_view_block_works(warmed: Machine) -> None:
    create, job, audit, promote, drop = lines("view")
    assert "the tests" in warmed.well(f"{create}\n{job}")
    warmed.well(audit)
    warmed.well(promote)
    warmed.well(drop)
    assert "pr-4711" not in warmed.well(audit.replace("audit pr-4711", "list").replace("--fail-on-jit", ""))


def test_readme_reading_verbs_work(warmed: Machine) -> None:
    for line in lines("explain"):
        warmed.well(line)


def test_readme_nightly_block_works(warmed: Machine) -> None:
    refresh, prune = lines("refresh")
    said = warmed.run(refresh)
    assert said.returncode == 0, said.stderr
    assert "warm_cache_" in (warmed.place / "data" / "metrics" / "warm_cache.prom").read_text()
    assert warmed.well(prune)


def test_readme_import_tests_block_works(machine: Machine, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    body = "class TestIt(CustomTestCase):\n    def test_it(self):\n        popen_launch_server('org/new', 'u', 9)\n"
    checkout.test("test_it.py", body)
    (line,) = lines("import-tests")
    done = machine.run(line, cwd=tmp_path)
    assert done.returncode == 10, done.stderr
    assert "not covered: test/registered/test_it.py:" in done.stdout
