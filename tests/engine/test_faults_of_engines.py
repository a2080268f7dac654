"""Faults of the engine and of the connection to it while the real program runs: killed, restarted, hanging, cut."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.host.deadlines import Deadline, poll
from tests.engine.cli import PROGRAM, Cli, command, shapes, wait_for
from tests.engine.faults import Aftermath, OwnEngine, are_warm, changed, numbers, time_passes, told
from tests.engine.workshop import Proxy

pytestmark = pytest.mark.engine

#: Numbered lines, until there is a file ``go`` in the cache root.
COUNTING = """
import os, time
n = 0
while not os.path.exists('/jit/go'):
    print('line', n, flush=True)
    n += 1
    time.sleep(0.01)
print('line', n)
print('KERNELS READY')
"""

#: Less patience with an engine that does not answer than the program has.
HURRIED = "container.GIVE_UP = logs.GIVE_UP = 3.0"

LIVE = "--live-restore"


@pytest.fixture
def own(own_engine: OwnEngine, tmp_path: Path, tiny_image: str) -> Iterator[Cli]:
    """A user of an engine that may be killed. The engine runs afterwards, whatever became of it."""
    cli = Cli(tmp_path, own_engine.host, tiny_image, engine=own_engine.host)
    cli.manifest(command("counts", COUNTING))
    yield cli
    own_engine.up()
    cli.close()


def restart(engine: OwnEngine, *options: str, signal: str = "TERM") -> None:
    engine.kill(signal)
    engine.up(*options)


def go(cli: Cli) -> None:
    (cli.root / "go").touch()


def further(cli: Cli, label: str = "counts", lines: int = 20) -> None:
    """Until the log has so many more lines: the container is alive, and the builder listens."""
    before = len(numbers(cli.log(label)))
    wait_for(lambda: len(numbers(cli.log(label))) >= before + lines, 30, "the next lines")


def keep(cli: Cli, engine: OwnEngine) -> Path:
    """The engine's stored log of the container that runs."""
    kept = cli.place / "stored.log"
    with cli.engine() as there:
        (container,) = cli.containers(there)
    engine.keep_log(container, kept)
    return kept


def is_whole(cli: Cli, label: str = "counts") -> None:
    """Every line from the first one on, once, in order."""
    found = numbers(cli.log(label))
    assert found == list(range(len(found)))
    assert len(found) > 10


def has_all_that_was_stored(cli: Cli, kept: Path, label: str = "counts") -> None:
    """Every line that the engine stored, once, in order. An engine that ends under a running container can lose what it
    has taken from the container and neither stored nor handed on: what is missing here is missing there.
    """
    found, there = numbers(cli.log(label)), stored(kept)
    assert found == sorted(set(found))
    assert len(found) > 10
    assert sorted(there - set(found)) == [], "the engine has them, and the builder's log does not"


def stored(kept: Path) -> set[int]:
    """The numbered lines that the engine's own file has, however damaged the file is."""
    return {int(number) for number in re.findall(rb'"log":"line (\d+)\\n"', kept.read_bytes())}


# --- the engine itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signal_name",
    [
        pytest.param(
            "KILL",
            id="killed",
            marks=pytest.mark.fault(
                "engine killed and started again during a task, live-restore on",
                how="SIGKILL to dockerd, and a new one",
                holds="0: the container goes on, and so does its log, with every line that the engine stored",
            ),
        ),
        pytest.param(
            "TERM",
            id="in-order",
            marks=pytest.mark.fault(
                "engine restarted in order during a task, live-restore on",
                how="SIGTERM to dockerd, and a new one",
                holds="0: the container goes on, and so does its log, with every line that the engine stored",
            ),
        ),
    ],
)
def test_engine_restarted_with_live_restore_run_goes_on(
    own: Cli, own_engine: OwnEngine, aftermath: Aftermath, signal_name: str
) -> None:
    restart(own_engine, LIVE)
    builder = own.start("warm", "--json")
    builder.says("line 20")
    kept = keep(own, own_engine)
    aftermath.begins()
    restart(own_engine, LIVE, signal=signal_name)
    further(own)
    sweeper = own.start("sweep", "--lock-timeout", "0s").end()
    assert (sweeper.status, "removed" in sweeper.said) == (15, False), "its builder lives"
    go(own)
    aftermath.over(own, builder, 0, warm=["counts"])
    has_all_that_was_stored(own, kept)


