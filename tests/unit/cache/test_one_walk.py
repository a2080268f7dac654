"""A step lists each directory of a cache root once, also one that holds nothing: a job can leave 300,000 of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.beneath import Tree
from builder.cache import generations, inventory, layout, survey
from builder.cache.families import FAMILY, Family

KEY = "0123456789abcdef"
DIRECTORIES = 40


def swept(root: Path, family: Family, *, job_max: float | None) -> None:
    tree, aside = Tree(root, f"{family.name}/{KEY}"), layout.quarantine(root, family.name, KEY)
    inventory.sweep(family, tree, aside, now=time.time(), older_than=600.0, job_max=job_max)


STEPS: dict[str, Callable[[Path, Family], object]] = {
    "scan": lambda root, family: inventory.scan(family, Tree(root, f"{family.name}/{KEY}")),
    "sweep before a task": lambda root, family: swept(root, family, job_max=None),
    "sweep": lambda root, family: swept(root, family, job_max=3600.0),
    "verify": lambda root, _: [inventory.bad_entries(each, now=0.0) for each in layout.family_directories(root)],
    "status": lambda root, _: list(inventory.contents(root)),
    "survey": lambda root, _: survey.survey(root),
    "metrics": lambda root, _: list(survey.samples(root)),
    "generation": lambda root, _: generations.publish(root, check=lambda: None),
}


def root_of(place: Path, family: str, directories: int) -> Path:
    """Return a cache root with so many empty directories in one family, two levels deep where it has levels."""
    layout.prepare(place)
    for number in range(directories):
        above = str(number // 1000) if FAMILY[family].layout == "files" else ""
        (place / family / KEY / above / f"empty.{number}").mkdir(parents=True)
    return place


@pytest.mark.parametrize("family", ["inductor", "sglang_jit", "triton"])
@pytest.mark.parametrize("step", STEPS)
def test_each_directory_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, family: str) -> None:
    root = root_of(tmp_path / "cache", family, DIRECTORIES)
    listed: list[str] = []
    scandir = Tree._listed

    def counted(tree: Tree, name: str, most: int) -> object:
        listed.append(f"{tree.path}/{name}")
        return scandir(tree, name, most)

    monkeypatch.setattr(Tree, "_listed", counted)
    STEPS[step](root, FAMILY[family])
    mine = [name for name in listed if "/empty." in name]
    assert len(mine) == len(set(mine)) <= DIRECTORIES


def test_tree_that_reads_once_sees_all_of_a_directory_that_was_seen_in_part(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    tree = Tree(tmp_path).read_once()
    assert len(tree.some("", 2) or ()) == 2
    assert [item.last for item in tree.listing() or ()] == ["a", "b", "c"]
    (tmp_path / "d").touch()
    assert len(tree.listing() or ()) == 3
    assert len(tree.some("", 2) or ()) == 2
    assert tree.listing("nothing") == []
