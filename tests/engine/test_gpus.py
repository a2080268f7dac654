"""GPUs before, during and after a run, and the operator's commands around it: the real program on a real engine, with
an NVML and a libcuda of our own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from builder.cache import layout
from tests.engine.cli import GATE, READY, Ended, command, wait_for
from tests.engine.gpumachine import GpuCli
from tests.stub_nvml.stub import GB, Driver

pytestmark = pytest.mark.engine

GPUS = 2


@pytest.fixture(scope="module", name="image")
def a_gpu_image(gpu_images: Callable[[int], str]) -> str:
    return gpu_images(GPUS)


@pytest.fixture(name="cli")
def a_gpu_cli(tmp_path: Path, docker_host: str, image: str, driver: Driver) -> Iterator[GpuCli]:
    (tmp_path / "user").mkdir()
    cli = GpuCli.on(tmp_path / "user", docker_host, image, driver)
    yield cli
    cli.close()


def problems(ended: Ended) -> list[str]:
    return [f"{problem['text']} {problem['remedy']}" for problem in ended.document["error"]["problems"]]


# --- before ----------------------------------------------------------------------------------------------------------


def test_busy_gpu_names_every_process_and_starts_nothing(cli: GpuCli, sleeper: psutil.Popen) -> None:
    cli.gpus()
    cli.driver.used[0] = 30 * GB
    cli.driver.hold((1, sleeper.pid, 71 * GB), (1, os.getpid(), 1 * GB))
    ended = cli.ended()
    assert ended.status == 12
    assert len(problems(ended)) == 3
    for text in (f"GPU 1 is held by pid {sleeper.pid} (sleep)", f"by pid {os.getpid()} (", "GPU 0 has 30.0 GB in use"):
        assert text in ended.said
    assert "Stop it, set [gpus] acquire, or pass --allow-busy." in ended.said
    assert not list(cli.logs.glob("one.log"))


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_allow_busy_starts_on_busy_gpu(cli: GpuCli, sleeper: psutil.Popen, how: str) -> None:
    cli.gpus()
    cli.driver.hold((1, sleeper.pid, 71 * GB))
    options = ["--allow-busy"] if how == "flag" else []
    ended = cli.ended(*options, environ={"WARM_CACHE_ALLOW_BUSY": "" if how == "flag" else "1"})
    assert ended.status == 0, ended.said
    assert any(f"held by pid {sleeper.pid} (sleep)" in warning for warning in ended.document["warnings"])
    assert ended.document["gpus"][1]["held_by"] == [sleeper.pid]


def test_busy_gpu_names_container_of_process(cli: GpuCli) -> None:
    name = f"warm-cache-test-holder-{os.getpid()}"
    docker = ["docker", "-H", cli.host]
    mark = f"sleep-{os.urandom(4).hex()}"
    run = [*docker, "run", "-d", "--rm", "--network", "none", "--name", name, "--entrypoint", "python3", cli.image]
    subprocess.run([*run, "-c", f"import time; time.sleep(600) # {mark}"], check=True, capture_output=True, timeout=60)
    try:
        found = [
            process.pid
            for process in psutil.process_iter()
            if any(mark in part for part in _cmdline(process)) and "docker" not in process.name()
        ]
        if not found:
            pytest.skip("the engine's processes cannot be seen from here")
        cli.driver.hold((0, found[-1], 60 * GB))
        cli.gpus()
        ended = cli.ended()
        assert ended.status == 12
        assert f"GPU 0 is held by pid {found[-1]} (python3" in problems(ended)[0]
        assert f"container {name})" in problems(ended)[0]
    finally:
        subprocess.run([*docker, "rm", "-f", name], check=False, capture_output=True, timeout=60)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_doctor_lists_busy_gpu_with_other_findings(cli: GpuCli, sleeper: psutil.Popen) -> None:
    cli.gpus()
    cli.driver.hold((0, sleeper.pid, GB))
    ended = cli.run("doctor", "--json", "--image", "no/such:image")
    assert ended.status == 12
    for text in ("no/such:image is not on this engine", f"GPU 0 is held by pid {sleeper.pid} (sleep)"):
        assert any(text in problem for problem in problems(ended)), ended.said
    assert cli.run("doctor", "--allow-busy").status == 0


def test_reading_verbs_do_not_ask_driver(cli: GpuCli, sleeper: psutil.Popen) -> None:
    """A check neither waits for GPUs nor minds who holds them."""
    cli.gpus()
    assert cli.ended().status == 0
    cli.driver.hold((0, sleeper.pid, GB))
    cli.driver.say("nvmlInit", 999)
    assert cli.run("check").status == 0
    assert cli.ended().status == 0


def test_driver_of_another_version_than_its_library_stops_the_run(cli: GpuCli) -> None:
    cli.gpus()
    cli.driver.say("nvmlInit", 18)
    ended = cli.ended("--allow-busy")
    assert ended.status == 12, ended.said
    assert "restart the machine" in ended.said
    assert not list(cli.logs.glob("one.log"))


# --- after -----------------------------------------------------------------------------------------------------------


def test_release_waits_until_gpus_are_free(cli: GpuCli, sleeper: psutil.Popen) -> None:
    cli.gpus(command("one", GATE + READY), command("two", READY))
    running = cli.start("warm", "--json")
    running.says("▸ command")
    cli.driver.hold((1, sleeper.pid, 70 * GB))
    cli.go()
    running.says("one: warmed")
    cli.driver.hold()
    ended = running.end()
    cli.left_nothing()
    assert ended.status == 0, ended.said
    assert ended.err.count("GPUs free again after") == 2
    free, held = ended.document["gpus"]
    assert (free["index"], free["uuid"], free["name"]) == (0, cli.driver.uuids[0], "NVIDIA H200")
    assert free["memory_total_bytes"] == 150 * GB and free["held_by"] == []
    assert 0 <= free["free_again_seconds"] <= held["free_again_seconds"] < 10


def test_gpus_held_after_task_end_run(cli: GpuCli, sleeper: psutil.Popen) -> None:
    cli.gpus(command("one", GATE + READY), command("two", READY), release_timeout="1s")
    running = cli.start("warm", "--json")
    running.says("▸ command")
    cli.driver.hold((1, sleeper.pid, 70 * GB))
    cli.go()
    ended = running.end()
    cli.left_nothing()
    assert ended.status == 13
    message = ended.document["error"]["message"]
    assert f"GPU 1 is held by pid {sleeper.pid} (sleep), with 70.0 GB more in use than before" in message
    assert "after one" in message and "GPU 0" not in message
    assert [task["state"] for task in ended.document["tasks"]] == ["warmed", "cold"]
    assert [gpu["free_again_seconds"] is None for gpu in ended.document["gpus"]] == [False, True]
    cli.driver.hold()
    again = cli.ended()
    assert again.status == 0, "its locks went with it"
    assert [task["state"] for task in again.document["tasks"]] == ["warm", "warmed"]


def test_gpu_memory_not_released_ends_run(cli: GpuCli) -> None:
    cli.gpus(command("one", GATE + READY), command("two", READY), release_timeout="1s")
    running = cli.start("warm", "--json")
    running.says("▸ command")
    cli.driver.used[0] = 600 << 20
    cli.driver.write()
    cli.go()
    ended = running.end()
    assert ended.status == 13
    assert "GPU 0 has 0.6 GB more in use than before, by no process that can be seen" in ended.said


def test_gpu_lost_during_run_ends_run(cli: GpuCli) -> None:
    cli.gpus(command("one", GATE + READY), release_timeout="1s")
    running = cli.start("warm", "--json")
    running.says("▸ command")
    cli.driver.say("nvmlDeviceGetHandleByIndex", 15, gpu=1)
    cli.go()
    ended = running.end()
    assert ended.status == 13 and "GPU 1 does not answer (GPU 1 cannot be read: GPU is lost)" in ended.said


def test_gpu_memory_within_tolerance_is_released(cli: GpuCli) -> None:
    cli.gpus(command("one", GATE + READY))
    running = cli.start("warm", "--json")
    running.says("▸ command")
    cli.driver.used[0] = 500 << 20
    cli.driver.write()
    cli.go()
    assert running.end().status == 0


def test_allow_busy_release_checks_own_processes_only(cli: GpuCli, sleeper: psutil.Popen) -> None:
    cli.gpus(command("one", GATE + READY), release_timeout="1s")
    running = cli.start("warm", "--json", "--allow-busy")
    running.says("▸ command")
    cli.driver.hold((1, sleeper.pid, 70 * GB))
    cli.go()
    assert running.end().status == 0


def test_signal_does_not_wait_for_gpu_release(cli: GpuCli, sleeper: psutil.Popen) -> None:
    cli.gpus(command("one", GATE + READY), release_timeout="60s")
    running = cli.start("warm", "--json")
    running.says("▸ command")
    cli.driver.hold((1, sleeper.pid, 70 * GB))
    running.send(signal.SIGTERM)
    ended = running.end(20)
    cli.left_nothing()
    assert ended.status == 143
    assert any(f"GPU 1 is held by pid {sleeper.pid} (sleep)" in warning for warning in ended.document["warnings"])


def test_nvml_missing_is_reported(cli: GpuCli, tmp_path: Path) -> None:
    cli.gpus()
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    ended = cli.ended(environ={"LD_LIBRARY_PATH": str(tmp_path)})
    assert ended.status == 0, ended.said
    assert (
        ended.said.count("GPUs: there is no NVML here (libnvidia-ml.so.1); which processes use them, and whether") == 1
    )
    assert ended.document["gpus"] == []
    assert ended.document["gpus_reason"] == "there is no NVML here (libnvidia-ml.so.1)"


def test_nvml_gaps_are_reported_once(cli: GpuCli) -> None:
    cli.gpus(command("one", READY), command("two", READY))
    cli.driver.say("nvmlDeviceGetComputeRunningProcesses", 3)
    ended = cli.ended()
    assert ended.status == 0, ended.said
    assert ended.said.count("GPUs: GPU 1 does not list its processes: Not Supported") == 1


# --- locks -----------------------------------------------------------------------------------------------------------


def test_gpu_lock_held_names_builder_and_times_out(cli: GpuCli) -> None:
    cli.gpus(command("one", GATE + READY))
    first = cli.start("warm", "--json")
    first.says("▸ command")
    other = cli.another("other")
    other.gpus(devices="1", count=None)
    ended = other.run("warm", "--json", "--lock-timeout", "1s")
    assert ended.status == 15, ended.said
    holder = f"pid {first.process.pid} ("
    assert f"waiting for {holder}" in ended.said
    assert f"GPU 1 ({cli.driver.uuids[1]}) is in use by {holder}" in ended.document["error"]["message"]
    cli.go()
    assert first.end().status == 0


@pytest.mark.parametrize("killed", [False, True], ids=["it ends", "it is killed"])
def test_gpu_lock_held_waits_for_its_turn(cli: GpuCli, killed: bool) -> None:
    cli.gpus(command("one", GATE + READY))
    first = cli.start("warm", "--json")
    first.says("▸ command")
    other = cli.another("other")
    other.gpus()
    second = other.start("warm", "--json")
    second.says("waiting for pid")
    if killed:
        first.process.kill()
        first.process.wait()
    else:
        cli.go()
        assert first.end().status == 0
    ended = second.end()
    assert ended.status == 0, ended.said


@pytest.mark.alone
def test_builder_killed_waiting_run_sweeps_first(cli: GpuCli, sleeper: psutil.Popen) -> None:
    cli.gpus(command("one", GATE + READY), command("two", READY))
    first = cli.start("warm", "--json")
    first.says("▸ command")
    second = cli.start("warm", "--json")
    second.says("waiting for pid")
    cli.driver.hold((1, sleeper.pid, 70 * GB))
    first.process.kill()
    first.process.wait()
    second.says("its builder is gone")
    cli.driver.hold()
    cli.go()
    ended = second.end()
    cli.left_nothing()
    assert ended.status == 0, ended.said


# --- the operator's commands -----------------------------------------------------------------------------------------


@pytest.fixture
def ledger(cli: GpuCli) -> Path:
    """What the commands did, one word a line."""
    path = cli.place / "ledger"
    cli.gpus(command("one", GATE + READY), **hooks(path))
    return path


def hooks(ledger: Path, acquire: str = "true", release: str = "true") -> dict[str, Any]:
    return {
        "acquire": [f"echo acquire $WARM_CACHE_RUN >> {ledger}; {acquire}"],
        "release": [f"echo release $WARM_CACHE_RUN >> {ledger}; {release}"],
    }


def done(ledger: Path) -> list[str]:
    return [line.split()[0] for line in ledger.read_text().splitlines()] if ledger.exists() else []


def test_hooks_run_acquire_before_and_release_after(cli: GpuCli, ledger: Path, sleeper: psutil.Popen) -> None:
    """What holds a GPU is what acquire is for: it is looked at afterwards."""
    cli.driver.hold((0, sleeper.pid, 70 * GB))
    free = cli.driver.state.with_suffix(".free")
    lines = [line for line in cli.driver.state.read_text().splitlines() if not line.startswith("process")]
    free.write_text("\n".join(lines) + "\n")
    cli.gpus(**hooks(ledger, acquire=f"mv {free} {cli.driver.state}; echo drained"))
    ended = cli.ended()
    assert ended.status == 0, ended.said
    assert done(ledger) == ["acquire", "release"]
    assert len({line.split()[1] for line in ledger.read_text().splitlines()}) == 1
    assert "  » drained" in ended.err
    assert cli.ended().status == 0 and done(ledger) == ["acquire", "release"], "warm: there was nothing to do"


def test_acquire_leaving_gpu_busy_is_preflight_error(cli: GpuCli, ledger: Path, sleeper: psutil.Popen) -> None:
    cli.driver.hold((0, sleeper.pid, 70 * GB))
    ended = cli.ended()
    assert ended.status == 12 and "[gpus] acquire did not free it" in ended.said
    assert done(ledger) == ["acquire", "release"]


def test_acquire_failure_runs_release(cli: GpuCli, ledger: Path) -> None:
    cli.gpus(**hooks(ledger, acquire="echo no runner answers; exit 7"))
    ended = cli.ended()
    assert ended.status == 12
    assert "ended with status 7: no runner answers" in problems(ended)[0]
    assert done(ledger) == ["acquire", "release"]
    assert not list(cli.logs.glob("one.log"))


def test_acquire_timeout_runs_release(cli: GpuCli, ledger: Path) -> None:
    cli.gpus(**hooks(ledger, acquire="sleep 600"), hook_timeout="1s")
    ended = cli.ended()
    assert ended.status == 12 and "did not end within 1 s" in problems(ended)[0]
    assert done(ledger) == ["acquire", "release"]


def test_failed_task_runs_release(cli: GpuCli, ledger: Path) -> None:
    cli.gpus(command("one", "raise SystemExit(3)"), **hooks(ledger))
    assert cli.ended().status == 11
    assert done(ledger) == ["acquire", "release"]


def test_gpus_held_runs_release(cli: GpuCli, ledger: Path, sleeper: psutil.Popen) -> None:
    cli.gpus(command("one", GATE + READY), **hooks(ledger), release_timeout="1s")
    running = cli.start("warm", "--json")
    running.says("▸ command")
    cli.driver.hold((1, sleeper.pid, 70 * GB))
    cli.go()
    assert running.end().status == 13
    assert done(ledger) == ["acquire", "release"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_runs_release(cli: GpuCli, ledger: Path, signum: signal.Signals) -> None:
    running = cli.start("warm", "--json")
    running.says("▸ command")
    running.send(signum)
    ended = running.end(20)
    cli.left_nothing()
    assert ended.status == 128 + signum
    assert done(ledger) == ["acquire", "release"]


def test_signal_during_acquire_ends_it_and_runs_release(cli: GpuCli, ledger: Path) -> None:
    cli.gpus(**hooks(ledger, acquire="echo draining; sleep 600"))
    running = cli.start("warm", "--json")
    running.says("» draining")
    running.send(signal.SIGTERM)
    ended = running.end(20)
    cli.left_nothing()
    assert ended.status == 143 and done(ledger) == ["acquire", "release"]


def test_second_signal_ends_release_and_next_run_repeats_it(cli: GpuCli, ledger: Path) -> None:
    slow = f"test -e {cli.place}/fast || sleep 600"
    cli.gpus(command("one", GATE + READY), **hooks(ledger, release=slow))
    running = cli.start("warm", "--json")
    running.says("▸ command")
    running.send(signal.SIGTERM)
    running.says("putting this machine back into service")
    wait_for(lambda: done(ledger) == ["acquire", "release"], 10, "the command's start")
    running.send(signal.SIGTERM)
    ended = running.end(20)
    assert ended.status == 143
    assert any("is tried again by the next run" in warning for warning in ended.document["warnings"])
    (cli.place / "fast").touch()
    cli.go()
    assert cli.ended().status == 0
    assert done(ledger) == ["acquire", "release", "release", "acquire", "release"]


def test_release_failure_is_warning_and_retried(cli: GpuCli, ledger: Path) -> None:
    cli.gpus(**hooks(ledger, release="echo unreachable; exit 1"))
    running = cli.start("warm", "--json")
    ended = running.end()
    assert ended.status == 0
    (warning,) = ended.document["warnings"]
    assert "release failed" in warning and "unreachable" in warning
    (debt,) = (cli.place / "run").glob("*/*/release.json")
    debt.write_text(json.dumps({**json.loads(debt.read_text()), "lines": [f"echo paid >> {ledger}"]}))
    cli.gpus(command("two", READY), **hooks(ledger))
    assert cli.ended().status == 0
    assert done(ledger) == ["acquire", "release", "paid", "acquire", "release"]


def test_builder_killed_next_run_runs_release(cli: GpuCli, ledger: Path) -> None:
    running = cli.start("warm", "--json")
    running.says("▸ command")
    running.process.kill()
    running.process.wait()
    dead = ledger.read_text().split()[1]
    cli.go()
    ended = cli.ended()
    assert ended.status == 0, ended.said
    assert done(ledger) == ["acquire", "release", "acquire", "release"]
    assert ledger.read_text().splitlines()[1] == f"release {dead}"
    assert "putting this machine back into service, for a builder that was killed" in ended.said


def test_builder_killed_warm_run_runs_release(cli: GpuCli, ledger: Path) -> None:
    layout.prepare(cli.root)
    cli.go()
    assert cli.ended().status == 0
    (cli.root / "go").unlink()
    running = cli.start("warm", "--json", "--force")
    running.says("▸ command")
    running.process.kill()
    running.process.wait()
    ended = cli.ended()
    assert ended.status == 0 and "Nothing to do" in ended.said
    assert done(ledger) == ["acquire", "release", "acquire", "release"]


def test_release_of_dead_builder_waits_for_current_owner(cli: GpuCli, ledger: Path) -> None:
    """Killed, and meanwhile another builder has the machine: its own release comes when it is done, none before."""
    dead = cli.start("warm", "--json")
    dead.says("▸ command")
    other = cli.another("other")
    other.gpus(command("one", GATE + READY), **hooks(ledger))
    living = other.start("warm", "--json", environ={"XDG_RUNTIME_DIR": str(cli.place / "run")})
    living.says("waiting for pid")
    dead.process.kill()
    dead.process.wait()
    wait_for(lambda: done(ledger) == ["acquire", "acquire"], 30, "the second acquire")
    living.says("▸ command")
    third = cli.another("third")
    third.gpus(**hooks(ledger))
    run = str(cli.place / "run")
    busy = third.start("warm", "--json", "--lock-timeout", "1s", environ={"XDG_RUNTIME_DIR": run}).end()
    assert busy.status == 15 and "this machine is in use by pid" in busy.said
    assert done(ledger) == ["acquire", "acquire"]
    (other.root / "go").touch()
    assert living.end().status == 0
    assert done(ledger) == ["acquire", "acquire", "release"]
    third.gpus(**hooks(ledger))
    assert third.start("warm", environ={"XDG_RUNTIME_DIR": run}).end().status == 0
    assert done(ledger) == ["acquire", "acquire", "release", "release", "acquire", "release"]
