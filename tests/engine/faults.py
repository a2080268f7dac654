"""What tests of faults share: what has to be true after every one of them, and the table of README.md made of them.

A test of a fault, or one of its parameters, carries ``@pytest.mark.fault(FAULT, how=…, holds=…)``: a row of the table.
README.md has exactly these rows, in this order, which tests/project/test_fault_table.py asserts. `make faults` writes
it, with what the run measured.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine
from builder.host.deadlines import Deadline, poll
from tests.engine import attacks
from tests.engine.attacks import line
from tests.engine.cli import ROOT, Cli, Ended, Running

HERE = Path(__file__).resolve().parent
TABLE = HERE / "README.md"
#: Set by `make faults`: the table is written at the end of the run.
WRITE = "WARM_CACHE_FAULT_TABLE"
SECONDS = pytest.StashKey[dict[str, float]]()

HEAD = """\
# Tests against a real engine

The real program as a process of its own, on the engine of `DOCKER_HOST`, with the tiny stand-in image. `cli.py` and
`workshop.py` are what the tests share; `faults.py` is what those of faults share.

## Faults

After every one of them, unless its row says otherwise: the documented exit status (the number in *what holds*) and a
sentence that is true; no container in any state, no lease, the run lock free; no traceback; `check` finds those tasks
warm that are, and no others; the log holds every line that the engine kept, once. *Seconds* are from the fault to that
state, on two cores, with whatever the task still had to do.

This table is made of the tests' `fault` marks, and a test keeps it from drifting. To measure and write it again:
`make faults`.

"""
COLUMNS = ("fault", "how it is injected", "what holds", "seconds", "test")


# --- after a fault ---------------------------------------------------------------------------------------------------


class Aftermath:
    """How long it took from the fault to a clean state, and whether that is one."""

    def __init__(self, seconds: dict[str, float], test: str) -> None:
        self._seconds, self._test = seconds, test
        self._since = time.monotonic()

    @classmethod
    def of(cls, request: pytest.FixtureRequest) -> Aftermath:
        """Of the test that asks."""
        node = request.node
        assert node.get_closest_marker("fault"), "the fault has no row in the table"
        of_function = any(mark.name == "fault" for mark in getattr(node.function, "pytestmark", ()))
        seconds = request.config.stash.setdefault(SECONDS, {})
        return cls(seconds, f"{node.path.stem}.{node.originalname if of_function else node.name}")

    def begins(self) -> None:
        """The fault is there from now on."""
        self._since = time.monotonic()

    def clean(self) -> None:
        """Nothing is left of it now."""
        self._seconds[self._test] = max(self._seconds.get(self._test, 0.0), time.monotonic() - self._since)

    def over(self, cli: Cli, builder: Running, status: int, said: str = "", *, warm: Collection[str] = ()) -> Ended:
        """The builder's end, with this status and these words in a reason, warning or error. warm: labels of the tasks
        that are warm then, and no others.
        """
        ended = builder.end()
        cli.left_nothing()
        self.clean()
        assert ended.status == status, ended.said
        assert said in told(ended), told(ended)
        are_warm(cli, warm)
        return ended


def told(ended: Ended) -> str:
    """Every sentence about what happened, one a line."""
    document = ended.document
    error = document.get("error", {})
    problems = [f"{problem['text']} {problem['remedy']}" for problem in error.get("problems", ())]
    reasons = [f"{task['label']} {task['state']}: {task['reason']}" for task in document["tasks"]]
    return "\n".join([*reasons, *document["warnings"], error.get("message", ""), *problems])


def are_warm(cli: Cli, labels: Collection[str]) -> None:
    """No marker lies: `check` finds these tasks warm, and no others."""
    check = cli.run("check", "--json")
    states = {task["label"]: task["state"] for task in check.document["tasks"]}
    assert {label for label, state in states.items() if state == "warm"} == set(labels), check.said
    assert check.status == (10 if "cold" in states.values() else 0), check.said


def time_passes(seconds: float) -> None:
    """Where the fault is that it does: nothing is awaited."""
    poll(lambda: False, Deadline(seconds), every=seconds)


def changed(*statements: str) -> tuple[str, ...]:
    """The real program, after these statements about modules of it."""
    imports = """import sys, time