@pytest.mark.parametrize(
    ("signal_name", "reason"),
    [
        pytest.param(
            "KILL",
            "SIGTERM",
            id="killed",
            marks=pytest.mark.fault(
                "engine killed and started again during a task, live-restore off",
                how="SIGKILL to dockerd, and a new one, which ends what the old one ran",
                holds="11: the task failed; what the engine had of its log is there",
            ),
        ),
        pytest.param(
            "TERM",
            "stopped by SIGTERM",
            id="in-order",
            marks=pytest.mark.fault(
                "engine restarted in order during a task, live-restore off",
                how="SIGTERM to dockerd, which ends what it runs, and a new one",
                holds="11: the task failed, stopped by SIGTERM; its log is whole",
            ),
        ),
    ],
)
def test_engine_restarted_without_live_restore_is_task_failure(
    own: Cli, own_engine: OwnEngine, aftermath: Aftermath, signal_name: str, reason: str
) -> None:
    restart(own_engine)
    builder = own.start("warm", "--json")
    builder.says("line 20")
    aftermath.begins()
    own_engine.kill(signal_name)
    assert signal_name == "TERM" or under_lease(own), "nobody is there to end it"
    own_engine.up()
    aftermath.over(own, builder, 11, reason)
    is_whole(own)


@pytest.mark.fault(
    "engine stopped for good during a task",
    how="SIGKILL to dockerd; a patience of 3 s instead of 60",
    holds="16; the container ends by its lease, and is removed by the next builder once there is an engine again",
)
def test_engine_stopped_for_good_is_engine_lost(own: Cli, own_engine: OwnEngine, aftermath: Aftermath) -> None:
    builder = own.start("warm", "--json", program=changed(HURRIED))
    builder.says("line 20")
    aftermath.begins()
    own_engine.kill()
    ended = builder.end()
    aftermath.clean()
    assert ended.status == 16
    assert "the engine was lost while counts ran" in told(ended)
    is_whole(own)
    own_engine.up(LIVE)  # which lets alone what still runs
    with own.engine() as engine:
        (container,) = own.containers(engine)
        assert poll(lambda: engine.state(container).finished, Deadline(5), every=0.05), "it outlived its builder"
        assert engine.state(container).exit_code == 70
    assert own.run("sweep").status == 0
    are_warm(own, [])


@pytest.mark.fault(
    "builder killed while there is no engine",
    how="SIGKILL to dockerd with live-restore on, then to the builder",
    holds="the container ends by its lease within 5 s all the same, and is removed by the next builder once there is "
    "an engine again",
)
def test_builder_killed_without_engine_next_run_sweeps(own: Cli, own_engine: OwnEngine, aftermath: Aftermath) -> None:
    restart(own_engine, LIVE)
    builder = own.start("warm")
    builder.says("line 20")
    own_engine.kill()
    assert under_lease(own)
    aftermath.begins()
    builder.send(signal.SIGKILL)
    builder.end(5)
    wait_for(lambda: not under_lease(own), 5, "the end by the lease")
    aftermath.clean()
    own_engine.up(LIVE)
    with own.engine() as engine:
        (container,) = own.containers(engine)
        wait_for(lambda: engine.state(container).finished, 10, "the engine's notice of it")
        assert engine.state(container).exit_code == 70
    assert own.run("sweep").status == 0
    are_warm(own, [])


def under_lease(cli: Cli) -> list[str]:
    """Processes of containers that have a lease file of this user, whether or not there is an engine."""
    found = []
    for place in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            found += [place.parent.name] if f"{cli.place}/run/" in place.read_text() else []
    return found


@pytest.mark.fault(
    "engine killed and started again, then the builder killed, where the lease is an attachment",
    how="SIGKILL to dockerd with live-restore on, and a new one, and SIGKILL to the builder, whose lease file is on a "
    "file system that the engine does not see",
    holds="a sweep that cannot see the lease leaves the container alone; it ends by its maximum lifetime, and is "
    "removed by the next sweep after that",
)
def test_attachment_of_stdin_ends_with_the_engine(own: Cli, own_engine: OwnEngine, aftermath: Aftermath) -> None:
    own.manifest(command("counts", COUNTING, timeout="10s"), run={"start": "5s"})
    restart(own_engine, LIVE)
    hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(own.place / "run"))
    builder = own.start("warm", program=(*hidden, *PROGRAM))
    builder.says("line 20")
    restart(own_engine, LIVE, signal="KILL")
    further(own)
    go(own)
    assert builder.end().status == 0, "a builder that lives ends its container as ever"
    own.left_nothing()

    (own.root / "go").unlink()
    builder = own.start("warm", "--force", program=(*hidden, *PROGRAM))
    builder.says("line 20")
    restart(own_engine, LIVE, signal="KILL")
    aftermath.begins()
    builder.send(signal.SIGKILL)
    builder.end(5)
    with own.engine() as engine:
        (container,) = own.containers(engine)
        swept = own.start("sweep").end()
        assert "its lease file cannot be seen from here; it ends by its own lifetime" in swept.said
        assert engine.state(container).status == "running"
        wait_for(lambda: engine.state(container).finished, 30, "the end of its lifetime")
        assert engine.state(container).exit_code == 71
    assert own.run("sweep").status == 0
    aftermath.clean()
    are_warm(own, ["counts"])  # by the first one


