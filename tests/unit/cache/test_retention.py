"""Retention: what files that are no markers change in the decision of what to remove."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from builder.cache import retention, toolchain
from builder.job import PrunePolicy
from tests.generations import DAY, Generations, image

NEWER = "a newer builder's marker is here, and what it needs is unknown: no kernels are removed"


def planned(root: Path, document: str) -> tuple[bool, bool]:
    """Whether the kernels of a dropped toolchain are removed, and whether a newer marker is named as the obstacle."""
    made = Generations(root)
    made.warmed(1, ["a"], days=50)
    made.warmed(2, ["a"], days=40)
    (root / "markers" / "theirs").mkdir()
    (root / "markers" / "theirs" / "1.json").write_text(document)
    policy = PrunePolicy(image=image(2), keys=(toolchain.family_keys(made.made[2]),), keep=1)
    plan = retention.plan(root, policy, job_max=0.0, now=time.time())
    removed = {step.key for step in plan.steps if step.kind == "family"}
    return made.key(1) in removed, NEWER in plan.left


@pytest.mark.parametrize(
    "document",
    ["{}", *(f'{{"schema": {schema}}}' for schema in ("0", "-1", "null", "true", "false", "1.5", "2.0", '"2"', "[2]"))],
)
def test_plan_with_junk_for_marker_removes_kernels(tmp_path: Path, document: str) -> None:
    assert planned(tmp_path, document) == (True, False)


@pytest.mark.parametrize("schema", [3, 99])
def test_plan_with_marker_of_newer_schema_keeps_kernels(tmp_path: Path, schema: int) -> None:
    assert planned(tmp_path, f'{{"schema": {schema}}}') == (False, True)


def test_decide_keeps_what_a_pinned_image_needs(tmp_path: Path) -> None:
    """Main and a release branch on one root: the branch's image is not the manifest's, and its kernels stay."""
    made = Generations(tmp_path)
    for number, days in ((1, 30), (2, 20), (3, 1)):
        made.warmed(number, ["a"], days=days)
    policy = PrunePolicy(keep=1, older_than=5 * DAY, image=image(3), keys=(toolchain.family_keys(made.made[3]),))

    def gone(policy: PrunePolicy) -> set[str]:
        steps = retention.plan(tmp_path, policy, job_max=0.0, now=time.time()).steps
        return {key for key in (made.key(number) for number in (1, 2, 3)) if any(step.key == key for step in steps)}

    assert gone(policy) == {made.key(1), made.key(2)}
    assert gone(replace(policy, pins=(image(1),))) == {made.key(2)}
    assert gone(replace(policy, pins=(image(9),))) == {made.key(1), made.key(2)}
