"""Coverage: what a task covers, one spelling of an argv, and how two values are shown next to each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.cache import coverage, model_store
from builder.cache.toolchain import Record
from builder.task import Shape
from tests.unit.cache.test_markers import CONFIG, TASK, record


def test_a_commands_argv_is_taken_as_it_is() -> None:
    command = dataclasses.replace(TASK, recipe="command", argv=("b", "--x=1", "--a"))
    assert coverage.coverage(command, record=record(), config_digest=None)["argv"] == ["b", "--x=1", "--a"]


def test_settings_count_only_for_the_recipe_that_reads_them() -> None:
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
    assert digest("unknown") != digest("command")


@pytest.mark.parametrize("model", ["/opt/model", "/proc/self/mem", "/", ".", "../../x", "./x"])
def test_a_model_in_the_image_is_identified_by_the_image(tmp_path: Path, model: str) -> None:
    assert model_store.config_digest(tmp_path, model, None) == (None, None)
    task = dataclasses.replace(TASK, model=model)

    def config(made: Record) -> Any:
        return coverage.coverage(task, record=made, config_digest=None)["config.json"]

    assert config(record(image="a")) == config(record(image="a")) != config(record(image="b"))


@pytest.mark.parametrize(
    ("argv", "normal"),
    [
        ("", ""),
        ("--tp 8 --dp 2", "--dp 2 --tp 8"),
        ("--tp=8 --dp=2", "--dp 2 --tp 8"),
        ("--flag --tp 8", "--flag --tp 8"),
        ("--bs 4 2 1 --a", "--a --bs 4 2 1"),
        ("--x 2 --a --x 1", "--a --x 2 --x 1"),
        ("--x=1 --x=2", "--x 1 --x 2"),
        ("front --b --a", "front --a --b"),
        ("--seed -1 --a", "--a --seed -1"),
        ("--seed=-1 --a", "--a --seed -1"),
        ("--a=--b", "--a=--b"),
        ("--b --a=--c", "--a=--c --b"),
        ("--b -- --a", "--b -- --a"),
        ("-v --a -", "--a - -v"),
        ("--json={\"a\":=1}", "--json {\"a\":=1}"),
        ("--a=", "--a "),
    ],
)  # fmt: skip
def test_normalise_argv(argv: str, normal: str) -> None:
    wanted = normal.split(" ") if normal else []
    assert coverage.normalise_argv(argv.split(" ") if argv else []) == wanted
    assert coverage.normalise_argv(wanted) == wanted


@given(
    options=st.lists(st.tuples(st.sampled_from("abcd"), st.lists(st.sampled_from("123"), max_size=2)), max_size=6),
    data=st.data(),
)
def test_order_means_nothing_but_among_repeats(options: list[tuple[str, list[str]]], data: st.DataObject) -> None:
    first: dict[str, list[list[str]]] = {}
    for name, values in options:
        first.setdefault(name, []).append(values)
    order = data.draw(st.permutations([name for name, _ in options]))
    shuffled = [(name, first[name].pop(0)) for name in order]

    def spell(pairs: list[tuple[str, list[str]]]) -> list[str]:
        return [word for name, values in pairs for word in (f"--{name}", *values)]

    assert coverage.normalise_argv(spell(options)) == coverage.normalise_argv(spell(shuffled))


def test_long_values_are_shown_where_they_differ() -> None:
    was, now = coverage.brief("x" * 500 + "8" + "y" * 500, "x" * 500 + "4" + "y" * 500)
    assert len(was) == len(now) == 102
    assert "x8y" in was
    assert "x4y" in now
    assert was.startswith("…")
    assert was.endswith("…")
    assert coverage.brief("a\nb\nc", "a\nB\nc") == ("b", "B")
    # Only lines added: nothing of the old value differs, so all of it is shown.
    assert coverage.brief("a", "a\nb") == ("a", "b")
