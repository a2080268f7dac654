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

from builder.cache.families import FAMILY
from builder.engine.client import Engine
from tests.bench.measuring import Series, environment, quietly, show, write_down
from tests.bench.test_check import manifest
from tests.unit.cache.test_one_walk import STEPS, root_of

pytestmark = [pytest.mark.bench, pytest.mark.engine, pytest.mark.timeout(900)]

DIRECTORIES = 300_000


def seconds(action: Callable[[], object]) -> float:
    """Return the CPU time of an action, and of the processes that it starts and waits for."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    action()
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))


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
