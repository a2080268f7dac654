"""Faults of the machine, while the real program runs: disks that are full or read-only, memory, processes, clocks."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.engine.api import ContainerSpec, Mount
from builder.engine.client import Engine
from tests.engine.cli import GATE, PROGRAM, READY, Cli, command, shapes
from tests.engine.faults import Aftermath, OwnEngine, changed, numbers, told

pytestmark = pytest.mark.engine


# --- disks -----------------------------------------------------------------------------------------------------------


class Volume:
    """A named volume of a few MB, that keeps its content because a container of the test's own has it mounted."""

    def __init__(self, engine: Engine, image: str, options: str) -> None:
        self.name = f"warm-cache-test-{os.urandom(6).hex()}"
        self._engine = engine
        engine._api.create_volume(
            self.name, driver="local", driver_opts={"type": "tmpfs", "device": "tmpfs", "o": options}
        )
        self._keeper = engine.create(
            ContainerSpec(
                image=image,
                name=self.name,
                command=["sleep", "600"],
                network="none",
                stop_timeout=0,
                mounts=(Mount(source=self.name, target="/jit", kind="volume"),),
            )
        )
        engine.start(self._keeper)

    def close(self) -> None:
        self._engine.remove(self._keeper, force=True)
        self._engine._api.remove_volume(self.name, force=True)


@pytest.fixture
def small(cli: Cli, engine: Engine) -> Iterator[str]:
    """``--cache`` for a volume of 4 MiB."""
    volume = Volume(engine, cli.image, "size=4m")
    yield f"volume:{volume.name}"
    volume.close()


#: An entry of Triton's cache.
KERNEL = "from triton.cache import compile_kernel\ncompile_kernel('k', 'x')\n"

#: Leaves not one page of the cache's file system.
FILL = """
def fill():
    with open('/jit/ballast', 'ab', buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == 28, error
"""


@pytest.mark.fault(
    "cache's disk full while a task compiles",
    how="a tmpfs volume of 4 MiB as the cache, filled before the kernels are written",
    holds="11: the reason names the disk",
)
def test_cache_disk_full_is_task_failure(cli: Cli, small: str, aftermath: Aftermath) -> None:
    code = f"{FILL}\nprint('line 0')\nfill()\n{KERNEL}{READY}"
    cli.manifest(command("fills", code, families=["triton"]), cache={"root": None, "volume": small[7:]})
    builder = cli.start("warm", "--json")
    builder.says("line 0")
    aftermath.begins()
    aftermath.over(cli, builder, 11, "No space left on device")
    assert numbers(cli.log("fills")) == [0]


@pytest.mark.fault(
    "cache's disk full when the marker is written",
    how="a tmpfs volume of 4 MiB as the cache, filled by the second pass",
    holds="11: the reason names the disk; no marker, and no part of one",
)
def test_cache_disk_full_at_marker_is_no_marker(cli: Cli, small: str, aftermath: Aftermath) -> None:
    code = f"""{FILL}
import os
import signal
{KERNEL}print('line', int(os.path.exists('/jit/first')), flush=True)
if os.path.exists('/jit/first'):
    fill()
open('/jit/first', 'w').close()
{READY}"""
    cli.manifest(command("fills", code, families=["triton"]), cache={"root": None, "volume": small[7:]})
    builder = cli.start("warm", "--json")
    builder.says("line 1")
    aftermath.begins()
    aftermath.over(cli, builder, 11, "No space left on device")
    assert numbers(cli.log("fills")) == [0, 1]
    with cli.engine() as engine:
        assert "markers" not in run_in(engine, cli, small[7:], "find /jit/markers -type f")


@pytest.mark.fault(
    "cache is read-only",
    how="a volume that is mounted read-only as the cache",
    holds="12: what cannot be written, and why",
)
def test_cache_read_only_is_preflight_error(cli: Cli, engine: Engine, aftermath: Aftermath) -> None:
    volume = Volume(engine, cli.image, "size=4m,ro")
    try:
        cli.manifest(shapes(), cache={"root": None, "volume": volume.name})
        aftermath.begins()
        aftermath.over(cli, cli.start("warm", "--json"), 12, "Read-only file system")
    finally:
        volume.close()