from builder.cli import invocation, main as cli
from builder.engine import client as engine, connection, container, log_pump as logs
from builder.run import container_executor"""
    return sys.executable, "-c", "\n".join([imports, *statements, "sys.exit(cli.main())"])


def numbers(log: str, word: str = "line") -> list[int]:
    """Of the lines ``line 0``, ``line 1`` … of a task, in the order of its log."""
    return [int(number) for number in re.findall(rf"^out\| {word} (\d+)$", log, re.MULTILINE)]


# --- an engine of the test's own -------------------------------------------------------------------------------------


class OwnEngine:
    """One that may be killed: in namespaces of its own, beside the engine that all other tests use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.host = ""

    def up(self, *options: str) -> None:
        """Starts dockerd with these options, unless it runs; containers that outlived the last one are there again."""
        self.host = self._do("up", *options).strip().removeprefix("DOCKER_HOST=")

    def kill(self, signal: str = "KILL") -> None:
        """Ends dockerd alone. Its containers go on, as far as this signal and its options let them."""
        self._do("kill", signal)

    def close(self) -> None:
        self._do("down")
        shutil.rmtree(self._directory, ignore_errors=True)

    def keep_log(self, container: str, kept: Path) -> None:
        """What the engine stores of this container's output stays there, also after the container's removal."""
        kept.hardlink_to(self._directory / "data" / "containers" / container / f"{container}-json.log")

    def makes_read_only(self, directory: Path) -> None:
        """For the engine and its containers, and for nobody else."""
        script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
        guardian = (self._directory / "guardian.pid").read_text().strip()
        subprocess.run(["nsenter", "--mount", "--target", guardian, "sh", "-c", script, directory], check=True)

    def load(self, image: str, source: str) -> None:
        """This image, from the engine at source."""
        there, here = Engine(source).connect(), Engine(self.host).connect()
        try:
            here._api.load_image(b"".join(there._api.get_image(image)))
        finally:
            there.close()
            here.close()

    def _do(self, *arguments: str) -> str:
        verb, *rest = arguments
        script = ROOT / "docker" / "stand-in" / "engine" / "engine.sh"
        environ = {name: value for name, value in os.environ.items() if name not in ("CI", "DOCKER_HOST")}
        done = subprocess.run(
            [script, verb, self._directory, *rest], env=environ, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def why_no_own_engine() -> str | None:
    """Why this machine lets tests have none, or None. Nothing is installed for it."""
    if os.getuid():
        return "an engine of its own needs root"
    missing = [tool for tool in ("dockerd", "containerd", "runc", "unshare", "curl") if not shutil.which(tool)]
    if missing:
        return f"an engine of its own needs {', '.join(missing)}"
    namespaces = subprocess.run(["unshare", "--pid", "--net", "--mount", "--fork", "true"], capture_output=True)
    return None if namespaces.returncode == 0 else "an engine of its own needs namespaces that this machine refuses"


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One fault, as its test's mark says it."""

    fault: str
    how: str
    holds: str
    test: str


def rows() -> list[Row]:
    """Of all tests in this folder, in the order of the files and of the tests in them."""
    found = []
    for path in sorted(HERE.glob("test_*.py")):
        module = importlib.import_module(f"tests.engine.{path.stem}")
        for name, value in vars(module).items():
            for mark, test in _marks(name, getattr(value, "pytestmark", ())):
                found.append(Row(mark.args[0], mark.kwargs["how"], mark.kwargs["holds"], f"{path.stem}.{test}"))
    return found


def _marks(name: str, marks: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """The `fault` marks of a test and of its parameters, each with the name of what carries it."""
    for mark in marks:
        if mark.name == "fault":
            yield mark, name
        elif mark.name == "parametrize":
            for case in mark.args[1]:
                yield from _marks(f"{name}[{getattr(case, 'id', None)}]", getattr(case, "marks", ()))


def table(found: list[Row], seconds: Mapping[str, float], old: Mapping[str, str]) -> str:
    """README.md; old: the seconds of tests that this run has not measured."""
    lines = [HEAD, line(COLUMNS), line(["---"] * len(COLUMNS))]
    for row in found:
        known = f"{math.ceil(seconds[row.test] * 10) / 10:.1f}" if row.test in seconds else old.get(row.test, "–")
        lines.append(line([row.fault, row.how, row.holds, known, f"`{row.test}`"]))
    return "".join([*lines, "\n", attacks.section(attacks.attacks())])


def written() -> list[list[str]]:
    """The table's rows as README.md has them, cell by cell."""
    return attacks.cells(TABLE.read_text(encoding="utf-8").partition(attacks.HEADING)[0])


def write(seconds: Mapping[str, float]) -> None:
    """README.md as the tests are now, with what this run measured."""
    old = {row[4].strip("`"): row[3] for row in written()} if TABLE.exists() else {}
    TABLE.write_text(table(rows(), seconds, old), encoding="utf-8")