# --- the connection to it --------------------------------------------------------------------------------------------


@pytest.fixture
def far(cli: Cli, proxy: Proxy) -> Cli:
    """A user who reaches the engine through a socket that can be disturbed."""
    cli.manifest(command("counts", COUNTING))
    cli.host = proxy.url
    return cli


@pytest.mark.fault(
    "socket hangs: it accepts and never answers",
    how="a socket of the test's own; a patience of 3 s instead of 60",
    holds="16: the engine gave no answer in time",
)
def test_engine_socket_hanging_at_start_is_reported_in_time(far: Cli, proxy: Proxy, aftermath: Aftermath) -> None:
    proxy.hang = True
    aftermath.begins()
    builder = far.start("warm", "--json", program=changed("invocation.Engine = lambda url, _: engine.Engine(url, 3.0)"))
    ended = builder.end()
    far.left_nothing()
    aftermath.clean()
    assert ended.status == 16
    assert "it accepted the request and gave no answer in time" in told(ended)


@pytest.mark.fault(
    "socket hangs during a task",
    how="a socket before the engine's stops passing anything on; a patience of 3 s instead of 60",
    holds="16; the container ends by its lease, and is removed by the next builder",
)
@pytest.mark.alone
def test_engine_socket_hanging_during_task_is_engine_lost(far: Cli, proxy: Proxy, aftermath: Aftermath) -> None:
    builder = far.start(
        "warm",
        "--json",
        program=changed(
            f"{HURRIED}; connection.QUICK = 3.0",
            "invocation.Engine = lambda url, _: engine.Engine(url, 3.0)",
        ),
    )
    builder.says("line 20")
    aftermath.begins()
    proxy.hang = True
    ended = builder.end()
    ends_by_its_lease(far, aftermath)
    assert ended.status == 16
    assert "the engine gave no answer for 3 s" in told(ended)
    is_whole(far)
    proxy.hang = False
    assert far.run("sweep").status == 0
    are_warm(far, [])


@pytest.mark.fault(
    "signal to the builder while the socket hangs",
    how="a socket before the engine's stops passing anything on; SIGTERM",
    holds="143, within 5 s; the container ends by its lease, and is removed by the next builder",
)
@pytest.mark.alone
def test_signal_while_engine_socket_hangs_ends_run_in_time(far: Cli, proxy: Proxy, aftermath: Aftermath) -> None:
    builder = far.start("warm", "--json")
    builder.says("line 20")
    proxy.hang = True
    time_passes(1.2)  # it is waiting for an answer by now
    aftermath.begins()
    builder.send(signal.SIGTERM)
    ended = builder.end(5)
    ends_by_its_lease(far, aftermath)
    assert ended.status == 143
    assert "interrupted by SIGTERM" in told(ended)
    assert "does not answer; warm-cache-" in told(ended)
    is_whole(far)
    proxy.hang = False
    assert far.run("sweep").status == 0
    are_warm(far, [])


@dataclass(frozen=True)
class Hang:
    """A request that is held back until the builder has ended. alone: everything else is answered. left: the builder
    has to leave a container. late: what becomes of it once the request has been passed on.
    """

    request: bytes
    alone: bool
    left: bool
    late: str = ""


HANGS = {
    "create": Hang(b"-run-counts", alone=True, left=True, late="created"),
    "create-to-read": Hang(b"?name=warm-cache-read-", alone=True, left=True, late="created"),
    "start": Hang(b"/start HTTP", alone=False, left=True, late="exited"),
    "stop": Hang(b"/stop?", alone=True, left=False),
    "removal": Hang(b"DELETE /", alone=True, left=True),
}


@pytest.mark.fault(
    "signal to the builder while the engine hangs at one request",
    how="a socket before the engine's holds back a create, a start (and all that comes after it), a stop or a removal, "
    "and passes it on when the builder has ended; SIGINT",
    holds="130, within 5 s; what the engine creates or starts so late has a lease that is over: it ends by itself, and "
    "the next builder removes it",
)
@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
@pytest.mark.alone
def test_signal_while_one_request_hangs_ends_run_in_time(
    far: Cli, proxy: Proxy, aftermath: Aftermath, hang: Hang
) -> None:
    held, over, awaited = threading.Event(), threading.Event(), threading.Event()
    at_end = hang.request.startswith((b"/stop", b"DELETE"))  # of the task's container, not of those before it

    def hold(request: bytes) -> None:
        if hang.request in request and awaited.is_set() and not over.is_set():
            held.set()
            proxy.hang = not hang.alone
            over.wait(30)

    proxy.before = hold
    if not at_end:
        awaited.set()
    builder = far.start("warm", "--json")
    if at_end:
        builder.says("line 20")
        awaited.set()
    else:
        wait_for(held.is_set, 30, "the request")
    aftermath.begins()
    builder.send(signal.SIGINT)
    ended = builder.end(5)
    aftermath.clean()
    assert held.is_set()
    proxy.hang = False
    over.set()
    assert ended.status == 130
    assert ("next run, or a sweep, removes" in told(ended)) == hang.left, told(ended)
    with far.engine() as engine:
        if hang.late:
            wait_for(lambda: far.containers(engine), 10, "what the engine does so late")
            (container,) = far.containers(engine)
            wait_for(lambda: engine.state(container).status == hang.late, 10, "its end")
    assert far.run("sweep").status == 0
    are_warm(far, [])


