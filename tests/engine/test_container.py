"""Every way out of a container, on a real engine: how it ended is told, its log is whole, and nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from builder import events
from builder.engine import container as life
from builder.engine import log_pump
from builder.engine.api import Mount
from builder.engine.client import Engine
from builder.engine.errors import MissingSourceError
from builder.engine.lease import LABEL_LEASE
from builder.engine.sweep import sweep
from builder.errors import EngineLostError, EngineRefusedError
from builder.host.deadlines import Deadline, poll
from tests.engine.workshop import PRELUDE, Disturbed, Proxy, Workshop, check, raising, when_ready
from tests.scripts import HANG, leave, on_term, out, pause

pytestmark = pytest.mark.engine

READY = out("ready\n")

#: A program that refuses SIGTERM, and has a grandchild in a session of its own that does so too.
STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    threading.Event().wait()
os.write(1, b"ready\\n")
threading.Event().wait()
"""


def test_container_success_is_exited_zero(workshop: Workshop) -> None:
    outcome = workshop.run(
        source="""
size = os.write(1, b"compiling\\n") + event("phase", phase="second pass")
size += event("verdict", state="warmed", reason="")
errors = os.write(2, b"done\\n")
event("end", stdout=size, stderr=errors)
"""
    )
    check(outcome, "exited", 0)
    assert outcome.verdict == events.Verdict(state="warmed")
    assert [type(event) for event in workshop.heard] == [events.Phase, events.Verdict, events.End]
    assert workshop.log() == {"out": b"compiling\n", "err": b"done\n"}
    assert sorted(outcome.tail) == ["compiling", "done"]
    assert outcome.log_path == workshop.log_path
    assert 0 < outcome.seconds < 30


def test_container_nonzero_status_is_reported(workshop: Workshop) -> None:
    outcome = workshop.run(out("sorry\n"), leave(20))
    check(outcome, "exited", 20)
    assert outcome.verdict is None
    assert outcome.tail == ["sorry"]


@pytest.mark.parametrize(
    ("limits", "ended"),
    [({"task": 0.8}, "timeout"), ({"silence": 0.8}, "silence"), ({"task": 9, "silence": 0.7}, "silence")],
    ids=["task", "silence", "the-first-of-both"],
)
def test_container_past_deadline_is_stopped(workshop: Workshop, limits: dict[str, float], ended: str) -> None:
    outcome = workshop.run(READY, HANG, deadlines=limits)
    check(outcome, ended, 143)
    assert workshop.log()["out"] == b"ready\n"


def test_container_with_output_is_not_silent(workshop: Workshop) -> None:
    steps = [step for _ in range(8) for step in (out("."), pause(0.25))]
    check(workshop.run(*steps, leave(0), deadlines={"silence": 1.2}), "exited", 0)


def test_container_without_output_is_stopped_after_its_start_deadline(workshop: Workshop) -> None:
    outcome = workshop.run(HANG, deadlines={"start": 0.8})
    assert (outcome.ended, outcome.exit_code) == ("start", 143)


def test_container_past_run_budget_is_stopped(workshop: Workshop) -> None:
    check(workshop.run(READY, HANG, budget=Deadline(0.8)), "budget", 143)


def test_container_output_after_sigterm_is_logged(workshop: Workshop) -> None:
    outcome = workshop.run(
        deadlines={"task": 1},
        source="""
def stop(*_):
    size = os.write(1, b"ready\\nstopping\\n" [6:]) + event("verdict", state="stopped")
    event("end", stdout=size + 6, stderr=0)
    os._exit(143)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"ready\\n")
threading.Event().wait()
""",
    )
    check(outcome, "timeout", 143)
    assert outcome.verdict == events.Verdict(state="stopped")
    assert workshop.log()["out"] == b"ready\nstopping\n"


