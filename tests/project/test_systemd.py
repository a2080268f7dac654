"""The units of a nightly refresh: systemd understands every line, and what they say is true of the program."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from builder import errors
from builder.cli.verbs import VERBS
from builder.host import gpu_locks

UNITS = Path(__file__).resolve().parents[2] / "docker" / "systemd"
SERVICE = (UNITS / "warm-cache-refresh.service").read_text(encoding="utf-8")
TIMER = (UNITS / "warm-cache-refresh.timer").read_text(encoding="utf-8")


def values(text: str, name: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{name}=")]


def verify(directory: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("there is no systemd-analyze here (Debian and Ubuntu: apt-get install systemd)")
    units = [str(path) for path in sorted(directory.glob("warm-cache-refresh.*"))]
    return subprocess.run(
        [tool, "verify", "--man=no", *units],
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """As on a machine that has the program and the engine's service."""
    program = tmp_path / "warm-cache"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = SERVICE.replace("/usr/local/bin/warm-cache", str(program)).replace("docker.service", "")
    (tmp_path / "warm-cache-refresh.service").write_text(text)
    (tmp_path / "warm-cache-refresh.timer").write_text(TIMER)
    return tmp_path


def test_systemd_units_are_valid(installed: Path) -> None:
    done = verify(installed)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "warm-cache" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_systemd_mistake_is_found(installed: Path) -> None:
    unit = installed / "warm-cache-refresh.service"
    unit.write_text(unit.read_text() + "NoSuchWord=yes\n")
    done = verify(installed)
    assert "NoSuchWord" in done.stderr


def test_systemd_units_match_the_program() -> None:
    assert values(SERVICE, "ExecStart") == ["/usr/local/bin/warm-cache refresh"]
    known = {f"WARM_CACHE_{option.upper().replace('-', '_')}" for option in VERBS["refresh"].options}
    said = [value.partition("=")[0] for value in values(SERVICE, "Environment")]
    assert {name for name in said if name.startswith("WARM_CACHE_")} <= known
    codes = {errors.BusyError.exit_code, errors.DeferredError.exit_code}
    assert {int(code) for code in values(SERVICE, "SuccessExitStatus")[0].split()} == codes
    assert int(values(SERVICE, "TimeoutStopSec")[0]) >= 10
    assert values(TIMER, "Persistent") == ["yes"]
    assert values(TIMER, "RandomizedDelaySec")


def test_tmpfiles_make_the_directories_of_gpu_locks() -> None:
    lines = (UNITS / "warm-cache.conf").read_text(encoding="utf-8").splitlines()
    made = [line.split() for line in lines if line.startswith("d ")]
    assert [row[1:5] for row in made] == [[str(path), "1777", "root", "root"] for path in gpu_locks.DIRECTORIES]
    assert gpu_locks.TMPFILES == "docker/systemd/warm-cache.conf"
