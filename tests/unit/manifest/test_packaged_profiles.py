"""The packaged profiles are what the recorded launches of upstream's tests give, and cover every one of them."""

from __future__ import annotations

import itertools

import pytest

from builder.manifest import from_tests, recorded_tasks, rewrite
from builder.manifest.load import load
from builder.task import RECIPES
from tests import profiles

NAMES = tuple(profiles.SUITES)


@pytest.mark.parametrize("name", NAMES)
def test_profile_covers_every_launch_and_holds_no_other_task(name: str) -> None:
    launches, source = profiles.recorded(name)
    covered, others = recorded_tasks.warmable(launches, source.gpu)
    compared, unneeded = from_tests.compare(covered, load(profile=name).tasks)
    assert [each for each in compared if not each.covered] == []
    assert unneeded == []
    assert {launch.argv.count("--encoder-only") + launch.argv.count("--language-only") for launch, _ in others} <= {1}


@pytest.mark.parametrize("name", NAMES)
def test_profile_is_what_import_tests_writes(name: str) -> None:
    launches, source = profiles.recorded(name)
    text = profiles.profile_path(name).read_text()
    manifest = load(profile=name)
    covered, _ = recorded_tasks.warmable(launches, source.gpu)
    added = recorded_tasks.as_tasks(covered, manifest.gpus.count, source.gpu)
    note = recorded_tasks.note(launches, source)
    again = rewrite.replace_tasks(recorded_tasks.without_note(text), lambda _number: False, [note, *added])
    assert again == text


@pytest.mark.parametrize("name", NAMES)
def test_profile_names_commit_and_suite(name: str) -> None:
    _, source = profiles.recorded(name)
    assert source.suite == profiles.SUITES[name]
    text = " ".join(profiles.profile_path(name).read_text().replace("\n# ", " ").split())
    assert f"Recorded from sglang {source.commit[:12]}, suite {source.suite}, GPU {source.gpu}: " in text


def test_h100_profile_begins_with_every_deepep_launch() -> None:
    tasks = load(profile="h100-4").tasks
    deepep = [task for task in tasks if "deepep" in task.argv and task.model == "lmsys/sglang-ci-dsv3-test"]
    assert len(deepep) == 7
    assert {task.recipe for task in deepep} == {"compile-deep-gemm"}
    recipes = [recipe for recipe, _ in itertools.groupby(task.recipe for task in tasks)]
    assert recipes == ["compile-deep-gemm", "serve"]


@pytest.mark.parametrize("name", NAMES)
def test_profile_recipes_start_a_server(name: str) -> None:
    assert all(RECIPES[task.recipe].server for task in load(profile=name).tasks)


@pytest.mark.parametrize("name", NAMES)
def test_page_states_what_profile_covers(name: str) -> None:
    launches, source = profiles.recorded(name)
    covered, _ = recorded_tasks.warmable(launches, source.gpu)
    row = f"| `{name}` | {source.suite.replace(',', ', ')} | {len(covered)} of {len(launches)}"
    assert row in (profiles.ROOT / "builder" / "docs" / "recipes.md").read_text()
    assert f"`{name}` ({len(covered)} of {len(launches)}" in (profiles.ROOT / "CHANGELOG.md").read_text()
