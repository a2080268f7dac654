"""Builds of sglang's own JIT, of which its look-up reads the newest hundred of a module."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from builder.beneath import Tree
from builder.cache import inventory, leaves, marker_writing, markers, retention, toolchain
from builder.cache.families import FAMILY, directory
from builder.cache.marker_format import Observed
from builder.job import PrunePolicy
from builder.run import image_checks
from builder.task import Task
from tests.generations import CUBIN, DAY, Generations, image, record

JIT = FAMILY["sglang_jit"]
SCOPE = "cuda_90a/rope/build-1"
HOUR = 3600


class Root:
    """A root with so many builds of one module, each an hour older than the one before it."""

    def __init__(self, root: Path, number: int) -> None:
        self.root = root
        self.record = record(1)
        self.key = toolchain.family_key(self.record, JIT.name)
        self.place = Path(directory(str(root), JIT.name, self.key))
        for each in range(number):
            leaf = self.place / SCOPE / f"deps-{each:03}"
            leaf.mkdir(parents=True)
            for name, content in (("rope.so", CUBIN), ("sgl_deps.json", b"[]")):
                (leaf / name).write_bytes(content)
                os.utime(leaf / name, (time.time() - 900 * HOUR,) * 2)
            os.utime(leaf, (time.time() - each * HOUR,) * 2)

    def listing(self, label: str, numbers: Sequence[int], image_id: str = "") -> Task:
        """A marker of a task that lists these builds."""
        task = Task(label=label, model="org/m", recipe="command", argv=(label,), families=(JIT.name,))
        marker = marker_writing.build(
            task,
            record=self.record,
            config_digest=None,
            claims=[JIT.name],
            entries={JIT.name: [f"{SCOPE}/deps-{number:03}/rope.so" for number in numbers]},
            proof="verified",
            second_pass_added=0,
            shapes=[],
            observed=Observed(image=image_id or None),
        )
        marker_writing.publish(self.root, marker)
        return task

    def judge(self, task: Task) -> str:
        return markers.judge(self.root, task, record=self.record, config_digest=None).reason

    def newest_first(self) -> list[int]:
        found = sorted((self.place / SCOPE).iterdir(), key=lambda leaf: leaf.stat().st_mtime_ns, reverse=True)
        return [int(leaf.name[-3:]) for leaf in found]


def test_judge_cold_when_listed_build_is_not_among_the_newest_hundred(tmp_path: Path) -> None:
    root = Root(tmp_path, 103)
    inside, outside = root.listing("inside", [0, 99]), root.listing("outside", [5, 102])
    assert root.judge(inside) == ""
    told = f"stale: {SCOPE}/deps-102 is number 103 of its module's builds, and sglang looks at the 100 newest"
    assert root.judge(outside) == told
    root.listing("other", [101])
    assert [int(name[-3:]) for name in leaves.refresh(tmp_path)] == [102, 101, 99, 5, 0], "their order stays"
    assert root.newest_first()[:6] == [0, 5, 99, 101, 102, 1]
    assert root.judge(outside) == root.judge(inside) == "" and leaves.refresh(tmp_path) == []


def test_sweep_quarantines_what_is_never_looked_at(tmp_path: Path) -> None:
    root = Root(tmp_path / "root", 102)
    moved = inventory.sweep(JIT, Tree(root.place), Tree(tmp_path / "aside"), now=time.time() + HOUR, older_than=600.0)
    assert {(each.name, each.why) for each in moved} == {
        (f"{SCOPE}/deps-{number}", "never looked at: its module has 100 newer builds") for number in (100, 101)
    }
    assert len(root.newest_first()) == 100


@pytest.mark.parametrize("pinned", [False, True])
def test_decide_keeps_builds_below_a_hundred_and_the_listed_ones(tmp_path: Path, pinned: bool) -> None:
    """The old build of a release branch stays as long as its image is pinned; the rest goes by its last use."""
    made = Generations(tmp_path)
    root = Root(tmp_path, 130)
    for number, leaf in enumerate(sorted((root.place / SCOPE).iterdir())):
        for path in (*leaf.iterdir(), leaf):
            os.utime(path, (time.time() - (10 + number) * HOUR,) * 2)
    root.listing("main", [0, 101])
    before = set(tmp_path.rglob("*.json"))
    root.listing("release", [129], image(7))
    for path in {*tmp_path.rglob("*.json"), *(tmp_path / "used").rglob("*")} - before:
        made.age(path, 30)
    pins = (image(7),) if pinned else ()
    policy = PrunePolicy(image=image(1), keys=(toolchain.family_keys(root.record),), older_than=20 * DAY, pins=pins)
    plan = retention.plan(tmp_path, policy, job_max=0.0, now=time.time() + 1)
    gone = {int(name[-3:]) for step in plan.steps if step.kind == "entries" for name in step.names}
    assert gone == ({*range(97, 129)} - {101} if pinned else {*range(98, 130)} - {101}) and len(gone) == 31


@pytest.mark.parametrize(("keep", "warns"), [("1", True), ("2", True), ("3", False), ("x", False), ("", False)])
def test_keep_of_sglang_is_named_where_it_removes_what_markers_list(tmp_path: Path, keep: str, warns: bool) -> None:
    root = Root(tmp_path, 5)
    task = root.listing("release", [3])
    root.listing("main", [0])
    of_task = image_checks.keep_warnings([replace(task, env={image_checks.KEEP: keep})], {}, tmp_path)
    of_image = image_checks.keep_warnings([task], {image_checks.KEEP: keep}, tmp_path)
    assert bool(of_task) == bool(of_image) == warns
    if warns:
        assert of_task[0].startswith(f"SGLANG_JIT_CACHE_KEEP={keep} (task release): ")
        assert "markers list 2 of cuda_90a/rope" in of_image[0]
    assert image_checks.keep_warnings([task], {}, tmp_path) == []


def test_hit_is_a_use_of_the_build_and_nothing_else_is(tmp_path: Path) -> None:
    root = Root(tmp_path, 3)
    before = inventory.scan(JIT, root.place)
    os.utime(root.place / SCOPE / "deps-001")
    after = inventory.scan(JIT, root.place)
    assert {name.split("/")[3] for name in inventory.used(before, after)} == {"deps-001"}
    assert inventory.recompiled(before, after) == inventory.added(before, after) == set()
