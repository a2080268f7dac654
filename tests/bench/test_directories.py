"""A cache root with 300,000 empty directories, as a job can leave one: what each step pays for them in CPU seconds."""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.cache import layout, reset
from builder.cache.families import FAMILY
from builder.engine.client import Engine
from tests.bench.measuring import Series, environment, quietly, ratio, show, write_down
from tests.bench.test_check import entry, manifest
from tests.unit.cache.test_one_walk import KEY, STEPS, root_of

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]

DIRECTORIES = 300_000


def seconds(action: Callable[[], object]) -> float:
    """Return the CPU time of an action, and of the processes that it starts and waits for."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    action()
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))


@pytest.mark.engine
def test_many_empty_directories(tmp_path: Path, engine: Engine, tiny_image: str) -> None:
    env, cache = environment(tmp_path), tmp_path / "cache"
    builder = [sys.executable, "-m", "builder"]
    chosen = ["--manifest", str(manifest(tmp_path, tiny_image))]
    quietly([*builder, "warm", *chosen, "--log-dir", str(tmp_path / "logs")], env)
    verbs = ("check", "warm", "env --format json", "verify", "view create one", "prune --dry-run --older-than 14d")
    for half in ("inductor", "triton"):
        root_of(cache, half, DIRECTORIES // 2)
    series = []
    for verb in verbs:
        began = time.perf_counter()
        words = verb.split()
        cpu = seconds(lambda words=words: quietly([*builder, *words, *chosen], env))  # type: ignore[misc]
        series.append(Series(verb, [cpu], f"{time.perf_counter() - began:.1f} s of wall"))
    subprocess.run([*builder, "view", "drop", "one", *chosen], env=env, capture_output=True, check=False)
    for step, action in STEPS.items():
        cpu = sum(seconds(functools.partial(action, cache, FAMILY[name])) for name in ("inductor", "triton"))
        series.append(Series(f"step: {step}", [cpu]))
    show("300,000 empty directories", [["", "CPU", ""], *([s.name, f"{s.least:.2f} s", s.remark] for s in series)])
    write_down("directories", engine, series, aims={"check": "at most 1 s of CPU"})
    assert series[0].least < 1.0


def test_reset_of_3500_entries(tmp_path: Path) -> None:
    """What a job of a long-lived container pays at its start, against copying the same files."""
    source, target = tmp_path / "source", tmp_path / "jit"
    layout.prepare(source)
    place = source / "deep_gemm" / KEY / "cache"
    place.mkdir(parents=True)
    for number in range(3500):
        entry(place / f"sm90_fp8_gemm_1d2d.{number:032x}")
    ways = {
        "cp --archive": lambda: quietly(["cp", "--archive", str(source), str(tmp_path / "copy")]),
        "reset of an empty target": lambda: reset.reset(source, target),
        "reset of an equal one": lambda: reset.reset(source, target),
    }
    series = [Series(name, [seconds(way)]) for name, way in ways.items()]
    for one in series[1:]:
        one.remark = f"{ratio(one, series[0]):.2f} × cp --archive"
    show("3,500 entries, 14,000 files", [["", "CPU", ""], *([s.name, f"{s.least:.2f} s", s.remark] for s in series)])
    write_down("reset", None, series, aims={"seconds": "at most 5"})
    assert max(one.least for one in series) < 5
