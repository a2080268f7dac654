"""A container that floods: how fast its log is written down, whether every line is there once, and what it costs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from builder.engine.api import ContainerSpec
from builder.engine.client import Engine
from builder.engine.container import ContainerOutcome, Deadlines, Sinks, run_container
from builder.engine.lease import Lease
from builder.host.cancel import Cancel
from builder.job import Job
from tests.bench.measuring import CLI, Series, environment, in_turn, quietly, ratio, show, write_down
from tests.program import Program, assemble

pytestmark = [pytest.mark.bench, pytest.mark.engine, pytest.mark.timeout(1200)]

ROUNDS = 5
LINES, SIZE = 1_000_000, 100
#: As a log has them. Dots alone are a worst case: in CPython's search for a crash line they collide with its letters.
FILL = " TP0] Load weight end. type=DeepseekV3ForCausalLM, avail mem=58.11 GB, mem usage=81.10 GB.".ljust(SIZE - 9, "=")
MEGABYTES = LINES * SIZE / 1e6
#: Prints the lines as fast as this interpreter can.
FLOOD = f"""
import os
for first in range(0, {LINES}, 10000):
    data = "".join("%08d{FILL}\\n" % line for line in range(first, first + 10000)).encode()
    while data:
        data = data[os.write(1, data):]
"""
PRINT = ["python3", "-c", FLOOD]


def count(path: Path, mark: bytes = b"", *, others: bool = False) -> int:
    """The number of lines in a log that must hold each once and in order. others: lines of somebody else between."""
    found = 0
    with path.open("rb") as file:
        for line in file:
            if others and line[len(mark) + 8 :] != FILL.encode() + b"\n":
                continue
            assert line == mark + b"%08d%s\n" % (found, FILL.encode()), f"line {found} of {path.name} is {line[:120]!r}"
            found += 1
    return found


class Memory(threading.Thread):
    """The most memory that this process had while the thread ran, beyond what it had before. Bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self._before = self._process.memory_info().rss
        self.grown = 0

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.grown = max(self.grown, self._process.memory_info().rss - self._before)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.grown


class Readers:
    """Every way to get the output of a new container with this command into a file, and the container away again."""

    def __init__(self, engine: Engine, image: str, place: Path, lease: Lease) -> None:
        self._engine, self._image, self._place, self._lease = engine, image, place, lease
        self.grown: list[int] = []
        self.cpu: list[float] = []
        self.wrong: dict[str, int] = {}

    def builder(self) -> float:
        log = self._place / "builder.log"
        spec = ContainerSpec(
            image=self._image, name=f"bench-{os.urandom(6).hex()}", command=PRINT, network="none", shm_size=64 << 20
        )
        memory, cpu, begun = Memory(), time.process_time(), time.perf_counter()
        memory.start()
        outcome = self._run(spec, log)
        seconds = time.perf_counter() - begun
        self.cpu.append(time.process_time() - cpu)
        self.grown.append(memory.stop())
        assert (outcome.ended, outcome.exit_code, outcome.problems) == ("exited", 0, [])
        assert outcome.log_complete
        assert count(log, b"out| ") == LINES
        return seconds

    def _run(self, spec: ContainerSpec, log: Path) -> ContainerOutcome:
        return run_container(
            self._engine,
            spec,
            job=Job(mode="run", nonce=self._lease.nonce, mount="/jit"),
            lease=self._lease,
            deadlines=Deadlines(task=600, silence=600, start=60, grace=2),
            cancel=Cancel(),
            sinks=Sinks(log_path=log),
        )

    def logs_follow(self) -> float:
        """docker logs -f"""
        log = self._place / "cli.log"
        begun = time.perf_counter()
        with self._container() as container, log.open("wb") as file:
            quietly([CLI, "start", container])
            subprocess.run([CLI, "logs", "-f", container], stdout=file, check=True)
        return self._told("docker logs -f", log, time.perf_counter() - begun)

    def docker_py(self) -> float:
        """docker-py's logs(follow)"""
        log = self._place / "docker-py.log"
        follow = (
            "import docker, sys\n"
            "container = docker.from_env().containers.get(sys.argv[1])\n"
            "with open(sys.argv[2], 'wb') as file:\n"
            "    for part in container.logs(stream=True, follow=True): file.write(part)\n"
        )
        begun = time.perf_counter()
        with self._container() as container:
            quietly([CLI, "start", container])
            quietly([sys.executable, "-c", follow, container, str(log)], environment(self._place))
        return self._told("docker-py logs(follow)", log, time.perf_counter() - begun)

    def run(self) -> float:
        """docker run, attached"""
        log = self._place / "run.log"
        begun = time.perf_counter()
        with log.open("wb") as file:
            command = [CLI, "run", "--rm", "--init", "--network", "none", self._image, *PRINT]
            subprocess.run(command, stdout=file, check=True)
        return self._told("docker run", log, time.perf_counter() - begun)

    def nobody(self) -> None:
        """No reader at all: the engine alone writes the log."""
        with self._container() as container:
            quietly([CLI, "start", container])
            quietly([CLI, "wait", container])

    def _told(self, name: str, log: Path, seconds: float) -> float:
        """Others may lose lines: that is written down, not asserted."""
        try:
            wrong = abs(LINES - count(log))
        except AssertionError:
            with log.open("rb") as file:
                wrong = max(1, abs(LINES - sum(1 for _ in file)))
        self.wrong[name] = max(wrong, self.wrong.get(name, 0))
        return seconds

    @contextlib.contextmanager
    def _container(self) -> Iterator[str]:
        """Created as the builder creates its own, so that the log has the same driver and options."""
        options = ["--init", "--network", "none", "--log-driver", "json-file", "--log-opt", "max-size=1000g"]
        container = quietly([CLI, "create", *options, "--log-opt", "max-file=1", self._image, *PRINT]).strip()
        try:
            yield container
        finally:
            quietly([CLI, "rm", "-f", container])


