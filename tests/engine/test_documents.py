"""The commands of README.md and builder/docs, run as they stand there: only places and the image are this machine's.

Every line of every block of shell is run, here or by a test that is named, or is in NOT_RUN with its reason. They are
run on a machine with eight pretended H200, a cache that README's first commands warmed, and a store that has all models
of the profile.
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
PAGES = [ROOT / "README.md", *sorted((ROOT / "builder" / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A block of shell in a page: its commands, without their comments."""

    page: str
    number: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks_of(path: Path) -> Iterator[Block]:
    fences = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for number, text in enumerate(fences, start=1):
        lines = [re.sub(r"\s+# .*", "", line) for line in text.replace("\\\n", " ").splitlines()]
        yield Block(path.stem, number, tuple(line for line in lines if line.strip()))


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def lines(page: str, word: str) -> tuple[str, ...]:
    """The commands of the one block of a page that has this word."""
    (found,) = [block for block in BLOCKS if block.page == page and any(word in line for line in block.lines)]
    return found.lines


#: Blocks that have a test of their own: page, a word of the block → the test.
OWN_TEST = {
    (
        "README",
        "make demo",
    ): "test_make_targets_exist; the demo itself is run by people, and its image by tests/stand_in",
    ("README", "doctor"): "test_install_block_installs; the fixture `warmed`",
    ("README", "docker run"): "test_test_job_block_hits_the_cache",
    ("ci", "hold"): "test_test_job_block_hits_the_cache",
    ("ci", "--here"): "test_here_block_works_inside_a_container",
    ("ci", "here-reset"): "test_here_reset_block_makes_the_target",
    ("ci", "view create"): "test_view_block_works",
    ("ci", "import-tests"): "test_import_tests_block_works",
}
#: Commands that are not run: a regular expression → why.
NOT_RUN = {
    r"^(systemctl|journalctl) ": "there is no systemd here; tests/project/test_systemd.py checks the units",
    r"^cp docker/systemd/": "copies files that tests/project/test_systemd.py checks",
    r"^source <": "printed for the user's shell; tests/cli/test_completion.py runs it in bash",
    r"^digest=|^for node in|^install -d -o": "of a cluster; tests of fleet run what is printed",
    r"warm-cache fleet ": "of a cluster; tests of fleet run what is printed",
    r"^openssl |^pip install|warm-cache (sign|push|pull|bake) ": "needs a registry; the tests of these verbs have one",
    r"registry\.example": "needs a registry; the tests of these verbs have one",
    r"^docker run \$\(warm-cache env": "the same as in README and ci.md, where it is run",
    r"warm-cache import-tests test ": "needs a checkout of sglang; the same verb of ci.md is run on a small one",
    r"warm-cache (audit|here-reset) ": "needs what a job left; run by the tests of ci.md's blocks",
    r"warm-cache view create pr-4711 --profile h200$": "run with its cache by the test of ci.md's block",
}


