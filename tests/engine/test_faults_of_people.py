"""What people and other programs do to a run: kill, rename and remove its container, close its terminal, look away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.cli import GATE, PROGRAM, READY, ROOT, Cli, Running, command, shapes, wait_for
from tests.engine.door import Door
from tests.engine.faults import Aftermath, are_warm, numbers, time_passes, told

pytestmark = pytest.mark.engine

#: One line, then a wait for a file ``go`` in the cache root, and one more line.
WAITING = "print('line 0', flush=True)\n" + GATE + "print('line 1')\n" + READY

#: The same, from the very second on.
SLEEPING = "import time\nprint('line 0', flush=True)\ntime.sleep(3600)\n"


def container(cli: Cli) -> str:
    """The one that runs."""
    with cli.engine() as engine:
        (found,) = cli.containers(engine)
        return found


def ask(cli: Cli, path: str, **params: object) -> None:
    """Something that somebody else asks of the engine."""
    with cli.engine() as engine:
        engine._request("POST", path, container(cli), params=params)


# --- its container ---------------------------------------------------------------------------------------------------


def kill(cli: Cli, _builder: Running) -> None:
    ask(cli, "/containers/{0}/kill")


def remove(cli: Cli, _builder: Running) -> None:
    with cli.engine() as engine:
        engine.remove(container(cli), force=True)


def rename(cli: Cli, _builder: Running) -> None:
    ask(cli, "/containers/{0}/rename", name=f"warm-cache-test-{os.urandom(6).hex()}")


def pause(cli: Cli, builder: Running) -> None:
    ask(cli, "/containers/{0}/pause")
    (cli.root / "go").touch()
    time_passes(2)
    assert builder.process.poll() is None
    ask(cli, "/containers/{0}/unpause")


@pytest.mark.parametrize(
    ("end", "reasons"),
    [
        pytest.param(
            kill,
            [
                r"the container was ended by SIGKILL \(status 137\) and gave no verdict",
                "from outside: not by this builder, and not for memory",
            ],
            id="killed",
            marks=pytest.mark.fault(
                "container killed by another client",
                how="docker kill",
                holds="11: ended by SIGKILL, from outside",
            ),
        ),
        pytest.param(
            remove,
            ["was removed by another client|was ended by SIGKILL"],
            id="removed",
            marks=pytest.mark.fault(
                "container removed by another client",
                how="docker rm --force",
                holds="11: removed by another client",
            ),
        ),
    ],
)
def test_container_ended_by_another_client_is_task_failure(
    cli: Cli, aftermath: Aftermath, end: Callable[[Cli, Running], None], reasons: list[str]
) -> None:
    cli.manifest(command("waits", WAITING))
    builder = cli.start("warm", "--json")
    builder.says("line 0")
    aftermath.begins()
    end(cli, builder)
    ended = aftermath.over(cli, builder, 11)
    assert all(re.search(reason, told(ended)) for reason in reasons), told(ended)
    assert numbers(cli.log("waits")) == [0]


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(
            rename,
            id="renamed",
            marks=pytest.mark.fault(
                "container renamed by another client", how="docker rename", holds="0: it is known by its id"
            ),
        ),
        pytest.param(
            pause,
            id="paused",
            marks=pytest.mark.fault(
                "container paused and resumed",
                how="docker pause, 2 s, docker unpause",
                holds="0: nothing is lost",
            ),
        ),
    ],
)
def test_container_disturbed_by_another_client_finishes_its_task(
    cli: Cli, aftermath: Aftermath, disturb: Callable[[Cli, Running], None]
) -> None:
    cli.manifest(command("waits", WAITING))
    builder = cli.start("warm", "--json")
    builder.says("line 0")
    aftermath.begins()
    disturb(cli, builder)
    (cli.root / "go").touch()
    aftermath.over(cli, builder, 0, warm=["waits"])
    assert numbers(cli.log("waits")) == [0, 1]


# --- its reader ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("stdout closed (`| head`)", how="a pipe whose reader goes away", holds="0: the run goes on")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_reader_closing_stdout_run_goes_on(cli: Cli, aftermath: Aftermath, options: tuple[str, ...]) -> None:
    cli.manifest(shapes())
    reader, writer = os.pipe()
    builder = cli.start("warm", *options, stdout=writer)
    os.close(writer)
    if not options:
        assert os.read(reader, 1)
    os.close(reader)
    aftermath.begins()
    ended = builder.end()
    cli.left_nothing()
    aftermath.clean()
    assert ended.status == 0
    assert "BrokenPipe" not in ended.said
    are_warm(cli, ["shapes"])


@pytest.mark.fault(
    "stdout's disk full",
    how="/dev/full as stdout of --json",
    holds="12: what could not be written, and why; the cache is warm",
)
def test_stdout_on_full_disk_is_no_success(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(shapes())
    with Path("/dev/full").open("wb", buffering=0) as full:
        builder = cli.start("warm", "--json", stdout=full.fileno())
    aftermath.begins()
    ended = builder.end()
    cli.left_nothing()
    aftermath.clean()
    assert ended.status == 12
    assert "error: the JSON document could not be written: No space left on device" in ended.said
    are_warm(cli, ["shapes"])


# --- its terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """A terminal with a builder in its foreground."""

    def __init__(self, cli: Cli) -> None:
        self._master, slave = os.openpty()
        # setsid --ctty: a session of its own, whose terminal this is.
        self.builder = cli.start(
            "warm", program=("setsid", "--ctty", "--wait", *PROGRAM), stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self._text = b""

    def shows(self, text: str) -> None:
        """Reads until this was written on it."""
        while text.encode() not in self._text:
            self._text += os.read(self._master, 65536)

    def types(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def reads_on(self) -> None:
        """Reads until nobody has it any more."""
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self._text += data

    def close(self) -> None:
        os.close(self._master)


@pytest.mark.fault("Ctrl-Z, then Ctrl-C", how="keys on a terminal", holds="130: Ctrl-Z is refused")
@pytest.mark.alone
def test_ctrl_z_is_refused_while_containers_run(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(command("sleeps", SLEEPING))
    terminal = Terminal(cli)
    terminal.shows("line 0")
    aftermath.begins()
    terminal.types(b"\x1a")
    terminal.shows("^Z")
    terminal.types(b"\x03")
    terminal.reads_on()
    terminal.close()
    ended = terminal.builder.end(5)
    cli.left_nothing()
    aftermath.clean()
    assert ended.status == 130
    are_warm(cli, [])
    assert numbers(cli.log("sleeps")) == [0]


@pytest.mark.fault("terminal closed", how="a terminal's other end closed: SIGHUP, and no more output", holds="129")
@pytest.mark.alone
def test_terminal_closed_ends_run_with_sighup(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(command("sleeps", SLEEPING))
    terminal = Terminal(cli)
    terminal.shows("line 0")
    aftermath.begins()
    terminal.close()
    ended = terminal.builder.end(5)
    cli.left_nothing()
    aftermath.clean()
    assert ended.status == 129
    are_warm(cli, [])
    assert numbers(cli.log("sleeps")) == [0]


@pytest.mark.fault(
    "builder stopped for a while",
    how="SIGSTOP, which cannot be refused; 2 s later SIGCONT, with 40,000 lines meanwhile",
    holds="0: the container waits for its reader, and every line arrives",
)
def test_builder_stopped_by_sigstop_goes_on(cli: Cli, aftermath: Aftermath) -> None:
    prints = "for n in range(1, 20000):\n    print('line', n)\n    print('.' * 90)\n"
    cli.manifest(command("flows", "print('line 0', flush=True)\n" + GATE + prints + READY))
    builder = cli.start("warm", "--json")
    builder.says("line 0")
    aftermath.begins()
    builder.send(signal.SIGSTOP)
    (cli.root / "go").touch()
    time_passes(2)
    builder.send(signal.SIGCONT)
    aftermath.over(cli, builder, 0, warm=["flows"])
    assert numbers(cli.log("flows")) == list(range(20000))


# --- the builder itself ----------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "two builders at once",
    how="two of the same manifest, started together, and no cache yet",
    holds="0 and 0: one warms, the other waits for it, and finds everything warm; neither sweeps the other",
)
def test_two_builders_at_once_second_finds_warm(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(command("waits", WAITING))
    shutil.rmtree(cli.root)
    builders = [cli.start("warm", "--json", "--lock-timeout", "60s") for _ in range(2)]
    wait_for(lambda: any("waiting for " in builder.err for builder in builders), 30, "the one that waits")
    wait_for(lambda: any("line 0" in builder.err for builder in builders), 30, "the one that works")
    aftermath.begins()
    (cli.root / "go").touch()
    ended = [builder.end() for builder in builders]
    cli.left_nothing()
    aftermath.clean()
    assert [one.status for one in ended] == [0, 0]
    assert sorted(one.task("waits")["state"] for one in ended) == ["warm", "warmed"]
    assert not any("removed warm-cache-" in one.said for one in ended)
    are_warm(cli, ["waits"])
    assert numbers(cli.log("waits")) == [0, 1]


@pytest.mark.fault(
    "started by cron",
    how="env -i with DOCKER_HOST alone, no terminal, another working directory",
    holds="0: the lease is in the temporary directory, and is gone afterwards",
)
def test_builder_with_empty_environment_works(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(shapes())
    program = ("env", "-i", f"DOCKER_HOST={cli.host}", "sh", "-c", f'cd {ROOT} && exec "$0" "$@"', *PROGRAM)
    aftermath.begins()
    builder = cli.start("warm", "--json", program=program)
    aftermath.over(cli, builder, 0, warm=["shapes"])
    home = Path(tempfile.gettempdir()) / f"warm-cache-{os.getuid()}"
    assert [path for path in home.glob("held-*/lease") if is_ours(path, builder)] == []


def is_ours(lease: Path, builder: Running) -> bool:
    """A lease that is younger than this builder, and that nobody holds any more."""
    try:
        with lease.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return lease.stat().st_mtime > builder.started
    except OSError:
        return False


#: Who may use the engine's socket, and nothing else of this machine.
NOBODY = 65534


@pytest.fixture
def nobody(docker_host: str, tiny_image: str) -> Iterator[Cli]:
    """A user who is not root, with a socket to the engine."""
    program = as_nobody(sys.executable, "-c", "import builder.cli.main, docker")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    if os.getuid() or subprocess.run(program, cwd="/", env=environ, capture_output=True).returncode:
        pytest.skip("needs root, and a checkout and an interpreter that everybody may read")
    # Not in a directory of pytest's, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="warm-cache-test-") as name:
        place = Path(name)
        place.chmod(0o755)
        door = Door(docker_host, place / "engine.sock")
        cli = Cli(place, door.url, tiny_image)
        (place / "engine.sock").chmod(0o666)
        for path in (place, place / "run"):
            os.chown(path, NOBODY, NOBODY)
        cli.root.mkdir()
        yield cli
        cli.close()
        door.close()


def as_nobody(*program: str) -> tuple[str, ...]:
    return "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *program


@pytest.mark.fault(
    "builder that is not root",
    how="uid 65534 with access to the engine's socket; the cache directory is root's, once readable and once closed",
    holds="as for root: 0 for warm and check, 130 within 5 s for a signal, and a sweep after SIGKILL; nothing in the "
    "cache is the builder's own",
)
@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["readable", "closed"])
@pytest.mark.alone
def test_builder_without_root_works(nobody: Cli, mode: int, request: pytest.FixtureRequest) -> None:
    clock = Aftermath.of(request)
    nobody.root.chmod(mode)
    program = as_nobody(*PROGRAM)

    def ends(verb: str, status: int) -> str:
        ended = nobody.start(verb, program=program).end()
        nobody.left_nothing()
        assert ended.status == status, ended.said
        return ended.said

    nobody.manifest(shapes())
    ends("check", 10)
    ends("warm", 0)
    ends("check", 0)
    assert {path.lstat().st_uid for path in nobody.root.rglob("*")} == {0}

    nobody.manifest(shapes(), command("sleeps", SLEEPING))
    builder = nobody.start("warm", "--json", program=program)
    builder.says("line 0")
    clock.begins()
    builder.send(signal.SIGINT)
    assert builder.end(5).status == 130
    nobody.left_nothing()
    clock.clean()

    builder = nobody.start("warm", program=program)
    builder.says("line 0")
    builder.send(signal.SIGKILL)
    builder.end(5)
    assert "its builder is gone" in ends("sweep", 0)
    assert "shapes" in ends("check", 10)


def out_of_service(ledger: Path, acquire: str) -> dict[str, object]:
    """A section of the manifest; what was done is one word a line."""
    return {"acquire": [f"echo acquire >> {ledger}; {acquire}"], "release": [f"echo release >> {ledger}"]}


@pytest.mark.fault(
    "builder killed while it takes the machine out of service",
    how="SIGKILL, with a [gpus] acquire that refuses SIGTERM",
    holds="acquire ends within 5 s, and the next builder does the release",
)
@pytest.mark.alone
def test_builder_killed_during_acquire_hook_is_released(cli: Cli, aftermath: Aftermath) -> None:
    ledger = cli.place / "ledger"
    stubborn = f"trap '' TERM; echo $$ > {cli.place}/pid; echo draining; sleep 600 & wait; sleep 600"
    cli.manifest(shapes(), gpus=out_of_service(ledger, stubborn))
    builder = cli.start("warm")
    builder.says("» draining")
    aftermath.begins()
    builder.send(signal.SIGKILL)
    builder.end(5)
    process = Path("/proc", (cli.place / "pid").read_text().strip())
    wait_for(lambda: not process.exists() or b" Z " in (process / "stat").read_bytes(), 5, "the end of acquire")
    aftermath.clean()
    assert ledger.read_text().split() == ["acquire"]
    ended = cli.run("sweep")
    assert "putting this machine back into service, for a builder that was killed" in ended.said
    assert ledger.read_text().split() == ["acquire", "release"]
    are_warm(cli, [])


@pytest.mark.fault(
    "working directory removed",
    how="rmdir while the builder starts in it, with [gpus] acquire and release",
    holds="0: that is said, and acquire and release run in /",
)
@pytest.mark.alone
def test_working_directory_removed_absolute_paths_work(cli: Cli, aftermath: Aftermath) -> None:
    ledger = cli.place / "ledger"
    cli.manifest(shapes(), gpus=out_of_service(ledger, f"pwd >> {ledger}"))
    gone = ("sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh")
    aftermath.begins()
    ended = aftermath.over(cli, cli.start("warm", "--json", program=(*gone, *PROGRAM)), 0, warm=["shapes"])
    assert "the working directory is gone" in ended.said
    assert ledger.read_text().split() == ["acquire", "/", "release"]