@pytest.mark.fault(
    "cache directory is read-only for the engine",
    how="a read-only bind mount of the directory onto itself, in the engine's mount namespace",
    holds="12 after the first task: what cannot be written, and why; what is warm stays so",
)
def test_cache_directory_read_only_is_preflight_error(
    tmp_path: Path, own_engine: OwnEngine, tiny_image: str, aftermath: Aftermath
) -> None:
    cli = Cli(tmp_path, own_engine.host, tiny_image, engine=own_engine.host)
    cli.manifest(shapes())
    assert cli.run("warm").status == 0
    own_engine.makes_read_only(cli.root)
    cli.manifest(shapes(), shapes("other", m_values=[64]), shapes("never", m_values=[32]))
    aftermath.begins()
    ended = aftermath.over(cli, cli.start("warm", "--json"), 12, "Read-only file system", warm=["shapes"])
    assert [task["state"] for task in ended.document["tasks"]] == ["warm", "failed", "cold"]
    cli.close()


@pytest.mark.fault(
    "cache directory is another one for the engine",
    how="a tmpfs over the directory, in the builder's mount namespace alone",
    holds="12 before the first task: that the engine has another directory there",
)
@pytest.mark.parametrize("known", [False, True], ids=["new-root", "warm-root"])
def test_cache_directory_of_engine_is_another_one_is_preflight_error(
    cli: Cli, aftermath: Aftermath, known: bool
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a mount namespace of its own takes root")
    cli.manifest(shapes())
    cli.root.mkdir(exist_ok=True)
    if known:
        assert cli.run("warm").status == 0
    script = 'mount -t tmpfs none "$0" && exec "$@"'
    program = ("unshare", "--mount", "sh", "-c", script, str(cli.root), *PROGRAM)
    builder = cli.start("warm", "--json", program=program)
    aftermath.begins()
    ended = aftermath.over(
        cli, builder, 12, f"the engine has another directory at {cli.root}", warm=["shapes"] if known else []
    )
    assert [task["state"] for task in ended.document["tasks"]] == ["cold"]


@pytest.mark.fault(
    "log file's disk full",
    how="/dev/full in the log's place",
    holds="0: the cache is warm, and a warning says that the log is not complete, and why",
)
def test_log_disk_full_is_warning(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(shapes())
    cli.logs.mkdir()
    log = cli.logs / "shapes.log"
    log.symlink_to("/dev/full")
    builder = cli.start("warm", "--json")
    builder.says("▸ shapes")
    aftermath.begins()
    builder.end()
    log.unlink()  # it has no end, and nothing may read it
    aftermath.over(cli, builder, 0, f"the log {log} is not complete: No space left on device", warm=["shapes"])


@pytest.mark.fault(
    "log file's file system hangs, and a task that has a timeout",
    how="a FIFO without a reader in the log's place, and a task without end that has 5 s",
    holds="11 in time, and a warning that says that the log is not complete",
)
def test_log_that_hangs_keeps_timeout(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(command("endless", HANGING_LOG, timeout="5s"))
    log = hanging_log(cli, "endless")
    builder = cli.start("warm", "--json")
    builder.says("line 1000")
    aftermath.begins()
    ended = builder.end(30)
    log.unlink()  # nothing may read it
    cli.left_nothing()
    aftermath.clean()
    assert ended.status == 11
    assert f"the log {log} is not complete: its place took no more bytes in time" in ended.said


@pytest.mark.fault(
    "signal to the builder while the log file's file system hangs",
    how="a FIFO without a reader in the log's place; SIGTERM",
    holds="143, within 5 s",
)
def test_signal_while_log_hangs_ends_run_in_time(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(command("endless", HANGING_LOG))
    log = hanging_log(cli, "endless")
    builder = cli.start("warm", "--json")
    builder.says("line 1000")
    aftermath.begins()
    builder.send(signal.SIGTERM)
    ended = builder.end(5)
    log.unlink()
    cli.left_nothing()
    aftermath.clean()
    assert ended.status == 143


#: Prints more than a pipe takes, and goes on for ever.
HANGING_LOG = "import time\nfor n in range(20000):\n    print('line', n, flush=True)\ntime.sleep(600)\n"


def hanging_log(cli: Cli, label: str) -> Path:
    cli.logs.mkdir()
    log = cli.logs / f"{label}.log"
    os.mkfifo(log)
    return log


@pytest.mark.fault(
    "crash loop that floods the log",
    how="a task that prints without end, and a log_limit of 4 MiB instead of 2 GiB",
    holds="11: the reason is the log limit; the log ends there",
)
def test_log_flood_ends_at_log_limit(cli: Cli, aftermath: Aftermath) -> None:
    flood = "print('line 0', flush=True)\nwhile True:\n    print('crashed, and starting again ' * 9)\n"
    cli.manifest(command("floods", flood), container={"log_limit": "4m"})
    builder = cli.start("warm", "--json")
    builder.says("line 0")
    aftermath.begins()
    aftermath.over(cli, builder, 11, "the log limit is reached: no more was copied and the task was ended")
    assert 4 << 20 < (cli.logs / "floods.log").stat().st_size < 8 << 20


@pytest.mark.fault(
    "disk of the lease files full",
    how="a full tmpfs at XDG_RUNTIME_DIR, mounted in the builder's own mount namespace",
    holds="12: before anything is created",
)
def test_lease_disk_full_is_preflight_error(cli: Cli, aftermath: Aftermath) -> None:
    cli.manifest(shapes())
    aftermath.begins()
    builder = cli.start("warm", "--json", program=on_full_disk(cli.place / "run", 0))
    aftermath.over(
        cli, builder, 12, f"cannot make a lease file in {cli.place}/run/warm-cache-0: No space left on device"
    )


@pytest.mark.fault(
    "/tmp full",
    how="a tmpfs of three pages at TMPDIR, in the builder's own mount namespace, and a cache that is read through it",
    holds="12: the reason names the disk",
)
def test_temporary_directory_full_in_container_is_task_failure(cli: Cli, small: str, aftermath: Aftermath) -> None:
    cli.manifest(shapes(), cache={"root": None, "volume": small[7:]})
    assert cli.run("warm").status == 0
    (cli.place / "tmp").mkdir()
    aftermath.begins()
    builder = cli.start(
        "warm", "--json", program=on_full_disk(cli.place / "tmp", 3), environ={"TMPDIR": str(cli.place / "tmp")}
    )
    aftermath.over(cli, builder, 12, "to a temporary directory: No space left on device", warm=["shapes"])


def on_full_disk(place: Path, pages: int) -> tuple[str, ...]:
    """The real program, which finds a file system with so many free pages there. Nobody else does."""
    if os.getuid():
        pytest.skip("a file system of its own needs root")
    script = (
        f'mount -t tmpfs -o size={(pages + 1) * 4}k tmpfs "$0" && head -c 4096 /dev/zero >"$0/ballast" && exec "$@"'
    )
    return "unshare", "--mount", "sh", "-c", script, str(place), sys.executable, "-m", "builder"


def run_in(engine: Engine, cli: Cli, volume: str, shell: str) -> str:
    """What this prints, in a container with the volume."""
    container = engine.create(
        ContainerSpec(
            image=cli.image,
            name=f"warm-cache-test-{os.urandom(6).hex()}",
            command=["sh", "-c", shell],
            network="none",
            mounts=(Mount(source=volume, target="/jit", kind="volume"),),
        )
    )
    try:
        engine.start(container)
        return "".join(data.decode() for _, data in engine.log_frames(container, follow=True))
    finally:
        engine.remove(container, force=True)


# --- memory and processes --------------------------------------------------------------------------------------------


def update(cli: Cli, **limits: int) -> None:
    """New limits for the one container that runs."""
    with cli.engine() as engine:
        (container,) = cli.containers(engine)
        engine._api._raise_for_status(
            engine._api._post_json(engine._api._url("/containers/{0}/update", container), data=limits)
        )


def tasks_of(cli: Cli) -> int:
    """Processes and threads of the one container that runs."""
    with cli.engine() as engine:
        (container,) = cli.containers(engine)
        usage = engine._api._get(
            engine._api._url("/containers/{0}/stats", container), params={"stream": 0, "one-shot": 1}
        ).json()
        return int(usage["pids_stats"]["current"])


@pytest.mark.parametrize(
    ("code", "limits", "reason"),
    [
        pytest.param(
            "held = [b'x' * (64 << 20) for _ in range(100)]\n",
            {"Memory": 256 << 20, "MemorySwap": 256 << 20},
            "out of memory inside the container",
            id="memory",
            marks=pytest.mark.fault(
                "out of memory inside the container",
                how="docker update: a limit of 256 MiB, and a task that wants more",
                holds="11: memory is named in the reason",
            ),
        ),
        pytest.param(
            "import os\nos.fork()\n",
            {"PidsLimit": 2},
            "Resource temporarily unavailable",
            id="processes",
            marks=pytest.mark.fault(
                "PID limit reached by a task",
                how="docker update: no process more than there are, and a task that forks",
                holds="11: the reason is the task's own last line",
            ),
        ),
    ],
)
def test_limit_reached_by_task_is_task_failure(
    cli: Cli, aftermath: Aftermath, code: str, limits: dict[str, int], reason: str
) -> None:
    with cli.engine() as engine:
        if "Memory" in limits and not engine.info.get("MemoryLimit"):
            pytest.skip("this engine cannot limit memory, and without a limit the task would take the machine's")
    cli.manifest(command("limited", "print('line 0', flush=True)\n" + GATE + code + READY))
    builder = cli.start("warm", "--json")
    builder.says("line 0")
    update(cli, **limits)
    aftermath.begins()
    (cli.root / "go").touch()
    aftermath.over(cli, builder, 11, reason)
    assert numbers(cli.log("limited")) == [0]


@pytest.mark.fault(
    "PID limit reached by the in-container program",
    how="docker update: no process more than there are, or one, before the second pass",
    holds="11: the reason names the limit",
)
@pytest.mark.parametrize(
    ("more", "reasons"),
    [
        (-2, ["cannot start python3: "]),
        # One process or thread of the image's init may come or go between the count and the second pass.
        (-1, ["cannot read the output of python3: can't start new thread", "cannot start python3: "]),
    ],
)
def test_pid_limit_at_second_pass_is_not_verified(
    cli: Cli, aftermath: Aftermath, more: int, reasons: list[str]
) -> None:
    code = KERNEL + "print('line 0', flush=True)\n" + GATE + READY
    cli.manifest(command("kernels", code, families=["triton"]))
    builder = cli.start("warm", "--json")
    builder.says("line 0")
    update(cli, PidsLimit=tasks_of(cli) + more)  # two of them, the child and a thread for its output, end with the pass
    aftermath.begins()
    (cli.root / "go").touch()
    ended = aftermath.over(cli, builder, 11, "second pass: cannot ")
    assert any(f"second pass: {reason}" in told(ended) for reason in reasons), told(ended)
    assert "PID limit" in told(ended)
    assert numbers(cli.log("kernels")) == [0]


# --- clocks ----------------------------------------------------------------------------------------------------------

#: The wall clock is off by as many seconds as this file says; the monotonic one is not.
JUMPING = """
from pathlib import Path
real = time.time
def off():
    try:
        return float(Path({path!r}).read_text())
    except (OSError, ValueError):
        return 0.0
time.time = lambda: real() + off()
time.time_ns = lambda: int(time.time() * 1e9)
"""

DAY = 86400.0


@pytest.mark.fault(
    "wall clock jumps by a day, to and fro",
    how="time.time() of the builder; another builder sweeps, ten years ahead",
    holds="11: a deadline of 3 s is kept, one of 60 s is not over, and nobody's container is swept",
)
def test_clock_jump_changes_no_deadline(cli: Cli, aftermath: Aftermath) -> None:
    waits = "print('line 0', flush=True)\n" + GATE + READY
    cli.manifest(
        command("waits", waits, timeout="60s", silence="60s"),
        command("never", "import time; print('line 0', flush=True); time.sleep(60)", timeout="3s"),
    )
    clock = cli.place / "clock"
    program = changed(JUMPING.format(path=str(clock)))
    builder = cli.start("warm", "--json", program=program)
    builder.says("line 0")
    aftermath.begins()
    clock.write_text(str(DAY))
    ahead = cli.place / "ahead"
    ahead.write_text(str(3650 * DAY))
    swept = cli.start("sweep", "--lock-timeout", "1s", program=changed(JUMPING.format(path=str(ahead)))).end()
    assert swept.status == 15, swept.said
    assert "removed " not in swept.said
    clock.write_text(str(-2 * DAY))
    (cli.root / "go").touch()
    ended = aftermath.over(cli, builder, 11, "never failed: timeout: not finished after 3 s", warm=["waits"])
    assert ended.task("waits")["state"] == "warmed"
    assert 3 <= ended.task("never")["seconds"] < 15
    assert numbers(cli.log("waits")) == [0]