@pytest.mark.alone
def test_cancel_ends_stubborn_processes_within_five_seconds(workshop: Workshop) -> None:
    asked: list[float] = []

    def cancel() -> None:
        asked.append(time.monotonic())
        workshop.cancel.set(signal.SIGTERM)

    when_ready(workshop, cancel)
    outcome = workshop.run(source=STUBBORN, deadlines={"grace": 30})
    assert time.monotonic() - asked[0] < 5
    check(outcome, "cancelled", 137)


@pytest.mark.alone
def test_second_signal_skips_grace(workshop: Workshop) -> None:
    asked: list[float] = []

    def cancel() -> None:
        workshop.cancel.set(signal.SIGINT)
        poll(lambda: None, Deadline(0.2), every=0.1)
        asked.append(time.monotonic())
        workshop.cancel.set(signal.SIGINT)

    when_ready(workshop, cancel)
    outcome = workshop.run(source=STUBBORN)
    assert time.monotonic() - asked[0] < 1.5
    check(outcome, "cancelled", 137)


@pytest.mark.alone
def test_signal_during_stop_shortens_grace(workshop: Workshop) -> None:
    asked: list[float] = []

    def stop(call: Callable[[], object], _arguments: tuple[object, ...]) -> object:
        asked.append(time.monotonic())
        threading.Timer(0.3, workshop.cancel.set, [signal.SIGTERM]).start()
        return call()

    outcome = workshop.run(
        source=STUBBORN, deadlines={"task": 1.0, "grace": 30}, engine=Disturbed(workshop.engine, stop=stop)
    )
    assert time.monotonic() - asked[0] < 5
    check(outcome, "timeout", 137)


def test_cancel_before_start_creates_nothing(workshop: Workshop) -> None:
    workshop.cancel.set(signal.SIGTERM)
    outcome = workshop.run(HANG)
    assert (outcome.ended, outcome.exit_code) == ("cancelled", 143)


def test_start_refused_leaves_no_container(workshop: Workshop) -> None:
    with pytest.raises(EngineRefusedError, match="no-such-network"):
        workshop.run(leave(0), network="no-such-network")
    assert workshop.left() == []


def test_create_refused_leaves_no_container(workshop: Workshop) -> None:
    with pytest.raises(EngineRefusedError, match="no-such-image:1"):
        workshop.run(leave(0), image="no-such-image:1")
    missing = workshop.directory / "missing"
    with pytest.raises(EngineRefusedError, match=f"has no {missing}: create it there"):
        workshop.run(leave(0), mounts=(Mount(str(missing), "/x"),))


@pytest.mark.parametrize("after", [False, True], ids=["before", "answer-lost"])
@pytest.mark.parametrize("operation", ["create", "attach_stdin", "attach_output", "start"])
def test_engine_lost_at_any_step_leaves_nothing(workshop: Workshop, operation: str, after: bool) -> None:
    lost = EngineLostError("the answer never came")
    with pytest.raises(EngineLostError, match="the answer never came") as raised:
        workshop.run(HANG, engine=Disturbed(workshop.engine, **{operation: raising(lost, after=after)}))
    assert raised.value is lost
    assert workshop.left() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["KeyboardInterrupt", "SystemExit"])
