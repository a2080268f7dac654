"""Labels of tasks: readable, safe as file names, different, and the same for every order of the tasks."""

from __future__ import annotations

import random

import pytest

from builder.manifest.labels import labels
from builder.task import Task


@pytest.mark.parametrize(
    ("argv", "label"),
    [
        (["--tp", "8"], "m-tp8"),
        (["--tp=8", "--dp-size", "2"], "m-tp8-dp2"),
        (["--ep-size=8", "--tp-size", "8", "--data-parallel-size=8"], "m-tp8-dp8-ep8"),
        (["--tensor-parallel-size", "4", "--pipeline-parallel-size", "2"], "m-tp4-pp2"),
        (["--tp", "1"], "m"),
        (["--tp"], "m"),
        (["--tp", "x"], "m"),
        (["--tp", "2", "--tp", "4"], "m-tp4"),
    ],
)
def test_label_has_parallelism_above_one(argv: list[str], label: str) -> None:
    assert labels([Task(label="", model="org/m", recipe="serve", argv=tuple(argv))]) == [label]


@pytest.mark.parametrize("model", ["../../etc", "a/..", "/", "ü b/c d", "x" * 300, "a/b\nc"])
def test_label_of_any_model_is_a_safe_file_name(model: str) -> None:
    (label,) = labels([Task(label="", model=model, recipe="serve")])
    assert label
    assert len(label) < 100
    assert not set(label) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert not label.startswith((".", "-"))


def test_labels_of_one_model_differ_by_recipe() -> None:
    both = [Task(label="", model="org/m", recipe=recipe) for recipe in ("serve", "compile-deep-gemm")]
    assert labels(both) == ["m-serve", "m-compile-deep-gemm"]


def test_labels_in_any_order_are_the_same() -> None:
    several = [Task(label="", model="a/m", recipe="serve", env={"A": str(n)}) for n in range(20)]
    several += [Task(label="", model="b/M", recipe="serve"), Task(label="", model="c/other", recipe="serve")]
    named = dict(zip((repr(task) for task in several), labels(several), strict=True))
    assert len({label.lower() for label in named.values()}) == len(several)
    assert named[repr(several[-1])] == "other"
    shuffled = random.Random(1).sample(several, len(several))
    assert dict(zip((repr(task) for task in shuffled), labels(shuffled), strict=True)) == named


def test_label_does_not_depend_on_deadlines() -> None:
    slow, fast = (
        [Task(label="", model="a/m", recipe="serve", revision=revision, timeout=timeout) for revision in ("x", "y")]
        for timeout in (1.0, 2.0)
    )
    assert labels(slow) == labels(fast)
