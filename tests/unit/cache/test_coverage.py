"""Coverage: what a task covers, one spelling of an argv, and how two values are shown next to each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from builder.cache import coverage, model_store
from builder.cache.toolchain import Record
from builder.task import Shape
from tests.unit.cache.test_markers import CONFIG, TASK, record


def test_coverage_keeps_argv_of_command() -> None:
    command = dataclasses.replace(TASK, recipe="command", argv=("b", "--x=1", "--a"))
    assert coverage.coverage(command, record=record(), config_digest=None)["argv"] == ["b", "--x=1", "--a"]


def test_coverage_holds_settings_of_its_recipe_only() -> None:
    def digest(recipe: str, **change: Any) -> str:
        task = dataclasses.replace(TASK, recipe=recipe, **change)
        return coverage.coverage_digest(coverage.coverage(task, record=record(), config_digest=CONFIG))

    shape, other = Shape("GEMM", 1, 2), Shape("GEMM", 1, 3)
    assert digest("shapes", shapes=(shape,)) != digest("shapes", shapes=(shape, other))
    assert digest("shapes", shapes=(other, shape)) == digest("shapes", shapes=(shape, other))
    assert digest("serve", shapes=(shape,)) == digest("serve")
    assert digest("serve", requests=((1, 1),)) != digest("serve")
    assert digest("command", success="x") != digest("command")
    assert digest("serve", success="x") == digest("serve")


@pytest.mark.parametrize("model", ["/opt/model", "/proc/self/mem", "/", ".", "../../x", "./x"])
def test_coverage_of_model_in_image_names_the_image(tmp_path: Path, model: str) -> None:
    assert model_store.config_digest(tmp_path, model, None) == (None, None)
    task = dataclasses.replace(TASK, model=model)

    def config(made: Record) -> Any:
        return coverage.coverage(task, record=made, config_digest=None)["config.json"]

    assert config(record(image="a")) == config(record(image="a")) != config(record(image="b"))


def test_long_values_are_cut_around_their_difference() -> None:
    was, now = coverage.brief("x" * 500 + "8" + "y" * 500, "x" * 500 + "4" + "y" * 500)
    assert len(was) == len(now) == 102
    assert "x8y" in was
    assert "x4y" in now
    assert was.startswith("…")
    assert was.endswith("…")
    assert coverage.brief("a\nb\nc", "a\nB\nc") == ("b", "B")
    # Only lines added: nothing of the old value differs, so all of it is shown.
    assert coverage.brief("a", "a\nb") == ("a", "b")
