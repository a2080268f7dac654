"""Several tasks of one run at once: whose GPUs are whose, what is started, and how all of it ends on every path."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from builder.engine.client import Engine
from builder.report import live
from tests.engine.cli import READY, SHAPE, Cli, command, server, shapes, wait_for
from tests.engine.faults import Aftermath, changed, time_passes
from tests.engine.gpumachine import GpuCli
from tests.engine.workshop import Proxy
from tests.stub_nvml.stub import GB, Driver

pytestmark = pytest.mark.engine

GPUS = 8
#: A cancelled CI step has 7.5 s.
SECONDS = 5.0


def gated(name: str, **more: Any) -> dict[str, Any]:
    """A task that goes on once its own gate is open."""
    gate = f"while not os.path.exists('/jit/go-{name}'): time.sleep(0.02)\n"
    return command(name, f"import os, time\nprint('at the gate', flush=True)\n{gate}{READY}", **more)


def requests(engine: Engine, container: str) -> list[dict[str, Any]]:
    """The device requests that the engine saw."""
    answer = engine._get("/containers/{0}/json", container).json()
    return list(answer["HostConfig"]["DeviceRequests"] or ())


# --- on GPUs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="image")
def a_gpu_image(gpu_images: Callable[[int], str]) -> str:
    return gpu_images(GPUS)


@pytest.fixture
def machine(tmp_path: Path, docker_host: str, image: str, driver: Driver) -> Iterator[GpuCli]:
    driver.gpus = GPUS
    driver.write()
    (tmp_path / "user").mkdir()
    cli = GpuCli.on(tmp_path / "user", docker_host, image, driver)
    yield cli
    cli.close()


def test_concurrent_tasks_get_disjoint_gpus(machine: GpuCli) -> None:
    machine.gpus(
        gated("wide"), gated("half", gpus=4, timeout="1h"), gated("two", gpus=2, timeout="1h"), gated("duo", gpus=2)
    )
    running = machine.start("warm", "--json")
    for label in ("half", "two", "duo"):
        running.says(f"│ {label}: at the gate")
    with machine.engine() as engine:
        seen = [request for found in machine.containers(engine) for request in requests(engine, found)]
    assert sorted(len(request["DeviceIDs"]) for request in seen) == [2, 2, 4]
    assert sorted(device for request in seen for device in request["DeviceIDs"]) == [str(gpu) for gpu in range(GPUS)]
    for label in ("half", "two"):
        (machine.root / f"go-{label}").touch()
        running.says(f"{label}: GPUs free again after")
    assert "wide: at the gate" not in running.err, "two of its GPUs are not free"
    (machine.root / "go-duo").touch()
    running.says("│ wide: at the gate")
    with machine.engine() as engine:
        (wide,) = [request for found in machine.containers(engine) for request in requests(engine, found)]
    assert (wide["Count"], wide["DeviceIDs"]) == (GPUS, None)
    (machine.root / "go-wide").touch()
    ended = running.end()
    machine.left_nothing()
    assert ended.status == 0, ended.said
    assert [task["state"] for task in ended.document["tasks"]] == ["warmed"] * 4
    assert all(gpu["free_again_seconds"] is not None for gpu in ended.document["gpus"])
    assert machine.ended().document["tasks"][1]["state"] == "warm", "the memo did not forget GPUs"


def test_gpus_held_end_run_after_running_tasks(machine: GpuCli) -> None:
    tasks = gated("bad", gpus=4, timeout="2h"), gated("good", gpus=4, timeout="1h"), gated("never")
    machine.gpus(*tasks, release_timeout="1s")
    running = machine.start("warm", "--json")
    for label in ("bad", "good"):
        running.says(f"│ {label}: at the gate")
    with psutil.Popen(["sleep", "600"]) as sleeper:
        machine.driver.hold((0, sleeper.pid, 70 * GB), (7, sleeper.pid, GB))
        (machine.root / "go-bad").touch()
        running.says("bad: warmed")
        wait_for(lambda: len(machine.markers()) == 1, 10, "the first marker")
        machine.driver.hold((0, sleeper.pid, 70 * GB))
        time_is_up = time.monotonic() + 2
        wait_for(lambda: time.monotonic() > time_is_up, 10, "the end of the wait")
        (machine.root / "go-good").touch()
        ended = running.end()
        sleeper.kill()
    machine.left_nothing()
    assert ended.status == 13, ended.said
    assert "after bad" in ended.document["error"]["message"] and "GPU 7" not in ended.document["error"]["message"]
    assert [task["state"] for task in ended.document["tasks"]] == ["warmed", "warmed", "cold"]


@pytest.mark.fault(
    "signal to the builder while the NVIDIA driver hangs",
    how="an NVML that never answers again, two tasks side by side; SIGTERM",
    holds="143, within 5 s: that the GPUs are free again cannot be known, and is said",
)
@pytest.mark.alone
def test_signal_while_driver_hangs_ends_run_in_time(machine: GpuCli, request: pytest.FixtureRequest) -> None:
    aftermath = Aftermath.of(request)
    machine.gpus(gated("one", gpus=4), gated("two", gpus=4))
    running = machine.start("warm", "--json")
    for label in ("one", "two"):
        running.says(f"│ {label}: at the gate")
    machine.driver.hang = "nvmlDeviceGetCount"
    machine.driver.write()
    aftermath.begins()
    sent = time.monotonic()
    running.send(signal.SIGTERM)
    ended = running.end(SECONDS)
    assert time.monotonic() - sent < SECONDS
    machine.left_nothing()
    aftermath.clean()
    assert ended.status == 143, ended.said
    assert "after one, GPU 0 does not answer (NVML gave no answer" in "\n".join(ended.document["warnings"])


def test_several_errors_exit_status_is_engine_lost(machine: GpuCli, proxy: Proxy) -> None:
    machine.gpus(gated("held", gpus=4), gated("lost", gpus=4), release_timeout="1s")
    machine.host = proxy.url
    hurried = "container.GIVE_UP = logs.GIVE_UP = connection.QUICK = 3.0"
    slow = "invocation.Engine = lambda url, _: engine.Engine(url, 3.0)"
    running = machine.start("warm", "--json", program=changed(hurried, slow))
    for label in ("held", "lost"):
        running.says(f"│ {label}: at the gate")
    machine.driver.used[0] = machine.driver.used[7] = 70 * GB
    machine.driver.write()
    (machine.root / "go-held").touch()
    running.says("held: warmed")
    time_passes(1.5)
    proxy.hang = True
    ended = running.end()
    assert ended.status == 16, ended.said
    assert "the engine was lost while lost ran" in ended.document["error"]["message"]
    assert any("not free again 1 s after held" in warning for warning in ended.document["warnings"])
    proxy.hang = False
    with machine.engine() as engine:
        (container,) = machine.containers(engine)
        wait_for(lambda: engine.state(container).finished, SECONDS, "the end by the lease")
    assert machine.run("sweep").status == 0


# --- without GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_signal_stops_concurrent_containers_in_time_of_one(cli: Cli) -> None:
    models = [cli.model(f"org/m{number}") for number in range(3)]
    cli.manifest(*(server(model, "serve", "refuses-sigterm") for model in models), run={"grace": None, "parallel": 3})
    builder = cli.start("warm", "--json")
    for number in range(3):
        builder.says(f"m{number}-tp8: [")
    wait_for(lambda: builder.err.count("SIGTERM is refused") == 3, 30, "three stubborn servers")
    sent = time.monotonic()
    builder.send(signal.SIGTERM)
    ended = builder.end(SECONDS)
    assert time.monotonic() - sent < SECONDS
    cli.left_nothing()
    assert ended.status == 143 and ended.document["warnings"] == []
    assert [(task["state"], task["reason"]) for task in ended.document["tasks"]] == [("cold", "interrupted")] * 3
    assert all("SIGTERM is refused" in cli.last_lines(f"m{number}-tp8") for number in range(3))


@pytest.mark.alone
def test_builder_killed_all_its_containers_end(cli: Cli) -> None:
    cli.manifest(*(gated(name) for name in ("one", "two", "three")), run={"parallel": 2})
    builder = cli.start("warm")
    wait_for(lambda: builder.out.count("at the gate") == 2, 30, "two tasks")
    with cli.engine() as engine:
        containers = cli.containers(engine)
        assert len(containers) == 2
        builder.send(signal.SIGKILL)
        builder.end(SECONDS)
        wait_for(lambda: all(engine.state(found).finished for found in containers), SECONDS, "the end of both")
    cli.manifest(command("quick", READY))
    assert cli.warm().task("quick")["state"] == "warmed"


def test_second_pass_beside_compiling_tasks_is_verified(cli: Cli) -> None:
    """The first one's second pass lasts until the other one, in its first, has added to the same family."""
    head = "import os, pathlib, time\nfrom triton.cache import compile_kernel\n"
    quick = (
        "compile_kernel('quick', 'x')\n"
        "again = pathlib.Path('/jit/again')\n"
        "if again.exists(): pathlib.Path('/jit/second').touch()\n"
        "while again.exists() and not os.path.exists('/jit/added'): time.sleep(0.02)\n"
        "again.touch()\n"
    )
    slow = (
        "while not os.path.exists('/jit/second'): time.sleep(0.02)\n"
        "compile_kernel('slow', 'x')\n"
        "pathlib.Path('/jit/added').touch()\n"
    )
    codes = {"quick": quick, "slow": slow}
    tasks = [command(name, head + code + READY, families=["triton"]) for name, code in codes.items()]
    cli.manifest(*tasks, run={"parallel": 2})
    ended = cli.warm()
    assert [(task["state"], task["proof"]) for task in ended.document["tasks"]] == [("warmed", "verified")] * 2
    assert ended.err.count("▸ quick: second pass") == 2, "it was disturbed, and did it again"
    assert ended.err.count("▸ slow: second pass") == 1