def speed(series: Series, megabytes: float = MEGABYTES) -> list[str]:
    rate = megabytes / series.median
    return [series.name, f"{series.median:.2f} s", f"{series.least:.2f} s", f"{rate:.0f} MB/s", series.remark]


def test_log_pump_million_lines(tmp_path: Path, engine: Engine, tiny_image: str) -> None:
    with Lease(tmp_path, run_id="bench") as lease:
        readers = Readers(engine, tiny_image, tmp_path, lease)
        ways = {
            "builder": readers.builder,
            "docker logs -f": readers.logs_follow,
            "docker-py logs(follow)": readers.docker_py,
            "docker run": readers.run,
            "no reader": readers.nobody,
        }
        found = in_turn(ROUNDS, ways)
    mine, cli = found["builder"], found["docker logs -f"]
    grown, cpu = max(readers.grown), sorted(readers.cpu)[len(readers.cpu) // 2]
    mine.remark = (
        f"{ratio(cli, mine):.1f} times as fast as docker logs -f; no line lost or doubled; "
        f"{cpu:.2f} s of CPU, at most {grown / 1e6:.1f} MB more memory"
    )
    for name, wrong in readers.wrong.items():
        found[name].remark = f"{wrong} lines wrong" if wrong else ""
    show(
        f"{LINES} lines of {SIZE} bytes: container created, log in a file, container removed",
        [["", "median", "least", "", ""], *map(speed, found.values())],
    )
    write_down(
        "log",
        engine,
        list(found.values()),
        ratios={"docker logs -f to it": ratio(cli, mine)},
        aims={"docker logs -f to it": "at least 2"},
        memory_grown_bytes=readers.grown,
        cpu_seconds=readers.cpu,
    )


def test_warm_million_lines(tmp_path: Path, engine: Engine, tiny_image: str) -> None:
    """The whole way: task, in-container program, engine, builder, file."""
    flood = tmp_path / "cache" / "flood.py"
    flood.parent.mkdir()
    flood.write_text(FLOOD + 'os.write(1, b"ALL PRINTED\\n")\n')
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(
        f'schema = 1\n[image]\nref = "{tiny_image}"\n[cache]\nroot = "{tmp_path}/cache"\n[gpus]\ncount = 0\n'
        '[container]\nnetwork = "none"\nshm_size = "64m"\n'
        '[[task]]\nmodel = "example/flood"\nrecipe = "command"\nargv = ["python3", "/jit/flood.py"]\n'
        'success = "ALL PRINTED"\nfamilies = []\n'
    )
    builder = [sys.executable, "-m", "builder", "warm", "--force", "--manifest", str(manifest)]
    log = tmp_path / "logs" / "flood.log"

    def task() -> None:
        # With --json nothing but the document goes to stdout, and nobody reads the log from stderr: it goes to a file.
        with (tmp_path / "shown").open("wb") as shown:
            subprocess.run(
                [*builder, "--log-dir", str(log.parent), "--json"],
                env=environment(tmp_path),
                stdout=subprocess.DEVNULL,
                stderr=shown,
                check=True,
            )
        assert count(log, b"out| ", others=True) == LINES

    def bare() -> None:
        with (tmp_path / "bare.log").open("wb") as file:
            mount = f"type=bind,src={tmp_path}/cache,dst=/jit"
            options = ["--rm", "--init", "--network", "none", "--mount", mount]
            subprocess.run([CLI, "run", *options, tiny_image, "python3", "/jit/flood.py"], stdout=file, check=True)

    found = in_turn(ROUNDS, {"warm-cache warm, one task": task, "docker run": bare})
    show(
        f"{LINES} lines of {SIZE} bytes through a whole task, processes included",
        [["", "median", "least", "", ""], *map(speed, found.values())],
    )
    write_down("log-task", engine, list(found.values()))


def test_agent_million_lines_of_child(tmp_path: Path, engine: Engine) -> None:
    """Without an engine: the program of the container as a process of this machine, its stdout in a file."""
    program = Program(tmp_path, assemble(tmp_path / "site"))
    through = {"program": 0}

    def passes(lines: int) -> float:
        task = program.command(FLOOD.replace(str(LINES), str(lines)) + 'os.write(1, b"DONE\\n")', success="DONE")
        result = program.run(task, log_limit=8 << 30)
        assert result.status == 0, result.stderr[-2000:]
        if lines:
            through["program"] = result.stdout.count(FILL.encode() + b"\n")
            assert through["program"] == lines
        return result.seconds

    def pipe() -> None:
        with (tmp_path / "cat.log").open("wb") as file:
            writer = subprocess.Popen([sys.executable, "-c", FLOOD], stdout=subprocess.PIPE)
            subprocess.run(["cat"], stdin=writer.stdout, stdout=file, check=True)
            assert writer.stdout is not None
            writer.stdout.close()
            assert writer.wait() == 0

    ways = {
        "in-container program": lambda: passes(LINES),
        "the same without the lines": lambda: passes(0),
        "python | cat": pipe,
    }
    found = in_turn(ROUNDS, ways)
    whole, empty, cat = found.values()
    net = Series("its share for the lines", [a - b for a, b in zip(whole.seconds, empty.seconds, strict=True)])
    show(
        f"{LINES} lines of {SIZE} bytes through the in-container program alone",
        [
            ["", "median", "least", "", ""],
            *map(speed, (whole, net, cat)),
            [empty.name, f"{empty.median:.2f} s", f"{empty.least:.2f} s", "", ""],
        ],
    )
    write_down("log-inside", engine, [whole, empty, net, cat])
