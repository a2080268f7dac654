"""Expected run times, from the nearest marker."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.cache import marker_writing
from builder.cache.families import FAMILIES
from builder.cache.marker_format import Observed
from builder.cache.toolchain import Record
from builder.run.forecast import TIME_OUT, Estimate, expected_seconds
from builder.run.plan import make_plan
from builder.task import Task

TASK = Task(label="model", model="org/model", recipe="command", argv=("serve",), families=(), timeout=900.0)


def record(sglang: str = "0.5.23", **factors: str) -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    return {
        "schema": 2,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit", **factors},
        "gpus": [],
        "sglang": {"version": sglang, "commit": "abc", "sources": None},
        "variables": {},
        "observed": {"driver": None, "python": "3.12.3", "problems": []},
    }


def seen(root: Path, task: Task, seconds: Any, made: Record | None = None, written: float = 1.0) -> Path:
    """Write a marker of an earlier run of this many seconds."""
    known: dict[str, Any] = {"claims": [], "entries": {}, "proof": "nothing-claimed", "second_pass_added": None}
    marker = marker_writing.build(
        task, record=made or record(), config_digest=None, shapes=[], observed=Observed(seconds=seconds), **known
    )
    path = root / marker_writing.publish(root, marker)
    os.utime(path, (written, written))
    return path


def expected(root: Path, task: Task = TASK) -> Estimate:
    plan = make_plan((task,), {(): record()}, root=root, store=None)
    return expected_seconds(root, plan.items)[task.label]


def test_seconds_without_markers_are_the_time_out(tmp_path: Path) -> None:
    assert expected(tmp_path) == Estimate(900.0, False, TIME_OUT)


def test_seconds_are_those_of_the_nearest_newest_marker(tmp_path: Path) -> None:
    other = replace(TASK, label="other", model="org/other")
    for name, seconds in (("x", 100.0), ("y", 300.0), ("z", 500.0)):
        seen(tmp_path, replace(other, label=name, model=name), seconds)
    assert expected(tmp_path) == Estimate(300.0, False, "other tasks of the recipe command")
    seen(tmp_path, TASK, 50.0, record(sglang="0.5.22"))
    assert expected(tmp_path) == Estimate(50.0, True, "the same launch, of another version")
    # One marker per set of claimed keys: this task claims a family, so that another toolchain is another file.
    claiming = replace(TASK, families=None)
    assert expected(tmp_path, claiming).seconds == 50.0
    seen(tmp_path, TASK, 40.0, record(triton="another"), written=2.0)
    assert expected(tmp_path) == Estimate(40.0, True, "the same task, under another toolchain")
    seen(tmp_path, TASK, 30.0, written=3.0)
    assert expected(tmp_path) == Estimate(30.0, True, "the same task")


def test_seconds_of_other_tasks_are_capped_by_the_time_out(tmp_path: Path) -> None:
    seen(tmp_path, replace(TASK, label="other", model="org/other"), 5000.0)
    assert expected(tmp_path).seconds == 900.0


@pytest.mark.parametrize("seconds", [None, "60", True, -1, 0, 1e300, {}, [1]])
def test_seconds_that_are_no_number_are_ignored(tmp_path: Path, seconds: object) -> None:
    seen(tmp_path, TASK, seconds)
    assert expected(tmp_path).source == TIME_OUT


def test_unreadable_markers_are_ignored(tmp_path: Path) -> None:
    path = seen(tmp_path, TASK, 60.0)
    marker = json.loads(path.read_text())
    for number, text in enumerate(("", "[" * 100_000, json.dumps({**marker, "observed": 3}), json.dumps([marker]))):
        path.with_name(f"{number}.json").write_text(text)
    (tmp_path / "markers" / "a file").write_text("")
    os.mkfifo(tmp_path / "markers" / "model-0123456789ab")
    assert expected(tmp_path).seconds == 60.0