def test_duplicate_tasks_compile_once(cli: Cli) -> None:
    other = "GEMM_NT_F8F8BF16 N=512, K=7168, num_groups=1"
    cli.manifest(
        {**shapes("model"), "shapes": [SHAPE, other]},
        {**shapes("model"), "shapes": [other, SHAPE]},
        run={"parallel": 2},
    )
    first, second = cli.warm().document["tasks"]
    assert (first["state"], second["state"], second["seconds"]) == ("warmed", "warm", None)
    assert second["reason"] == f"the same work as {first['label']}" and second["verified"]
    assert len(cli.markers()) == 1
    assert cli.run("check").status == 0


def test_task_longer_than_budget_is_not_started(cli: Cli) -> None:
    cli.manifest(command("long", READY), command("short", READY))
    cli.warm()
    for marker in cli.markers():
        known = json.loads(marker.read_text())
        known["coverage"]["sglang"] = "0.0.1"
        known["observed"]["seconds"] = 540.0 if known["label"] == "long" else 2.0
        old = marker.parent.parent / f"{known['label']}-0123456789ab"
        marker.parent.rename(old)
        (old / marker.name).write_text(json.dumps(known))
    ended = cli.run("warm", "--json", "--budget", "4m")
    assert ended.status == 14
    assert "2 tasks: 0 warm, 2 to do · about 9 min of a 4 min budget" in ended.err
    long, short = ended.document["tasks"]
    assert (long["state"], long["seconds"]) == ("cold", None)
    assert long["reason"] == "budget: needs about 9 min, the whole budget is 4 min: raise it"
    assert short["state"] == "warmed"
    assert "1 of 2 tasks still cold" in ended.document["error"]["message"]
    assert ended.document["expected"]["never_timed"] == []
    # Forced, what is warm stays so, and it is said that nothing was done for it.
    [made] = [marker for marker in cli.markers() if "0123456789ab" not in marker.parent.name]
    known = json.loads(made.read_text())
    known["observed"]["seconds"] = 540.0
    made.write_text(json.dumps(known))
    ended = cli.run("warm", "--json", "--force", "--budget", "4m")
    assert [task["state"] for task in ended.document["tasks"]] == ["cold", "warm"]
    assert {task["reason"] for task in ended.document["tasks"]} == {long["reason"]}


