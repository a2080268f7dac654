"""NVML snapshots: the real binding, loaded by a process of its own, on a stub of the driver's library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from builder.host.gpus import GpuProcess
from tests.stub_nvml.stub import GB, Driver

ROOT = Path(__file__).resolve().parents[2]


SNAPSHOT = """
import dataclasses, json, sys
from builder.host.gpus import Nvml
nvml = Nvml(**json.loads(sys.argv[1]))
taken = [dataclasses.asdict(nvml.snapshot()) for _ in range(2)]
nvml.close()
nvml.close()
print(json.dumps(taken[-1]))
"""


def snapshot(environ: Mapping[str, str], *before: str, **options: Any) -> dict[str, Any]:
    """The second snapshot of a process that finds this driver; the first one opens the library."""
    done = subprocess.run(
        [*before, sys.executable, "-c", SNAPSHOT, json.dumps({"initial": True, **options})],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_idle_gpus_have_no_processes(driver: Driver) -> None:
    found = snapshot(driver.environ)
    assert [(gpu["index"], gpu["uuid"]) for gpu in found["gpus"]] == list(enumerate(driver.uuids[:2]))
    for gpu in found["gpus"]:
        assert gpu["name"] == "NVIDIA H200" and gpu["processes"] == []
        assert (gpu["used"], gpu["total"]) == (4 << 20, 150 * GB)
    assert found["absent"] is None and found["notes"] == []


def test_process_on_gpu_is_identified(driver: Driver, sleeper: psutil.Popen) -> None:
    driver.hold((1, sleeper.pid, 71 * GB))
    free, held = snapshot(driver.environ)["gpus"]
    assert free["processes"] == []
    (process,) = held["processes"]
    assert (process["pid"], process["name"], process["memory"]) == (sleeper.pid, "sleep", 71 * GB)
    assert process["started"] == pytest.approx(sleeper.create_time(), abs=1)
    assert held["used"] == 71 * GB + (4 << 20)


def test_ended_process_counts_without_a_name(driver: Driver) -> None:
    driver.hold((0, unused_pid(), GB))
    (process,) = snapshot(driver.environ)["gpus"][0]["processes"]
    assert process["name"] is None and process["started"] is None
    assert GpuProcess(7).describe({}) == "pid 7 (its name cannot be read)"


def test_forty_processes_are_all_listed(driver: Driver) -> None:
    driver.hold(*[(0, os.getpid(), 1)] * 40)
    assert len(snapshot(driver.environ)["gpus"][0]["processes"]) == 40


def test_process_name_controls_are_replaced(driver: Driver, tmp_path: Path) -> None:
    program = tmp_path / "a\x1b[2Jb"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "600"])
    try:
        driver.hold((0, process.pid, GB))
        assert snapshot(driver.environ)["gpus"][0]["processes"][0]["name"] == "a?[2Jb"
    finally:
        process.kill()
        process.wait()


def test_old_driver_reports_all_memory_in_use(driver: Driver) -> None:
    driver.say("nvmlDeviceGetMemoryInfo_v2", 13)
    found = snapshot(driver.environ)
    assert found["gpus"][0]["used"] == 4 << 20 and found["notes"] == []


def test_without_nvml_absent_says_so(tmp_path: Path) -> None:
    """A file that is no library stands in its place, so that a machine that has one does not help out."""
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    found = snapshot({"LD_LIBRARY_PATH": str(tmp_path)})
    assert found["gpus"] == [] and found["absent"] == "there is no NVML here (libnvidia-ml.so.1)"


@pytest.mark.parametrize(
    ("function", "code", "says"),
    [
        ("nvmlInit", 18, "NVML: RM has detected an NVML/RM version mismatch"),
        ("nvmlInit", 9, "NVML: "),
        ("nvmlDeviceGetCount", 4, "NVML: Insufficient Permissions"),
    ],
)
def test_refusing_driver_is_absent_with_its_words(driver: Driver, function: str, code: int, says: str) -> None:
    driver.say(function, code)
    found = snapshot(driver.environ)
    assert found["gpus"] == [] and found["absent"].startswith(says)


def test_lost_gpu_is_left_out_with_a_note(driver: Driver) -> None:
    driver.say("nvmlDeviceGetHandleByIndex", 15, gpu=0)
    found = snapshot(driver.environ)
    assert [gpu["index"] for gpu in found["gpus"]] == [1]
    assert found["notes"] == ["GPU 0 cannot be read: GPU is lost"]


@pytest.mark.parametrize(("code", "why"), [(3, "Not Supported"), (4, "Insufficient Permissions")])
def test_unlisted_processes_are_none_with_a_note(driver: Driver, code: int, why: str) -> None:
    """MIG, and a container without the rights to ask."""
    driver.say("nvmlDeviceGetComputeRunningProcesses", code)
    found = snapshot(driver.environ)
    assert [gpu["processes"] for gpu in found["gpus"]] == [None, None]
    assert found["gpus"][0]["used"] == 4 << 20
    assert found["notes"] == [f"GPU {index} does not list its processes: {why}" for index in range(2)]


def test_unreported_memory_is_none_with_a_note(driver: Driver) -> None:
    driver.say("nvmlDeviceGetMemoryInfo_v2", 3, gpu=1)
    driver.say("nvmlDeviceGetMemoryInfo", 3, gpu=1)
    found = snapshot(driver.environ)
    assert [gpu["used"] for gpu in found["gpus"]] == [4 << 20, None]
    assert found["notes"] == ["GPU 1 does not report its memory in use: Not Supported"]


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetComputeRunningProcesses"])
def test_hanging_driver_times_out(driver: Driver, function: str) -> None:
    driver.hang = function
    driver.write()
    began = time.monotonic()
    found = snapshot(driver.environ, timeout=0.3)
    assert found["absent"] == "NVML gave no answer for 0 s" and found["gpus"] == []
    assert time.monotonic() - began < 10


class TestPidNamespace:
    def test_unknown_pids_leave_only_memory(self, driver: Driver) -> None:
        driver.hold((0, os.getpid(), GB), (1, unused_pid(), GB))
        found = snapshot(driver.environ, initial=False)
        assert [gpu["processes"] for gpu in found["gpus"]] == [None, None]
        assert found["gpus"][0]["used"] == GB + (4 << 20)
        (note,) = found["notes"]
        assert "PID namespace" in note and "only memory counts" in note

    def test_known_pids_are_listed_with_a_note(self, driver: Driver) -> None:
        driver.hold((0, os.getpid(), GB))
        found = snapshot(driver.environ, initial=False)
        assert [process["pid"] for process in found["gpus"][0]["processes"]] == [os.getpid()]
        (note,) = found["notes"]
        assert "processes outside it cannot be seen" in note

    def test_real_namespace_is_recognised(self, driver: Driver, sleeper: psutil.Popen) -> None:
        apart = ["unshare", "--pid", "--fork", "--mount-proc"]
        try:
            possible = subprocess.run([*apart, "true"], capture_output=True, timeout=30).returncode == 0
        except FileNotFoundError:
            possible = False
        if not possible:
            pytest.skip("no PID namespace can be made here")
        driver.hold((0, sleeper.pid + 4_000_000, GB))
        found = snapshot(driver.environ, *apart, initial=None)
        assert found["gpus"][0]["processes"] is None and "PID namespace" in found["notes"][0]


def unused_pid() -> int:
    return next(pid for pid in range(4_194_303, 1, -1) if not psutil.pid_exists(pid))
