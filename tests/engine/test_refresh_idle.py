"""`refresh --when-idle`: who keeps a machine from being idle, as the driver says it or, without one, the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from builder.engine.client import Engine
from builder.flock import try_lock
from builder.host import gpu_locks
from tests.engine.cli import Cli, Ended, request, shapes
from tests.engine.gpumachine import GpuCli
from tests.stub_nvml.stub import GB, Driver

pytestmark = [pytest.mark.engine, pytest.mark.alone]  # a machine is idle if no test uses it

GPUS = 2


@pytest.fixture(scope="module", name="image")
def a_gpu_image(gpu_images: Callable[[int], str]) -> str:
    return gpu_images(GPUS)


def deferred(cli: Cli, reason: str) -> None:
    """Nothing was warmed, and the reason is said while it waits and at the end."""
    ended: Ended = cli.run("refresh", "--when-idle", "2s", "--json")
    if "device driver" in ended.err:
        pytest.skip("this engine has no GPU device driver, not even a fake one")
    assert ended.status == 17, ended.said
    assert reason in ended.document["error"]["message"]
    assert "waiting until this machine is idle, at most 0:02" in ended.err
    assert not cli.root.exists()


def when_free(cli: Cli, reason: str, free: Any) -> None:
    """One that waits has its turn as soon as the machine is idle, and then goes by the hooks, as `warm` does."""
    ledger = cli.place / "ledger"
    hooks = {"acquire": [f"echo acquire >> {ledger}"], "release": [f"echo release >> {ledger}"]}
    cli.manifest(shapes("mine"), gpus={"count": GPUS, **hooks})
    running = cli.start("refresh", "--when-idle", "2m", "--json")
    running.says(reason)
    assert not ledger.exists()
    free()
    ended = running.end()
    assert ended.status == 0, ended.said
    assert ended.document["refresh"]["waited_seconds"] > 0
    assert ledger.read_text() == "acquire\nrelease\n"
    cli.left_nothing()


def test_refresh_when_idle_waits_for_gpu_process_and_lock(
    tmp_path: Path, docker_host: str, image: str, driver: Driver, sleeper: psutil.Popen
) -> None:
    (tmp_path / "user").mkdir()
    cli = GpuCli.on(tmp_path / "user", docker_host, image, driver)
    try:
        cli.manifest(shapes("mine"), gpus={"count": GPUS})
        driver.hold((1, sleeper.pid, 71 * GB))
        deferred(cli, f"GPU 1 is held by pid {sleeper.pid} (sleep)")
        driver.hold()
        lock = gpu_locks.open_lock_file(gpu_locks.usable_directories()[0], driver.uuids[0])
        assert try_lock(lock)
        deferred(cli, "another builder has GPU 0")
        when_free(cli, "another builder has GPU 0", lambda: os.close(lock))
    finally:
        cli.close()


def test_refresh_when_idle_without_nvml_counts_gpu_containers(
    tmp_path: Path, docker_host: str, image: str, engine: Engine
) -> None:
    (tmp_path / "user").mkdir()
    cli = Cli(tmp_path / "user", docker_host, image)
    cli.manifest(shapes("mine"), gpus={"count": GPUS})
    name = f"test-{os.urandom(4).hex()}"
    gpu = {"Driver": "", "Count": 1, "Capabilities": [["gpu"]]}
    host = {"NetworkMode": "none", "Init": True, "DeviceRequests": [gpu]}
    job = {"Image": image, "Cmd": ["sleep", "600"], "HostConfig": host}
    request(engine, "POST", "/containers/create", params={"name": name}, json=job)
    try:
        engine.start(name)
        deferred(cli, f"container {name} has GPUs")
        when_free(cli, f"container {name} has GPUs", lambda: engine.remove(name, force=True))
    finally:
        engine.remove(name, force=True)
        cli.close()
