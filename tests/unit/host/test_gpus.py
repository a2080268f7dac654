"""GPUs as the host's driver files describe them, and as NVML does: the real binding, on a library of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from builder.host.gpus import Gpu, Look, Process, container_of, host_gpus
from builder.run import preflight
from tests.stub_nvml.stub import GB, Driver, a_driver, a_library  # noqa: F401 - fixtures

ROOT = Path(__file__).resolve().parents[3]
VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"
    "GCC version: 12\n"
)

# --- below /proc -----------------------------------------------------------------------------------------------------


def driver_files(tmp_path: Path, count: int) -> Path:
    (tmp_path / "version").write_text(VERSION)
    for index in range(count):
        gpu = tmp_path / "gpus" / f"0000:{index:02x}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text(f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 1{index}\nGPU UUID: \t GPU-{index}\n")
    return tmp_path


def test_eight_of_one_kind(tmp_path: Path) -> None:
    found = host_gpus(driver_files(tmp_path, 8))
    assert found is not None
    assert found.names == ("NVIDIA H200",) * 8
    assert found.driver == "580.65.06"
    assert found.model == "NVIDIA H200"


def test_a_driver_without_gpus(tmp_path: Path) -> None:
    found = host_gpus(driver_files(tmp_path, 0))
    assert found is not None and found.names == () and found.driver == "580.65.06"


def test_no_driver(tmp_path: Path) -> None:
    assert host_gpus(tmp_path / "absent") is None


def test_garbage_is_no_reason_to_crash(tmp_path: Path) -> None:
    root = driver_files(tmp_path, 1)
    (root / "version").write_bytes(b"\xff\xfe\x00")
    (root / "gpus" / "0000:00:00.0" / "information").write_bytes(b"\xff" * 100)
    found = host_gpus(root)
    assert found is not None and found.names == ("unknown",) and found.driver is None


# --- NVML ------------------------------------------------------------------------------------------------------------

LOOK = """
import dataclasses, json, sys
from builder.host.gpus import Nvml
nvml = Nvml(**json.loads(sys.argv[1]))
looks = [dataclasses.asdict(nvml.look()) for _ in range(2)]
nvml.close()
nvml.close()
print(json.dumps(looks[-1]))
"""


def look(environ: Mapping[str, str], *before: str, **options: Any) -> dict[str, Any]:
    """The second look of a process that finds this driver; it looks twice because the first one opens it."""
    done = subprocess.run(
        [*before, sys.executable, "-c", LOOK, json.dumps({"initial": True, **options})],
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


@pytest.fixture
def sleeper() -> Iterator[psutil.Popen]:
    process = psutil.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_nobody_holds_anything(driver: Driver) -> None:
    found = look(driver.environ)
    assert [(gpu["index"], gpu["uuid"]) for gpu in found["gpus"]] == list(enumerate(driver.uuids[:2]))
    for gpu in found["gpus"]:
        assert gpu["name"] == "NVIDIA H200" and gpu["processes"] == []
        assert (gpu["used"], gpu["total"]) == (4 << 20, 150 * GB)
    assert found["absent"] is None and found["notes"] == []


def test_who_holds_what(driver: Driver, sleeper: psutil.Popen) -> None:
    driver.hold((1, sleeper.pid, 71 * GB))
    free, held = look(driver.environ)["gpus"]
    assert free["processes"] == []
    (process,) = held["processes"]
    assert (process["pid"], process["name"], process["memory"]) == (sleeper.pid, "sleep", 71 * GB)
    assert process["started"] == pytest.approx(sleeper.create_time(), abs=1)
    assert held["used"] == 71 * GB + (4 << 20)


def test_a_process_that_has_ended_is_held_against_the_gpu_without_a_name(driver: Driver) -> None:
    driver.hold((0, a_pid_of_nobody(), GB))
    (process,) = look(driver.environ)["gpus"][0]["processes"]
    assert process["name"] is None and process["started"] is None
    assert Process(7).describe({}) == "pid 7 (its name cannot be read)"


def test_many_processes(driver: Driver) -> None:
    driver.hold(*[(0, os.getpid(), 1)] * 40)
    assert len(look(driver.environ)["gpus"][0]["processes"]) == 40


def test_a_name_cannot_command_the_terminal(driver: Driver, tmp_path: Path) -> None:
    program = tmp_path / "a\x1b[2Jb"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "600"])
    try:
        driver.hold((0, process.pid, GB))
        assert look(driver.environ)["gpus"][0]["processes"][0]["name"] == "a?[2Jb"
    finally:
        process.kill()
        process.wait()


def test_an_old_driver_does_not_tell_what_it_reserves(driver: Driver) -> None:
    driver.say("nvmlDeviceGetMemoryInfo_v2", 13)
    found = look(driver.environ)
    assert found["gpus"][0]["used"] == 4 << 20 and found["notes"] == []


def test_no_nvml(tmp_path: Path) -> None:
    """A file that is no library stands in its place, so that a machine that has one does not help out."""
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    found = look({"LD_LIBRARY_PATH": str(tmp_path)})
    assert found["gpus"] == [] and found["absent"] == "there is no NVML here (libnvidia-ml.so.1)"


@pytest.mark.parametrize(
    ("function", "code", "says"),
    [
        ("nvmlInit", 18, "NVML says: RM has detected an NVML/RM version mismatch"),
        ("nvmlInit", 9, "NVML says: "),
        ("nvmlDeviceGetCount", 4, "NVML says: Insufficient Permissions"),
    ],
)
def test_a_driver_that_refuses(driver: Driver, function: str, code: int, says: str) -> None:
    driver.say(function, code)
    found = look(driver.environ)
    assert found["gpus"] == [] and found["absent"].startswith(says)


def test_a_gpu_that_fell_off_the_bus(driver: Driver) -> None:
    driver.say("nvmlDeviceGetHandleByIndex", 15, gpu=0)
    found = look(driver.environ)
    assert [gpu["index"] for gpu in found["gpus"]] == [1]
    assert found["notes"] == ["GPU 0 cannot be asked: GPU is lost"]


@pytest.mark.parametrize(("code", "why"), [(3, "Not Supported"), (4, "Insufficient Permissions")])
def test_processes_that_are_not_told(driver: Driver, code: int, why: str) -> None:
    """MIG, and a container without the rights to ask."""
    driver.say("nvmlDeviceGetComputeRunningProcesses", code)
    found = look(driver.environ)
    assert [gpu["processes"] for gpu in found["gpus"]] == [None, None]
    assert found["gpus"][0]["used"] == 4 << 20
    assert found["notes"] == [f"GPU {index} does not say who holds it: {why}" for index in range(2)]


def test_memory_that_is_not_told(driver: Driver) -> None:
    driver.say("nvmlDeviceGetMemoryInfo_v2", 3, gpu=1)
    driver.say("nvmlDeviceGetMemoryInfo", 3, gpu=1)
    found = look(driver.environ)
    assert [gpu["used"] for gpu in found["gpus"]] == [4 << 20, None]
    assert found["notes"] == ["GPU 1 does not say how much of its memory is in use: Not Supported"]


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetComputeRunningProcesses"])
def test_a_driver_that_hangs_is_left_alone(driver: Driver, function: str) -> None:
    driver.hang = function
    driver.write()
    began = time.monotonic()
    found = look(driver.environ, patience=0.3)
    assert found["absent"] == "NVML gave no answer for 0 s" and found["gpus"] == []
    assert time.monotonic() - began < 10


class TestPidNamespace:
    def test_pids_of_nobody_count_for_nothing(self, driver: Driver) -> None:
        driver.hold((0, os.getpid(), GB), (1, a_pid_of_nobody(), GB))
        found = look(driver.environ, initial=False)
        assert [gpu["processes"] for gpu in found["gpus"]] == [None, None]
        assert found["gpus"][0]["used"] == GB + (4 << 20)
        (note,) = found["notes"]
        assert "PID namespace" in note and "only memory counts" in note

    def test_pids_that_are_here_are_told(self, driver: Driver) -> None:
        driver.hold((0, os.getpid(), GB))
        found = look(driver.environ, initial=False)
        assert [process["pid"] for process in found["gpus"][0]["processes"]] == [os.getpid()]
        (note,) = found["notes"]
        assert "processes outside it cannot be seen" in note

    def test_a_real_one_is_recognised(self, driver: Driver, sleeper: psutil.Popen) -> None:
        apart = ["unshare", "--pid", "--fork", "--mount-proc"]
        try:
            possible = subprocess.run([*apart, "true"], capture_output=True, timeout=30).returncode == 0
        except FileNotFoundError:
            possible = False
        if not possible:
            pytest.skip("no PID namespace can be made here")
        driver.hold((0, sleeper.pid + 4_000_000, GB))
        found = look(driver.environ, *apart, initial=None)
        assert found["gpus"][0]["processes"] is None and "PID namespace" in found["notes"][0]


def a_pid_of_nobody() -> int:
    return next(pid for pid in range(4_194_303, 1, -1) if not psutil.pid_exists(pid))


# --- containers ------------------------------------------------------------------------------------------------------

ID, OUTER = "4" * 64, "7" * 64


@pytest.mark.parametrize(
    ("text", "container"),
    [
        (f"0::/docker/{ID}\n", ID),
        (f"0::/system.slice/docker-{ID}.scope\n", ID),
        (f"9:name=systemd:/docker/{OUTER}/docker/{ID}\n0::/docker/{OUTER}/docker/{ID}\n", ID),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", ID),
        (f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n", ID),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", None),
        ("0::/\n", None),
        ("", None),
    ],
)
def test_the_container_of_a_process(tmp_path: Path, text: str, container: str | None) -> None:
    (tmp_path / "17").mkdir()
    (tmp_path / "17" / "cgroup").write_text(text)
    assert container_of(17, tmp_path) == container
    assert container_of(18, tmp_path) is None


# --- preflight -------------------------------------------------------------------------------------------------------


def gpu(index: int, *processes: Process, used: int = 0, unknown: bool = False) -> Gpu:
    return Gpu(index, f"GPU-{index}", "NVIDIA H200", used, 150 * GB, None if unknown else processes)


def test_everybody_who_holds_a_gpu_is_named_at_once() -> None:
    scheduler = Process(48121, 71 * GB, "sglang::scheduler_TP3", 5.0, ID)
    stranger = Process(9, 2 * GB, "python3", 6.0, OUTER)
    its_other = Process(48121, 5, "sglang::scheduler_TP3", 5.0, ID)
    found = Look((gpu(3, scheduler, used=71 * GB), gpu(4, its_other, stranger)))
    texts = [(str(problem)) for problem in preflight.busy(found, lambda: {ID: "ci-h200-2"})]
    remedy = "Stop it, set [gpus] acquire, or pass --allow-busy."
    assert texts == [
        f"GPUs: GPUs 3, 4 are held by pid 48121 (sglang::scheduler_TP3, container ci-h200-2). {remedy}",
        f"GPUs: GPU 4 is held by pid 9 (python3, container {OUTER[:12]} of another engine). {remedy}",
    ]


@pytest.mark.parametrize("unknown", [False, True])
def test_memory_that_nobody_seems_to_hold_is_a_problem_too(unknown: bool) -> None:
    found = Look((gpu(0, used=900 << 20, unknown=unknown), gpu(1, used=71 * GB, unknown=unknown)))
    (problem,) = preflight.busy(found, dict)
    assert problem.text == "GPU 1 has 71.0 GB in use by a process that cannot be seen from here."


def test_an_idle_machine_is_no_problem_and_nobody_asks_for_containers() -> None:
    assert list(preflight.busy(Look((gpu(0), gpu(1, used=4 << 20))), lambda: pytest.fail("asked"))) == []


def test_a_container_gets_the_first_gpus_or_those_it_names() -> None:
    machine = Look(tuple(gpu(index) for index in range(8)))
    assert [one.index for one in machine.chosen(None, 4).gpus] == [0, 1, 2, 3]
    assert [one.index for one in machine.chosen((5, 7), 2).gpus] == [5, 7]
