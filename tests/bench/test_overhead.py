"""What a task costs beyond its own work: one that does nothing, against a bare docker run of the same command."""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from builder.cli import main
from builder.engine import images, log_pump
from builder.engine.client import Engine
from builder.events import Event
from tests.bench.measuring import CLI, environment, in_turn, milliseconds, quietly, show, write_down

pytestmark = [pytest.mark.bench, pytest.mark.engine, pytest.mark.timeout(900)]

ROUNDS = 9
COMMAND = ["sh", "-c", "echo READY"]
TASKS = 4

#: Inside the warm-up image: the in-container program's modules, and what the toolchain looks like to it.
INSIDE = """
import json, os, time
begun = time.perf_counter()
import builder.agent.__main__
loaded = time.perf_counter()
from builder.agent import probe
from builder.task import ServingImage
probe.probe(environ=dict(os.environ), mount="/jit", image=ServingImage("sha256:0"))
print(json.dumps([loaded - begun, time.perf_counter() - loaded]))
"""


def manifest(place: Path, ref: str, tasks: int = 1) -> Path:
    """Tasks that claim nothing and say one word."""
    path = place / f"manifest-{tasks}.toml"
    text = (
        f'schema = 1\n[image]\nref = "{ref}"\n[cache]\nroot = "{place}/cache"\n[gpus]\ncount = 0\n'
        '[container]\nnetwork = "none"\nshm_size = "64m"\n[defaults]\nrecipe = "command"\nfamilies = []\n'
    )
    for number in range(tasks):
        text += f'[[task]]\nmodel = "example/{number}"\nargv = {json.dumps(COMMAND)}\nsuccess = "READY"\n'
    path.write_text(text)
    return path


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.stand_in)])
def ref(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("tiny_image" if request.param == "tiny" else "stand_in_image"))


def test_overhead_of_a_task(tmp_path: Path, engine: Engine, ref: str) -> None:
    env = environment(tmp_path)
    (tmp_path / "cache").mkdir()
    warm = [sys.executable, "-m", "builder", "warm", "--force", "--log-dir", str(tmp_path / "logs")]
    single, several = manifest(tmp_path, ref), manifest(tmp_path, ref, TASKS)
    bare = [CLI, "run", "--rm", "--init", "--network", "none", "--shm-size", "64m"]
    bare += ["--mount", f"type=bind,src={tmp_path}/cache,dst=/jit", ref, *COMMAND]
    found = in_turn(
        ROUNDS,
        {
            "docker run --rm": lambda: _run(bare),
            "warm, one task": lambda: _run([*warm, "--manifest", str(single)], env),
            f"warm, {TASKS} tasks": lambda: _run([*warm, "--manifest", str(several)], env),
        },
    )
    run, one, many = found.values()
    each = (many.median - one.median) / (TASKS - 1)
    one.remark = f"{(one.median - run.median) * 1e3:.0f} ms more than docker run"
    many.remark = f"{each * 1e3:.0f} ms for each further task, {(each - run.median) * 1e3:.0f} ms more than docker run"
    show(f"A task that does nothing, on {ref}", [["", "median", "least", ""], *map(milliseconds, found.values())])
    steps = breakdown(engine, ["warm", "--force", "--manifest", str(single), "--log-dir", str(tmp_path / "logs")])
    steps += inside(engine, ref)
    show(
        "Where it goes (in this process, already loaded)", [["step", "median"], *([n, f"{s:.0f} ms"] for n, s in steps)]
    )
    name = "tiny" if ref == os.environ.get("WARM_CACHE_TEST_IMAGE") else "real"
    write_down(
        f"overhead-{name}",
        engine,
        list(found.values()),
        overhead={"one task": one.median - run.median, "each further task": each - run.median},
        aims={"each": "less than 2 s"},
        steps_ms=dict(steps),
    )


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    quietly(command, env)


def inside(engine: Engine, ref: str) -> list[tuple[str, float]]:
    """Milliseconds of the in-container program's beginning, in containers of their own."""
    serving = engine.image(ref)
    assert serving is not None
    made = images.warmup_image(engine, serving, (), lambda line: None)
    command = [CLI, "run", "--rm", "--init", "--network", "none", "-w", images.PROGRAM_ROOT, "--entrypoint", "python3"]
    rounds = [json.loads(quietly([*command, made.id, "-c", INSIDE])) for _ in range(ROUNDS)]
    load, probe = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
    return [("  of which: loading its modules", load), ("  of which: the toolchain", probe)]


def breakdown(engine: Engine, argv: list[str]) -> list[tuple[str, float]]:
    """Milliseconds from one moment of a run to the next, taken from the calls to the engine and from the events."""
    rounds: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        moments = Moments()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
            moments.watch(patch)
            moments.add("begin")
            assert main.main(argv) == 0
            moments.add("finish")
        for name, start, end in STEPS:
            rounds[name].append((moments.at[end] - moments.at[start]) * 1e3)
    return [(name, statistics.median(values)) for name, values in rounds.items()]


#: Step, and the moments that it lies between.
STEPS = (
    ("connect, image, memo, plan, locks, warm-up image", "begin", "before create"),
    ("create", "before create", "after create"),
    ("attach twice", "after create", "before start"),
    ("start", "before start", "after start"),
    ("until the program's first word", "after start", "event start"),
    ("families, locks, leftovers, first inventory", "event start", "event phase"),
    ("the command, second inventory, marker", "event phase", "event end"),
    ("until the exit is seen", "event end", "before remove"),
    ("remove", "before remove", "after remove"),
    ("its marker judged, table, close", "after remove", "finish"),
)


class Moments:
    """When something happened; the last time, where it happens more than once."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def add(self, name: str) -> None:
        self.at[name] = time.perf_counter()

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("create", "start", "remove"):
            patch.setattr(Engine, name, self._around(name, getattr(Engine, name)))
        take: Callable[..., None] = log_pump.Pump._take_event

        def heard(pump: Any, event: Event, size: int) -> None:
            self.add(f"event {event.wire_name}")
            take(pump, event, size)

        patch.setattr(log_pump.Pump, "_take_event", heard)

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self.add(f"before {name}")
            try:
                return call(*arguments, **options)
            finally:
                self.add(f"after {name}")

        return timed
