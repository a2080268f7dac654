"""Expected space of the next warm-up, from markers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from builder.cache import survey
from builder.cache.markers import Judgement
from builder.run import forecast
from builder.run.plan import Item
from tests.generations import Generations, record, task

NEED = 2 * 3 * 1000


@pytest.fixture
def made(tmp_path: Path) -> Generations:
    """Two tasks, warmed in one image; by their markers, three entries of each have 3000 bytes."""
    made = Generations(tmp_path)
    made.warmed(1, ["a", "b"], days=1)
    return made


def item(name: str, number: int) -> Item:
    return Item(task(name), record(number), None, None, Judgement("cold", "no-marker"))


def test_space_under_new_keys_counts_shared_entries_once(made: Generations) -> None:
    found = forecast.expected_space(made.root, [item("a", 2), item("b", 2), item("unknown", 2)])
    assert (found.known, found.of) == (2, 3)
    assert found.bytes == round(NEED * 5 / 6)  # of three entries each, one is the same


def test_space_under_known_keys_is_zero(made: Generations) -> None:
    assert forecast.expected_space(made.root, [item("a", 1), item("b", 1)]).bytes == 0
    shutil.rmtree(made.place(1))
    assert forecast.expected_space(made.root, [item("a", 1)]).bytes == 3000


@pytest.mark.parametrize("wrong", [None, [], *({"deep_gemm": one} for one in ("much", -5, True, 1 << 60))])
def test_space_that_is_no_number_is_ignored(made: Generations, wrong: object) -> None:
    for path in made.root.glob("markers/*/*.json"):
        marker = json.loads(path.read_text())
        marker["observed"] = {"bytes": wrong, "added_bytes": wrong}
        path.write_text(json.dumps(marker))
    assert forecast.expected_space(made.root, [item("a", 2), item("b", 2)]).bytes == 0


def test_small_disk_is_a_problem_with_the_prune_that_helps(made: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(3.1e9)))
    held = survey.survey(made.root).bytes
    monkeypatch.setattr(survey, "survey", lambda _: SimpleNamespace(bytes=held + (100 << 30)))
    (found,) = forecast.space_problems(made.root, None, forecast.Space(int(9.8e9), 1, 1))
    assert found.location == "disk"
    assert found.text == f"{made.root} has 3.1 GB free, and what this warm-up will add took 9.8 GB last time."
    assert found.remedy == "Free space, or run: warm-cache prune --max-size 93G"
    assert list(forecast.space_problems(made.root, None, forecast.Space(int(3e9), 1, 1))) == []


def test_small_max_size_is_a_problem(made: Generations) -> None:
    held = survey.survey(made.root).bytes
    (found,) = forecast.space_problems(made.root, held + 10, forecast.Space(11, 1, 1))
    assert "that [cache] max_size allows" in found.text
    assert list(forecast.space_problems(made.root, held + 11, forecast.Space(11, 1, 1))) == []


def test_target_size_leaves_room_for_cold_tasks(made: Generations) -> None:
    held = survey.survey(made.root).bytes
    cold = [item("a", 2), item("b", 2)]
    assert forecast.target_size(made.root, cold, None) is None
    assert forecast.target_size(made.root, cold, held + 5000) is None
    assert forecast.target_size(made.root, cold, held + 4999) == held - 1
    assert forecast.target_size(made.root, [item("a", 1)], 1) is None  # nothing will come