def ends_by_its_lease(cli: Cli, aftermath: Aftermath) -> None:
    """Its one container, whose builder has ended."""
    with cli.engine() as engine:
        (container,) = cli.containers(engine)
        assert poll(lambda: engine.state(container).finished, Deadline(5), every=0.05), "it outlived its builder"
        aftermath.clean()
        assert engine.state(container).exit_code == 70


@pytest.mark.fault(
    "time-out of the client while a container is silent",
    how="a time-out of 1 s instead of 60, a task that is silent for 3 s",
    holds="0: silence is no failure",
)
def test_silence_longer_than_client_timeout_is_no_failure(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(command("silent", "import time; time.sleep(3); print('line 0'); print('KERNELS READY')"))
    builder = cli.start("warm", "--json", program=changed("invocation.Engine = lambda url, _: engine.Engine(url, 1.0)"))
    builder.says("▸ command")
    aftermath.begins()
    aftermath.over(cli, builder, 0, warm=["silent"])
    assert numbers(cli.log("silent")) == [0]


@pytest.mark.fault(
    "log stream cut in the middle of a frame",
    how="a socket before the engine's ends the attachment after 1003 bytes",
    holds="0: the log goes on from the engine's copy, each line once",
)
def test_log_stream_cut_within_frame_loses_nothing(far: Cli, proxy: Proxy, aftermath: Aftermath) -> None:
    builder = far.start("warm", "--json")
    builder.says("1 to do")  # the probe is over
    proxy.cut_after = 1003
    aftermath.begins()
    builder.says("line 100")
    go(far)
    aftermath.over(far, builder, 0, warm=["counts"])
    assert proxy.cuts == 1
    is_whole(far)


# --- the image -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "warm-up image removed before a container is created from it",
    how="docker rmi between the engine's answer and the next request",
    holds="16: the engine refused, and the image is named",
)
def test_image_removed_before_create_is_named(far: Cli, proxy: Proxy, aftermath: Aftermath) -> None:
    far.manifest(shapes(), image={"setup": [f"true {far.place}"]})
    assert far.run("warm").status == 0
    far.manifest(shapes(), shapes("other", m_values=[64]), image={"setup": [f"true {far.place}"]})

    def remove(request: bytes) -> None:
        if b"/containers/create" in request and b"-run-" in request:
            aftermath.begins()
            remove_images(far)

    proxy.before = remove
    aftermath.over(far, far.start("warm", "--json"), 16, "No such image: sha256:", warm=["shapes"])


@pytest.mark.fault(
    "image removed while a container runs from it",
    how="docker rmi --force of the warm-up image's tag",
    holds="0: the engine keeps what runs",
)
def test_image_removed_while_container_runs_changes_nothing(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(command("counts", COUNTING), image={"setup": [f"true {cli.place}"]})
    builder = cli.start("warm", "--json")
    builder.says("line 20")
    aftermath.begins()
    remove_images(cli)
    go(cli)
    aftermath.over(cli, builder, 0, warm=["counts"])
    is_whole(cli)


def remove_images(cli: Cli) -> None:
    """The warm-up images that were built for this user alone."""
    with cli.engine() as engine:
        for image in engine._api.images():
            history = engine._api.history(image["Id"])
            if any(str(cli.place) in layer["CreatedBy"] for layer in history):
                for tag in image["RepoTags"] or ():
                    if tag != "<none>:<none>":  # what a build on the same engine left behind has no name to remove
                        engine._api.remove_image(tag, force=True)


def test_sweep_of_another_engine_keeps_and_names_the_lease(own: Cli) -> None:
    """Two engines of one user, and of one id: both began with the /etc/docker/key.json of this machine."""
    builder = own.start("warm")
    builder.says("line 5")
    builder.send(signal.SIGKILL)
    builder.process.wait()
    other = own.start("sweep", environ={"DOCKER_HOST": os.environ["DOCKER_HOST"]}).end()
    assert (other.status, "1 lease of dead builders kept for other engines" in other.out) == (0, True), other.said
    mine = own.run("sweep")
    assert (mine.status, "its builder is gone" in mine.out) == (0, True), mine.said
    assert "kept for other engines" not in mine.out
