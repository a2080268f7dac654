"""The printed scripts as a shell reads them: shellcheck finds nothing in them, and signals reach the program."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.cli import main as cli
from builder.fleet import pods
from tests.unit.fleet.test_kubernetes import MANIFEST


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        manifest = tmp_path / "it's a manifest.toml"
        manifest.write_text(MANIFEST)
        assert cli.main(["fleet", *words, "--manifest", str(manifest)], environ={}) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "words",
    [
        ("slurm", "--logs", "/shared/it's here"),
        ("slurm", "--push", "reg.example/jit", "--logs", "/r", "--partition", "gpu", "--pass-variable", "HF_TOKEN"),
        ("slurm", "--runtime", "pyxis", "--logs", "/r", "--cache", "/data/a b"),
        ("slurm", "--runtime", "apptainer", "--logs", "/r"),
        ("prolog", "reg.example/jit"),
        ("prolog", "reg.example/jit", "--key", "/etc/my key.pem"),
    ],
    ids=["warm", "push", "pyxis", "apptainer", "prolog", "prolog-key"],
)
def test_scripts_pass_shellcheck(tmp_path: Path, printed: Callable[..., str], words: tuple[str, ...]) -> None:
    check(tmp_path, printed(*words))


def check(tmp_path: Path, text: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    (tmp_path / "script").write_text(text)
    found = subprocess.run([shellcheck, tmp_path / "script"], stdout=-1)
    assert found.returncode == 0, found.stdout.decode()


def test_scripts_in_pods_pass_shellcheck(tmp_path: Path, printed: Callable[..., str]) -> None:
    words = ("kubernetes", "reg.example/jit", "--builder-image", "reg.example/builder:1")
    found = 0
    for item in json.loads(printed(*words))["items"]:
        spec = item.get("spec", {})
        pod = spec.get("template", {}).get("spec", spec)
        for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
            if container["command"][:2] == ["sh", "-c"]:
                found += 1
                check(tmp_path, f"#!/bin/sh\n{container['command'][2]}\n")
    assert found == 4


@pytest.fixture
def warms(tmp_path: Path, until: Callable[..., None]) -> Callable[..., tuple[int, str]]:
    """``warms(code)``: the script of the warm container, with this program in the builder's place; may be stopped."""

    def run(code: str, *, stop: bool = False) -> tuple[int, str]:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python3").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
        (tmp_path / "bin" / "python3").chmod(0o755)
        script = pods.WARMS.replace(f"{pods.SCRATCH}/status", str(tmp_path / "status"))
        process = subprocess.Popen(
            [shutil.which("dash") or "sh", "-c", script, "warm", str(tmp_path / "began")],
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        )
        if stop:
            until((tmp_path / "began").exists)
            process.send_signal(signal.SIGTERM)
        status = process.wait(30)
        return status, (tmp_path / "status").read_text().strip()

    return run


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (11, 0), (14, 0), (12, 12), (15, 15), (2, 2)], ids=str)
def test_what_is_warm_is_pushed_although_a_task_failed(
    warms: Callable[..., tuple[int, str]], status: int, ends: int
) -> None:
    assert warms(f"raise SystemExit({status})") == (ends, str(status))


def test_end_of_a_pod_reaches_the_program_which_ends_by_itself(warms: Callable[..., tuple[int, str]]) -> None:
    code = (
        "import pathlib, signal, sys; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        "pathlib.Path(sys.argv[-1]).touch(); signal.pause()"
    )
    assert warms(code, stop=True) == (143, "143")
