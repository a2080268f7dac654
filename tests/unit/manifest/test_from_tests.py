"""Launches against tasks, and tasks out of launches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from builder.manifest import from_tests, neutral, recorded_tasks
from builder.manifest.load import Overrides, load
from builder.recording import Kind, Launch, Unrecorded
from builder.task import Task

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
UNKNOWN = "\ue0f0torch.x()\ue0f1"


def launch(*argv: str, model: str = "org/m", test: str = "TestIt.setUpClass", **env: str) -> Launch:
    return Launch(test, "test/a.py:7", "server", model, argv, tuple(sorted(env.items())))


def task(*argv: str, model: str = "org/m", **env: str) -> Task:
    return Task(label="one", model=model, recipe="serve", argv=argv, env=env)


@pytest.mark.parametrize(
    ("argv", "other"),
    [
        (("--tp", "8"), ("--tensor-parallel-size=8",)),
        (("--mem-frac", "0.85"), ("--mem-fraction-static", "0.85")),
        (("--deepep-config", '{"a": 1}'), ("--deepep-config", '{"a":1}')),
        (("--tp", "8", "--nccl-port", "11300"), ("--tp", "8")),
        (("--mamba-scheduler-strategy=extra_buffer",), ("--mamba-radix-cache-strategy", "extra_buffer")),
        (("--disable-piecewise-cuda-graph", "--tp", "8"), ("--tp", "8", "--cuda-graph-backend-prefill=disabled")),
        (("--tp", "8"), ("--tp", "8", "--reasoning-parser", "glm45", "--enable-metrics", "--watchdog-timeout", "900")),
        (("--dir-of-mine", "TEMPORARY", "--tp", "8"), ("--tp", "8")),
    ],
)
def test_differences_none_when_only_spelling_or_neutral_words_differ(
    argv: tuple[str, ...], other: tuple[str, ...]
) -> None:
    assert from_tests.differences(launch(*argv), task(*other)) == ()


def test_differences_names_flags_and_variables() -> None:
    wanted = launch("--tp", "8", "--page-size", "64", SGLANG_A="1", MC_TCP_ENABLE_CONNECTION_POOL="true")
    assert from_tests.differences(wanted, task("--tp", "4", "--dp", "2", SGLANG_A="false")) == (
        "--dp 2 is not in the test",
        "--page-size 64 is missing",
        "--tp is 4, in the test 8",
        "SGLANG_A is false, in the test 1",
    )


@pytest.mark.parametrize("option", sorted(neutral.OPTIONS))
def test_differences_none_for_neutral_option(option: str) -> None:
    assert from_tests.differences(launch("--tp", "8", option, "1"), task("--tp", "8")) == ()


@pytest.mark.parametrize(
    "unknown",
    [
        launch("--tp", UNKNOWN),
        launch(f"--{UNKNOWN}", "1"),
        launch(model=f"org/{UNKNOWN}"),
        launch(SGLANG_A=UNKNOWN),
        launch(model="None"),
    ],
)
def test_known_names_launch_with_unknown_word(unknown: Launch) -> None:
    found, (problem,) = from_tests.known([unknown, launch()])
    assert found == [launch()]
    assert (problem.state, problem.location, problem.test) == ("not-understood", "test/a.py:7", "TestIt.setUpClass")
    assert "\ue0f0" not in problem.why


def test_known_keeps_launch_with_unknown_neutral_word() -> None:
    assert from_tests.known([launch("--nccl-port", UNKNOWN)])[1] == []


def test_compare_names_tasks_without_launch() -> None:
    other = replace(task(model="org/other"), label="two")
    compared, unneeded = from_tests.compare([launch()], [task(), other])
    assert [each.covered for each in compared] == [True]
    assert unneeded == ["two"]


def stored() -> list[tuple[str, Launch]]:
    """What two suites of upstream's tree of 2026-08-22 launch."""
    document = json.loads((FIXTURES / "launches-8-gpu-h200.json").read_text())
    found = []
    for suite, launches in document.items():
        for each in launches:
            kind: Kind = "pd" if each["kind"] == "pd" else "server"
            env = tuple(sorted(each["env"].items()))
            found.append((suite, Launch(each["test"], "a.py:1", kind, each["model"], tuple(each["argv"]), env)))
    return found


def test_manifest_covers_every_launch_it_was_printed_from(tmp_path: Path) -> None:
    launches = from_tests.distinct(each for _, each in stored())
    path = tmp_path / "printed.toml"
    path.write_text(recorded_tasks.as_manifest(launches, ["test/registered"], "H200"))
    manifest = load(path, overrides=Overrides(image="tiny:1", cache="/data/cache"))
    compared, unneeded = from_tests.compare(launches, manifest.tasks)
    assert [each for each in compared if not each.covered] == []
    assert unneeded == []
    words = [word for each in manifest.tasks for word in each.argv]
    assert not {"--nccl-port", "--disaggregation-bootstrap-port", "--base-gpu-id"} & set(words)


def test_describe_shows_no_marks() -> None:
    problem = Unrecorded("not-understood", "TestIt", "a.py:1", f"depends on {UNKNOWN}")
    assert from_tests.describe(problem) == "not understood: a.py:1 TestIt: depends on torch.x()"