@pytest.mark.parametrize("operation", ["create", "start", "state"])
def test_exception_at_any_step_leaves_nothing(workshop: Workshop, operation: str, error: BaseException) -> None:
    times = iter([raising(error, after=True)])

    def disturb(call: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        now = next(times, None) if threading.current_thread().name != "log-pump" else None
        return now(call, arguments) if now else call()

    with pytest.raises(type(error)):
        workshop.run(READY, HANG, engine=Disturbed(workshop.engine, **{operation: disturb}))
    assert workshop.left() == []


def test_teardown_failure_is_reported_and_hides_no_error(workshop: Workshop) -> None:
    broken = Disturbed(workshop.engine, remove=raising(EngineLostError("not now"), after=False))
    outcome = workshop.run(leave(20), engine=broken)
    assert (outcome.ended, outcome.exit_code) == ("exited", 20)
    assert outcome.problems == ["removing the container failed: not now"]
    assert workshop.lease.keep
    with pytest.raises(EngineRefusedError, match="no-such-network") as raised:
        workshop.run(leave(0), network="no-such-network", engine=broken)
    assert "removing the container failed: not now" in raised.value.notes
    for container in workshop.ids():
        workshop.engine.remove(container, force=True)


def test_container_killed_by_other_is_reported(workshop: Workshop) -> None:
    when_ready(workshop, lambda: workshop.engine.stop(workshop.ids()[0], 0))
    outcome = workshop.run(READY, on_term(None), HANG)
    assert (outcome.ended, outcome.oom) == ("exited", False)
    assert outcome.exit_code in (137, 143)
    assert "from outside: not by this builder" in outcome.problems[0]
    assert outcome.log_complete


def test_container_removed_by_other_is_reported(workshop: Workshop) -> None:
    when_ready(workshop, lambda: workshop.engine.remove(workshop.ids()[0], force=True))
    outcome = workshop.run(READY, HANG)
    assert (outcome.ended, outcome.verdict) == ("exited", None)
    assert any("was removed by another client" in problem or "from outside" in problem for problem in outcome.problems)
    assert workshop.log()["out"] == b"ready\n"


def test_out_of_memory(workshop: Workshop) -> None:
    outcome = workshop.run(
        source='os.write(1, b"ready\\n")\ndata = []\nwhile True:\n    data.append(bytearray(b"x" * (4 << 20)))',
        memory=64 << 20,
    )
    if not outcome.oom and outcome.exit_code != 137:
        pytest.skip("this engine cannot limit memory")
    assert (outcome.ended, outcome.exit_code, outcome.oom) == ("exited", 137, True)
    assert workshop.log()["out"] == b"ready\n"


BUILDER = """
import json, signal, sys
from pathlib import Path
from builder.host.cancel import Cancel
from builder.engine.container import Deadlines, Sinks, run_container
from builder.engine.api import ContainerSpec
from builder.engine.client import Engine
from builder.engine.lease import Lease
from builder.job import Job
given = json.loads(sys.argv[1])
def said(stream, line):
    print(line, flush=True)
with Lease(Path(given["directory"]), run_id="killed", engine=Engine().connect().identity) as lease:
    run_container(
        Engine().connect(),
        ContainerSpec(image=given["image"], name=given["name"], command=["python3", "-c", given["source"]],
                      labels=given["labels"], network="none"),
        job=Job(mode="run", nonce=lease.nonce, mount="/jit"), lease=lease, cancel=Cancel(),
        deadlines=Deadlines(60, 60, 60, 2), sinks=Sinks(display=said),
    )
"""

#: Ends when it gets the lease; proves first that somebody holds it.
WAITING = """
import fcntl
file = os.open(job["lease"], os.O_RDONLY)
assert os.read(file, 99).strip().decode() == job["nonce"]
try:
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
except BlockingIOError:
    os.write(1, b"ready\\n")
    fcntl.flock(file, fcntl.LOCK_SH)
    os._exit(70)
"""


@pytest.mark.alone
def test_builder_killed_container_ends_and_sweep_removes_it(workshop: Workshop) -> None:
    spec = workshop.spec(source=WAITING)
    state = workshop.directory / "state"
    given = {
        "directory": str(state),
        "image": spec.image,
        "name": spec.name,
        "source": PRELUDE + WAITING,
        "labels": dict(spec.labels),
    }
    with subprocess.Popen([sys.executable, "-c", BUILDER, json.dumps(given)], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"ready\n"
        builder.kill()
        killed = time.monotonic()
        builder.wait()
    (container,) = workshop.ids()
    assert poll(lambda: workshop.engine.state(container).finished, Deadline(5), every=0.01), "it outlived its builder"
    assert time.monotonic() - killed < 5
    assert workshop.engine.state(container).exit_code == 70
    swept = sweep(workshop.engine, state)
    assert [(done.name, done.removed) for done in swept if done.name == spec.name] == [(spec.name, True)]
    assert workshop.left() == []
    assert [path for path in state.rglob("*") if path.is_file()] == []


def test_lease_without_common_kernel_is_stdin(workshop: Workshop) -> None:
    def elsewhere(call: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        (spec,) = arguments
        for mount in spec.mounts:
            if mount.source == str(workshop.lease.path):
                raise MissingSourceError("cannot create it", mount.source)
        return call()

    source = """
assert job["lease"] is None
os.write(1, b"ready\\n")
os.read(0, 1)
os._exit(70)
"""
    watched: list[str] = []

    def watch() -> None:
        watched.append(workshop.engine.state(workshop.ids()[0]).status)
        workshop.cancel.set(signal.SIGTERM)

    when_ready(workshop, watch)
    outcome = workshop.run(source=source, engine=Disturbed(workshop.engine, create=elsewhere))
    assert watched == ["running"], "stdin ended while the builder lived"
    assert outcome.ended == "cancelled"


def test_engine_gone_is_engine_lost(workshop: Workshop, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "GIVE_UP", 1.0)
    monkeypatch.setattr(log_pump, "GIVE_UP", 1.0)
    when_ready(workshop, proxy.close)
    with contextlib.closing(Engine(proxy.url).connect()) as engine:
        outcome = workshop.run(READY, HANG, engine=engine)
    assert (outcome.ended, outcome.exit_code) == ("lost", None)
    assert "the engine gave no answer for 1 s" in outcome.problems[0]
    assert any(problem.startswith("removing the container failed") for problem in outcome.problems)
    assert not outcome.log_complete
    assert any(problem.startswith("the log ends where the engine was lost") for problem in outcome.problems)
    assert outcome.tail == ["ready"]
    assert workshop.lease.keep
    for container in workshop.ids():  # nobody but the engine could have
        workshop.engine.remove(container, force=True)


def test_container_environment_has_job_and_open_stdin(workshop: Workshop) -> None:
    outcome = workshop.run(
        source="""
assert job["lease"] and job["nonce"], job
assert os.environ["MINE"] == "a=b"
import stat
assert stat.S_ISFIFO(os.fstat(0).st_mode) or stat.S_ISSOCK(os.fstat(0).st_mode)
try:
    open(job["lease"], "a")
except OSError:
    os._exit(0)
""",
        env={"MINE": "a=b"},
    )
    check(outcome, "exited", 0)


def test_container_spec_is_as_documented(workshop: Workshop) -> None:
    inspected: list[dict[str, Any]] = []

    def look() -> None:
        inspected.append(workshop.engine._get("/containers/{0}/json", workshop.ids()[0]).json())
        workshop.cancel.set(15)

    when_ready(workshop, look)
    workshop.run(READY, HANG, stop_timeout=7)
    (data,) = inspected
    host, config = data["HostConfig"], data["Config"]
    assert (host["AutoRemove"], host["Privileged"], host["Init"], host["IpcMode"]) == (False, False, True, "private")
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "1000g", "max-file": "1"}}
    assert {limit["Name"]: limit["Soft"] for limit in host["Ulimits"]} == {"memlock": -1, "stack": 67108864}
    assert (config["StdinOnce"], config["OpenStdin"], config["StopTimeout"]) == (True, True, 7)
    assert host["ShmSize"] == 64 << 20
    assert not host["DeviceRequests"]
    label = json.loads(config["Labels"][LABEL_LEASE])
    assert label == {
        "path": str(workshop.lease.path),
        "dev": workshop.lease.path.stat().st_dev,
        "ino": workshop.lease.path.stat().st_ino,
    }
