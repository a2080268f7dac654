"""A cache root of many toolchains: what its size costs those who ask about one, and those who go through all."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest

from builder.engine.client import Engine
from tests.bench.measuring import Series, Way, environment, in_turn, milliseconds, quietly, ratio, show, write_down
from tests.bench.test_check import MODELS, grow, manifest
from tests.generations import Generations

pytestmark = [pytest.mark.bench, pytest.mark.engine, pytest.mark.timeout(900)]

ROUNDS = 5
#: Toolchains, tasks of each, entries of each marker, files of an entry: with the manifest's own, about 20 toolchains,
#: 500 markers and 200,000 files.
OTHERS, TASKS, ENTRIES, FILES = 19, 26, 93, 4


def _run(command: list[str], env: dict[str, str]) -> None:
    quietly(command, env)


def rounds(chosen: list[str], env: dict[str, str], verbs: dict[str, list[str]]) -> dict[str, Series]:
    ways: dict[str, Way] = {
        name: functools.partial(_run, [sys.executable, "-m", "builder", *verb, *chosen], env)
        for name, verb in verbs.items()
    }
    return in_turn(ROUNDS, ways)


def test_scale_many_toolchains(tmp_path: Path, engine: Engine, tiny_image: str) -> None:
    env = environment(tmp_path)
    chosen = ["--manifest", str(manifest(tmp_path, tiny_image))]
    quietly([sys.executable, "-m", "builder", "warm", *chosen, "--log-dir", str(tmp_path / "logs")], env)
    own = grow(tmp_path / "cache")
    verbs = {
        "check": ["check"],
        "env": ["env", "--format", "json"],
        "status": ["status"],
        "prune --dry-run": ["prune", "--dry-run", "--max-size", "1g", "--older-than", "14d"],
    }
    alone = rounds(chosen, env, verbs)
    made = Generations(tmp_path / "cache")
    for number in range(1, OTHERS + 1):
        made.warmed(number, [f"t{at}" for at in range(TASKS)], days=number, entries=ENTRIES)
    files = own * FILES + OTHERS * (TASKS * ENTRIES + 1) * FILES
    markers = len(MODELS) + OTHERS * TASKS
    among = rounds(chosen, env, verbs)
    document = json.loads(quietly([sys.executable, "-m", "builder", "check", *chosen, "--json"], env))
    assert [task["state"] for task in document["tasks"]] == ["warm"] * len(MODELS)
    series = []
    for name, one in among.items():
        one.name = f"{name}: {OTHERS + 1} toolchains, {markers} markers, {files} files"
        one.remark = f"{ratio(one, alone[name]):.2f} × of the manifest's own {own * FILES} files alone"
        alone[name].name = f"{name}: 1 toolchain, {len(MODELS)} markers, {own * FILES} files"
        series += [alone[name], one]
    show("Many toolchains", [["", "median", "least", ""], *map(milliseconds, series)])
    times = {name: ratio(among[name], alone[name]) for name in among}
    write_down("scale", engine, series, ratios=times, aims={"check": "at most 1 s, and as fast as alone"})
    assert among["check"].least < 1.0
    assert among["check"].least < 1.5 * alone["check"].least