@dataclass
class Machine:
    """cli: a user who has what README.md asks for; place: where `/data` of the text is."""

    cli: GpuCli
    place: Path

    def run(self, line: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One command line in bash. Nothing ever shows a traceback."""
        text = line.replace("/data/", f"{self.place}/data/").replace("/etc/", f"{self.place}/etc/")
        text = text.replace(IMAGE, self.cli.image).replace("--cache /jit", f"--cache {self.place}/data/sglang-jit")
        text = text.replace("pytest test/srt", "true")
        environ = {
            **self.cli.environ,
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "WARM_CACHE_IMAGE": self.cli.image,
            "WARM_CACHE_CACHE": str(self.place / "data" / "sglang-jit"),
            "WARM_CACHE_MODELS": str(self.place / "data" / "huggingface"),
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


@pytest.fixture(scope="module", name="image")
def an_image(gpu_images: Callable[[int], str]) -> str:
    return gpu_images(8)


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory, docker_host: str, image: str, nvml_library: Path
) -> Iterator[Machine]:
    place = tmp_path_factory.mktemp("readme")
    for name in ("bin", "user", "data/sglang-jit", "data/huggingface", "data/metrics", "etc"):
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
    _install, _link, doctor, warm, check = lines("README", "doctor")
    tasks = len(load(profile="h200").tasks)
    assert f"this machine can run {tasks} tasks" in machine.well(doctor)
    assert f"{tasks} warmed" in machine.well(warm)
    assert f"{tasks} of {tasks} tasks warm" in machine.well(check)
    return machine


def test_make_targets_exist() -> None:
    for line in lines("README", "make demo"):
        done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_install_block_installs(tmp_path: Path) -> None:
    """What README.md installs, with what the tests have instead of an index."""
    assert lines("README", "doctor")[0].endswith("/bin/pip install .")
    pytest.importorskip("pip", reason="this environment was made without pip")
    words = ["install", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(tmp_path), "."]
    done = subprocess.run([sys.executable, "-m", "pip", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "builder" / "_docker" / "Dockerfile").is_file()


def test_test_job_block_hits_the_cache(warmed: Machine) -> None:
    flags, job, hold = lines("ci", "hold")
    said = warmed.well(f"{flags}\n{job}")
    assert "the tests" in said and "something is cold" not in said
    assert "nothing is removed" in warmed.well(hold)
    short, same = lines("README", "docker run")
    assert flags.startswith(short) and same == job


def test_here_block_works_inside_a_container(warmed: Machine, tmp_path: Path) -> None:
    """In a container that was started with what `env` prints, with sh and what the image has, and a copied folder."""
    shutil.copytree(ROOT / "builder", tmp_path / "copied" / "builder", ignore=shutil.ignore_patterns("__pycache__"))
    check, variables, before, after = lines("ci", "--here")
    script = "\n".join(["set -e", check, variables, 'test -n "$SGLANG_DG_CACHE_DIR"', before, after])
    (tmp_path / "copied" / "job.sh").write_text(script)
    env = lines("ci", "hold")[0].partition("||")[0]
    run = f"docker run --rm --init --gpus all $flags -v {tmp_path}/copied:/copied -w /tmp {IMAGE}"
    job = f"{env}\n{run} sh /copied/job.sh"
    said = warmed.well(job)
    tasks = len(load(profile="h200").tasks)
    assert f"{tasks} of {tasks} tasks warm" in said


def test_here_reset_block_makes_the_target(tmp_path: Path) -> None:
    Generations(tmp_path / "source").warmed(1, ["a"], days=1)
    (line,) = lines("ci", "here-reset")
    for path, own in (("/copied", ROOT), ("/mnt/warm-cache", tmp_path / "source"), ("/jit", tmp_path / "target")):
        line = line.replace(path, str(own))
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Generations(tmp_path / "target").markers() == ["a@1"]


def test_view_block_works(warmed: Machine) -> None:
    create, job, audit, promote, drop = lines("ci", "view create")
    assert "the tests" in warmed.well(f"{create}\n{job}")
    warmed.well(audit)
    warmed.well(promote)
    warmed.well(drop)
    assert "pr-4711" not in warmed.well(audit.replace("audit pr-4711", "list").replace("--fail-on-jit", ""))


def test_import_tests_block_works(machine: Machine, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    body = "class TestIt(CustomTestCase):\n    def test_it(self):\n        popen_launch_server('org/new', 'u', 9)\n"
    checkout.test("test_it.py", body)
    (line,) = lines("ci", "import-tests")
    done = machine.run(line, cwd=tmp_path)
    assert done.returncode == 10, done.stderr
    assert "not covered: test/registered/test_it.py:" in done.stdout


# --- every other command ---------------------------------------------------------------------------------------------


def own_test(block: Block) -> str:
    return next(
        (test for (page, word), test in OWN_TEST.items() if page == block.page and any(word in x for x in block.lines)),
        "",
    )


def reason(line: str) -> str:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), "")


def to_run(block: Block) -> list[str]:
    return [] if own_test(block) else [line for line in block.lines if not reason(line)]


def test_reasons_are_needed() -> None:
    """A reason whose commands are gone, or a test of a block that is gone, says nothing any more."""
    known = [line for block in BLOCKS if not own_test(block) for line in block.lines]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in known)] == []
    for page, word in OWN_TEST:
        assert lines(page, word)
    names = {name for name in globals() if name.startswith("test_")}
    assert {test.split(";")[0] for test in OWN_TEST.values()} <= names


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in BLOCKS if to_run(block)])
def test_commands_of_a_page_work(warmed: Machine, block: Block, tmp_path: Path) -> None:
    for line in to_run(block):
        done = warmed.run(line, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if "--metrics" in line:
            (written,) = [*tmp_path.glob("*.prom"), *(warmed.place / "data" / "metrics").glob("*.prom")][:1]
            assert "warm_cache_refresh_exit_code" in written.read_text()
