"""Two hundred tasks in a row, failures at random among them, and then nothing more than before: no container, process,
lock, file, volume, descriptor or memory.

Most tasks run inside one builder, whose descriptors, threads and memory are watched all the time; the others have a
builder each, some of which are interrupted or killed. WARM_CACHE_SOAK_SEED repeats a run.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import random
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine
from builder.host import gpu_locks
from builder.host.deadlines import Deadline, poll
from tests.bench.measuring import show, write_down
from tests.engine.cli import LABEL, READY, Cli, a_cli, command, shapes, wait_for  # noqa: F401 - a fixture

pytestmark = [pytest.mark.bench, pytest.mark.engine, pytest.mark.timeout(1200)]

INSIDE, ALONE = 160, 40
#: Tasks at either end of the long builder whose looks are compared.
EDGE = 20
#: KiB that it may have grown by: its report keeps a row and the last lines of every task.
GROWTH = 16 << 10

TERM_IGNORED = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
SLEEP = "import time\nprint('here', flush=True)\ntime.sleep(60)\n"
EAT = (
    "import os, time\nprint('here', flush=True)\nwhile not os.path.exists('/jit/go-{label}'): time.sleep(0.02)\n"
    "held = [b'x' * (1 << 20) * 64 for _ in range(100)]\n"
)


@dataclass(frozen=True)
class Play:
    """What a task does, how often it comes among all, and what its reason has to say; no reason: it succeeds."""

    code: str
    share: int
    reason: str = ""
    more: dict[str, Any] = field(default_factory=dict)


PLAYS = {
    "succeeds": Play(READY, 30),
    "crash-line": Play("print('Scheduler hit an exception: Traceback', flush=True)\n" + SLEEP, 5, "Scheduler hit an"),
    "nothing-done": Play("pass", 5, "KERNELS READY"),
    "exit-7": Play("import sys\nsys.exit(7)", 5, "7"),
    "timeout": Play("import time\nwhile True: print('on', flush=True) or time.sleep(0.1)", 3, "", {"timeout": "1s"}),
    "silence": Play(SLEEP, 3, "silence: ", {"silence": "1s"}),
    "stubborn": Play(TERM_IGNORED + SLEEP, 3, "timeout: ", {"timeout": "1s"}),
    "killed": Play(SLEEP, 4, "SIGKILL"),
    "memory": Play(EAT, 3, "out of memory"),
}
FATES = {"warms": 8, "succeeds": 4, "Ctrl-C": 3, "SIGTERM": 2, "kill -9": 4}


@dataclass(frozen=True)
class Look:
    """What a process has, while so many tasks have begun. memory: resident, in KiB."""

    begun: int
    descriptors: int
    threads: int
    memory: int


def look(pid: int, begun: int) -> Look:
    rows = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    status = {name: value.split() for name, _, value in rows}
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - names alone: no entry has to be looked at
    return Look(begun, descriptors, int(status["Threads"][0]), int(status["VmRSS"][0]))


class Meddler:
    """Somebody else on the engine, who kills the containers of some tasks and takes the memory of others."""

    def __init__(self, cli: Cli, engine: Engine) -> None:
        self._cli, self._engine = cli, engine
        self._met: set[str] = set()
        self.seen: set[str] = set()

    def meddle(self) -> None:
        for container in self._engine.containers([f"{LABEL}run"]):
            label = container.labels.get(f"{LABEL}task", "")
            if f'"{self._cli.place}/' not in container.labels.get(f"{LABEL}lease", ""):
                continue
            self.seen.add(container.id)
            log = self._cli.logs / f"{label}.log"
            if container.id in self._met or not log.exists() or "here" not in log.read_text(errors="replace"):
                continue
            if label.startswith("killed-"):
                self._met.add(container.id)
                self._ask(container.id, "kill")
            elif label.startswith("memory-"):
                self._met.add(container.id)
                self._ask(container.id, "update", json={"Memory": 128 << 20, "MemorySwap": 128 << 20})
                (self._cli.root / f"go-{label}").touch()

    def _ask(self, container: str, verb: str, **how: Any) -> None:
        self._engine._request("POST", f"/containers/{{0}}/{verb}", container, **how)


def test_soak_leaves_nothing(cli: Cli, engine: Engine) -> None:
    seed = int(os.environ.get("WARM_CACHE_SOAK_SEED") or time.time())
    print(f"\nWARM_CACHE_SOAK_SEED={seed}")
    chance, began = random.Random(seed), time.monotonic()
    (cli.place / "tmp").mkdir()
    before = volumes(engine)
    meddler = Meddler(cli, engine)

    played = draw(chance, {name: play.share for name, play in PLAYS.items()}, INSIDE)
    looks, pid = inside(cli, meddler, played)
    fates = draw(chance, FATES, ALONE)
    pids = [pid, *(alone(cli, meddler, number, fate) for number, fate in enumerate(fates))]
    # What the last one left, if it was killed, is the next one's to sweep.
    cli.manifest(command("last", READY))
    cli.warm(environ=environ(cli))

    first = [one for one in looks if one.begun <= EDGE]
    # Not while its very last task runs: nothing may be held any more then.
    last = [one for one in looks if INSIDE - EDGE <= one.begun < INSIDE]
    rows = [["median (most)", f"first {EDGE} tasks", f"last {EDGE} tasks", "all"]]
    for name in ("descriptors", "threads", "memory"):
        values = [[getattr(one, name) for one in some] for some in (first, last, looks)]
        rows.append([name, *(f"{statistics.median(some):.0f} ({max(some)})" for some in values)])
    show(f"{INSIDE} tasks in one builder, {ALONE} in their own: {time.monotonic() - began:.0f} s", rows)
    show("What happened", [["", "times"], *([name, str(times)] for name, times in Counter(played + fates).items())])
    left = {
        "containers": len(cli.containers(engine)),
        "processes": len(processes(cli, meddler.seen)),
        "locks of the cache root": len(held(cli.root / "locks")),
        "locks on GPUs": len(held_by(pids, gpu_locks.DIRECTORIES)),
        "leases": len(list((cli.place / "run").glob("*/*"))),
        "temporary files": len(list((cli.place / "tmp").iterdir())) + len(list(cli.root.rglob("*.tmp*"))),
        "volumes": len(volumes(engine) - before),
    }
    show("What is left", [["", "number"], *([name, str(number)] for name, number in left.items())])
    series = [dataclasses.astuple(one) for one in looks]
    figures = {"seed": seed, "left": left, "plays": dict(Counter(played + fates)), "looks": series}
    write_down("soak", engine, [], **figures, seconds=time.monotonic() - began)
    assert set(left.values()) == {0}, left
    # What a task needs while it runs differs by its moment, so most is compared with most.
    assert max(one.descriptors for one in last) <= max(one.descriptors for one in first)
    assert max(one.threads for one in last) <= max(one.threads for one in first)
    assert max(one.memory for one in last) - max(one.memory for one in first) < GROWTH


def inside(cli: Cli, meddler: Meddler, played: Sequence[str]) -> tuple[list[Look], int]:
    """One builder for all of these; what it had meanwhile, and its pid. Every task ends as it has to."""
    tasks = []
    for number, name in enumerate(played):
        label, play = f"{name}-{number}", PLAYS[name]
        tasks.append(command(label, play.code.replace("{label}", label), **play.more))
    cli.manifest(*tasks)
    builder = cli.start("warm", "--json", environ=environ(cli))
    looks: list[Look] = []

    def watched() -> bool:
        meddler.meddle()
        if builder.process.poll() is not None:
            return True
        begun = len(list(cli.logs.glob("*-*.log")))
        if begun >= 2:
            looks.append(look(builder.process.pid, begun))
        return False

    assert poll(watched, Deadline(600), every=0.1), "the long builder did not end"
    ended = builder.end()
    cli.left_nothing()
    assert ended.status == 11, ended.said
    for number, name in enumerate(played):
        task = ended.task(f"{name}-{number}")
        expected = "warmed" if name == "succeeds" else "failed"
        assert (task["state"], PLAYS[name].reason in (task["reason"] or "")) == (expected, True), task
    return looks, builder.process.pid


def alone(cli: Cli, meddler: Meddler, number: int, fate: str) -> int:
    """A builder for one task, which meets this fate; its pid."""
    ends = {"Ctrl-C": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143), "kill -9": (signal.SIGKILL, -9)}
    label = f"alone-{number}"
    cli.manifest(shapes(label) if fate == "warms" else command(label, SLEEP if fate in ends else READY))
    builder = cli.start("warm", "--json", *(["--force"] if fate == "warms" else []), environ=environ(cli))
    if fate in ends:
        wait_for(lambda: f"{label}.log" in os.listdir(cli.logs) and "here" in cli.log(label), 30, "the task")  # noqa: PTH208
        meddler.meddle()
        builder.send(ends[fate][0])
    status = builder.end().status
    assert status == (ends[fate][1] if fate in ends else 0), builder.out + builder.err
    if fate != "kill -9":
        nothing_but_leases_of_the_dead(cli)
    return builder.process.pid


def nothing_but_leases_of_the_dead(cli: Cli) -> None:
    """A builder that could clean up has; also after one that could not."""
    with cli.engine() as engine:
        assert cli.containers(engine) == []
    assert cli.lock_is_free()


def environ(cli: Cli) -> dict[str, str]:
    return {"TMPDIR": str(cli.place / "tmp")}


def draw(chance: random.Random, shares: dict[str, int], number: int) -> list[str]:
    """So many, each at least once, in any order."""
    rest = chance.choices(list(shares), list(shares.values()), k=number - len(shares))
    drawn = [*shares, *rest]
    chance.shuffle(drawn)
    return drawn


# --- what may be left ------------------------------------------------------------------------------------------------


def volumes(engine: Engine) -> set[str]:
    """Those without a name of anybody's: these tasks name none, and others on the engine may come and go."""
    names = {str(volume["Name"]) for volume in engine._get("/volumes").json().get("Volumes") or ()}
    return {name for name in names if re.fullmatch("[0-9a-f]{64}", name)}


def processes(cli: Cli, containers: set[str]) -> list[str]:
    """Processes that name this user's place, or run in one of these containers."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            said = (entry / "cmdline").read_bytes().decode(errors="replace")
            group = (entry / "cgroup").read_text(encoding="utf-8")
        except OSError:
            continue
        if f"{cli.place}/" in said or any(container in group for container in containers):
            found.append(said)
    return found


def held(folder: Path) -> list[Path]:
    """Files below this folder that somebody has locked."""
    return [path for path in folder.rglob("*") if path.is_file() and not _is_free(path)]


def _is_free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def held_by(pids: Sequence[int], folders: Sequence[Path]) -> list[str]:
    """Locks of these processes on files in these folders, as the kernel lists them."""
    inodes = {path.stat().st_ino for folder in folders if folder.is_dir() for path in folder.iterdir()}
    rows = [line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "->" not in row]
    return [row[5] for row in rows if int(row[4]) in pids and int(row[5].rpartition(":")[2]) in inodes]
