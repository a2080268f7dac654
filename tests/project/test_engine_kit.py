"""The scripts of docker/stand-in: whose engine a command gets, and how the stand-in image is made.

Fakes of `docker`, `id` and `unshare` on PATH: nothing is started here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

STAND_IN = Path(__file__).resolve().parents[2] / "docker" / "stand-in"
SCRIPT = STAND_IN / "engine" / "engine.sh"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script with these fakes (name → shell) before everything else on PATH."""

    def run(
        *arguments: str, fakes: dict[str, str], script: Path = SCRIPT, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        bin_ = tmp_path / "bin"
        bin_.mkdir()
        for name, text in fakes.items():
            (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
            (bin_ / name).chmod(0o755)
        kept = {
            name: value for name, value in os.environ.items() if name not in ("CI", "DOCKER_HOST", "INSTALL_ENGINE")
        }
        env = {**kept, "PATH": f"{bin_}:{os.environ['PATH']}", **environ}
        return subprocess.run([script, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)

    return run


NOBODY = {"docker": "exit 1"}
SOMEBODY = {"docker": 'case "$1" in version) exit 0 ;; context) echo unix:///from/the/context.sock ;; esac'}
SHOW = ("sh", "-c", "echo $DOCKER_HOST; exit 7")


@pytest.mark.parametrize(
    ("environ", "host"), [({"DOCKER_HOST": "tcp://there:1"}, "tcp://there:1"), ({}, "unix:///from/the/context.sock")]
)
def test_engine_script_uses_answering_engine(run: Run, tmp_path: Path, environ: dict[str, str], host: str) -> None:
    done = run("run", str(tmp_path / "engine"), *SHOW, fakes=SOMEBODY, **environ)
    assert (done.returncode, done.stdout.strip()) == (7, host)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("fakes", "environ", "said"),
    [
        ({}, {"DOCKER_HOST": "unix:///none"}, "no engine answers at DOCKER_HOST=unix:///none"),
        ({}, {"CI": "true"}, "this is a CI runner: set DOCKER_HOST, or INSTALL_ENGINE=1"),
        ({"id": "echo 1000"}, {}, "starting a private one needs root"),
        ({"id": "echo 0", "unshare": "exit 1"}, {}, "needs namespaces that this machine refuses"),
        (
            {"id": "echo 0", "unshare": "exit 1"},
            {"CI": "true", "INSTALL_ENGINE": "1"},
            "needs namespaces that this machine refuses",
        ),
    ],
)
def test_engine_script_names_what_is_missing(
    run: Run, tmp_path: Path, fakes: dict[str, str], environ: dict[str, str], said: str
) -> None:
    done = run("run", str(tmp_path / "engine"), *SHOW, fakes={**NOBODY, **fakes}, **environ)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize("arguments", [(), ("up",), ("run", "dir"), ("sideways", "dir")])
def test_engine_script_without_arguments_prints_usage(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, fakes=NOBODY)
    assert done.returncode == 2
    assert "engine.sh run DIR CMD..." in done.stderr


def test_engine_script_down_without_engine_succeeds(run: Run, tmp_path: Path) -> None:
    """A pid file that names another process (pids are used again) must not end it."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "guardian.pid").write_text(str(os.getpid()))
    assert run("down", str(folder), fakes=NOBODY).returncode == 0
    assert not (folder / "guardian.pid").exists()


def test_engine_script_kill_without_engine_is_refused(run: Run, tmp_path: Path) -> None:
    done = run("kill", str(tmp_path / "engine"), fakes=NOBODY)
    assert (done.returncode, done.stderr) == (1, f"error: no engine runs in {tmp_path}/engine\n")


# --- the image -------------------------------------------------------------------------------------------------------

BUILD = STAND_IN / "real" / "build.sh"


def engine_that(pulls: bool) -> dict[str, str]:
    """A docker command whose engine has no image; what it is to build is printed."""
    pull = "exit 0" if pulls else "echo 'no such host' >&2; exit 1"
    body = f'case "$1" in version) exit 0 ;; image) exit 1 ;; pull) {pull} ;; build) echo "$@"; ls "${{@: -1}}" ;; esac'
    return {"docker": f'exec bash -c {shlex.quote(body)} docker "$@"'}


def test_image_is_built_by_an_engine_that_can_pull_its_base(run: Run, tmp_path: Path) -> None:
    """By any user, on any system: from a context that holds whatever Dockerfile copies."""
    cache = str(tmp_path / "cache")
    fakes = {**engine_that(pulls=True), "id": "echo 1000"}
    options = "--network host --build-arg X=1"
    environ = {"WARM_CACHE_STAND_IN_CACHE": cache, "WARM_CACHE_BUILD_OPTIONS": options}
    done = run("some:tag", fakes=fakes, script=BUILD, **environ)
    assert done.returncode == 0, done.stderr
    (command,) = [line for line in done.stderr.splitlines() if line.startswith("build ")]
    assert command.startswith(f"build {options} --platform linux/amd64 --label io.sglang.warm-cache.stand-in=")
    assert " --tag some:tag " in command
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (BUILD.parent / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} <= set(done.stderr.split())


def test_image_without_a_registry_says_what_it_takes(run: Run, tmp_path: Path) -> None:
    fakes = {**engine_that(pulls=False), "id": "echo 1000", "grep": "exit ${GREP:-0}"}
    environ = {"WARM_CACHE_STAND_IN_CACHE": str(tmp_path / "cache")}
    done = run(fakes=fakes, script=BUILD, **environ)
    assert done.returncode == 1
    assert "it cannot (no such host)" in done.stderr
    assert "which takes root. Use an engine that can pull debian:12" in done.stderr


def test_shell_has_the_program_and_the_profile(run: Run, tmp_path: Path) -> None:
    shown = 'echo "$WARM_CACHE_PROFILE $WARM_CACHE_IMAGE $WARM_CACHE_CACHE ${PATH%%:*}"'
    script = STAND_IN / "shell.sh"
    done = run("-c", shown, fakes={}, script=script, WARM_CACHE_CACHE=str(tmp_path))
    root = STAND_IN.parents[1]
    assert done.stdout.split() == ["stand-in", "warm-cache-stand-in:real", str(tmp_path), str(root / ".venv" / "bin")]
    missing = str(tmp_path / "none")
    done = subprocess.run([script], env={**os.environ, "WARM_CACHE_CACHE": missing}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: there is no {missing} yet; first: make demo\n"