# --- what people see -------------------------------------------------------------------------------------------------


def test_github_groups_of_concurrent_tasks_do_not_interleave(cli: Cli) -> None:
    code = "import time\nfor number in range(20): print('line of', '{0}', flush=True); time.sleep(0.02)\n" + READY
    tasks = [command(name, code.format(name)) for name in ("one", "two")]
    cli.manifest(*tasks, command("bad", "x"), run={"parallel": 3})
    ended = cli.run("warm", environ={"GITHUB_ACTIONS": "true"})
    assert ended.status == 11
    groups = re.findall(r"(?ms)^::group::\[\d/3\] (\w+)$(.*?)^::endgroup::$", ended.out)
    assert sorted(name for name, _ in groups) == ["bad", "one", "two"]
    for name, text in groups:
        assert text.count("line of") == (20 if name != "bad" else 0)
        assert set(re.findall(r"line of (\w+)", text)) <= {name}
    assert re.search(r"(?m)^one: warmed in ", ended.out) and "::error title=bad failed::" in ended.out


def test_pipe_shows_heartbeat(cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(live, "EVERY", 0.3)
    cli.manifest(command("one", "import time; time.sleep(1.5)\n" + READY))
    assert cli.here("warm") == 0
    out = capfd.readouterr().out
    assert re.search(r"(?m)^  ▸ 0:0\d: 0 of 1 task done", out)
    assert re.search(r"(?m)^  ▸ one: command, .*0:0\d so far$", out)
    assert "\x1b" not in out


def test_terminal_shows_live_line_below_log(cli: Cli) -> None:
    cli.manifest(gated("one"), gated("two"), run={"parallel": 2})
    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:
                return
            if not data:
                return
            seen.extend(data)

    def shown() -> str:
        return seen.decode("utf-8", "replace")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    builder = cli.start("warm", environ={"TERM": "xterm-256color", "COLUMNS": "100"}, stdout=slave, stderr=slave)
    os.close(slave)
    wait_for(lambda: shown().count("at the gate") == 2, 30, "both logs")
    wait_for(lambda: re.search(r"one\S*\s+.*command", shown()) and "0 of 2 tasks done" in shown(), 10, "a live line")
    (cli.root / "go-one").touch()
    wait_for(lambda: "1 of 2 tasks done" in shown(), 10, "the next picture")
    (cli.root / "go-two").touch()
    ended = builder.end()
    reader.join(5)
    os.close(master)
    cli.left_nothing()
    assert ended.status == 0
    assert "\x1b[2K" in shown(), "lines were drawn over"
    assert "│ two: KERNELS READY" in shown()
    assert "so far" not in shown(), "no heartbeat beside it"
    last = shown().rpartition("\x1b[2K")[2]
    assert "tasks done" not in last and "2 warmed in" in last, "nothing of it stays"
    assert not shown().rpartition("\x1b[?25l")[2] or "\x1b[?25h" in shown().rpartition("\x1b[?25l")[2]
