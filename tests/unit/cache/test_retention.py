"""Retention: what files that are no markers change in the decision of what to remove."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from builder.cache import blocked, layout, memos, removal, retention, toolchain, usage
from builder.job import PrunePolicy
from builder.task import ServingImage
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


def test_decide_lets_images_of_before_go_though_their_toolchain_stays(tmp_path: Path) -> None:
    """A nightly image that changes no kernel has the toolchain of the one before, and is as large."""
    made = Generations(tmp_path)
    record = made.warmed(9, ["a"], days=1)
    for number in range(1, 6):
        memos.write_memo(tmp_path, ServingImage(image(number)), record, env={})
        made.age(memos.memo_path(tmp_path, image(number)), 10 - number)
    policy = PrunePolicy(keep=1, image=image(9), keys=(toolchain.family_keys(record),))

    def gone(policy: PrunePolicy) -> list[int]:
        plan = retention.plan(tmp_path, policy, job_max=0.0, now=time.time())
        assert {step.kind for step in plan.steps} == {"memo"}
        return [number for number in (*range(1, 6), 9) if image(number) in plan.images]

    assert gone(policy) == [1, 2, 3, 4, 5]
    assert gone(replace(policy, keep=3)) == [1, 2, 3]
    assert gone(replace(policy, pins=(image(2),))) == [1, 3, 4, 5]


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


# --- jobs that keep a removal waiting ---

HOUR = 3600.0


def superseded(root: Path) -> tuple[Generations, PrunePolicy]:
    """Return a root whose first toolchain is removed, if no job keeps it."""
    layout.prepare(root)
    made = Generations(root)
    made.warmed(1, ["a"], days=50)
    made.warmed(2, ["a"], days=40)
    return made, PrunePolicy(image=image(2), keys=(toolchain.family_keys(made.made[2]),), keep=1)


def plan_at(root: Path, policy: PrunePolicy, now: float) -> retention.PrunePlan:
    """Return the plan at a time at which a job touches everything, and record what waits, as a prune does."""
    for path in root.glob("*/*"):
        if path.is_dir() and path.parent.name in ("triton", "deep_gemm", "inductor"):
            os.utime(path, (now, now))
    plan = retention.plan(root, policy, job_max=HOUR, now=now)
    blocked.write(root, plan.waits.still(plan.refused))
    return plan


def test_plan_touched_for_ever_waits_for_job_max_in_all(tmp_path: Path) -> None:
    made, policy = superseded(tmp_path)
    now = time.time()
    for seconds in (0.0, HOUR / 2, HOUR - 1):
        plan = plan_at(tmp_path, policy, now + seconds)
        assert f"deep_gemm/{made.key(1)}" in plan.refused
        assert plan.waits.seconds(plan.refused) == pytest.approx(seconds)
    plan = plan_at(tmp_path, policy, now + HOUR + 1)
    assert not plan.refused
    assert made.key(1) in {step.key for step in plan.steps}


def test_plan_held_for_ever_waits_for_job_max_in_all(tmp_path: Path) -> None:
    made, policy = superseded(tmp_path)
    now, gone = time.time() + 2 * HOUR, made.key(1)
    with layout.hold_lock(tmp_path).open("rb") as hold:
        fcntl.flock(hold, fcntl.LOCK_SH)
        first = retention.plan(tmp_path, policy, job_max=HOUR, now=now)
        assert all(step.stays for step in first.steps) and blocked.HOLD in first.refused
        assert any(removal.HELD in text for text in first.left)
        blocked.write(tmp_path, first.waits.still(first.refused))
        late = retention.plan(tmp_path, policy, job_max=HOUR, now=now + HOUR)
        assert gone in {step.key for step in late.steps} and not any(step.stays for step in late.steps)
        assert any("is removed all the same" in text for text in late.left)
    after = retention.plan(tmp_path, policy, job_max=HOUR, now=now + HOUR)
    blocked.write(tmp_path, after.waits.still(after.refused))
    assert blocked.read(tmp_path, now=now, job_max=HOUR).since == {}, "the next hold has the whole time again"


def test_plan_without_access_times_removes_nothing_for_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, policy = superseded(tmp_path)
    made.warmed(3, ["b"], days=90)
    wanted = replace(policy, keep=9, older_than=HOUR)
    assert any(step.kind == "marker" for step in retention.plan(tmp_path, wanted, job_max=HOUR, now=time.time()).steps)
    monkeypatch.setattr(usage, "has_access_times", lambda root: False)
    plan = retention.plan(tmp_path, wanted, job_max=HOUR, now=time.time())
    assert not any(step.kind == "marker" for step in plan.steps)
    assert retention.NO_ACCESS_TIMES in plan.left


@pytest.mark.parametrize("text", ["", "[]", "{", '{"hold": "x"}', '{"hold": -1}', '{"hold": NaN}', "[" * 9999])
def test_blocked_record_that_is_damaged_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "blocked.json").write_text(text)
    assert blocked.read(tmp_path, now=9.0, job_max=1.0).since == {}
