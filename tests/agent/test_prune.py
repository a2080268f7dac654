"""What may go from a cache root and what does, without an engine: the decision, and the program that carries it out."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from builder import events
from builder.cache import generations, layout, memos, retention, toolchain, usage
from builder.cache.coverage import coverage
from builder.cache.marker_files import folder_name
from builder.cache.retention import PrunePlan
from builder.cache.toolchain import Record
from builder.job import PrunePolicy
from tests.generations import DAY, Generations, image, record, task, unvouched
from tests.program import Program, Result


@pytest.fixture
def made(program: Program) -> Generations:
    return Generations(program.root)


def policy(made: Generations, current: int, tasks: tuple[str, ...] = ("a", "b"), **limits: Any) -> PrunePolicy:
    """With these tasks in the manifest, and the image of this number."""
    known = made.made.get(current) or record(current)
    covered = [coverage(task(name), record=known, config_digest=None) for name in tasks]
    return PrunePolicy(
        image=image(current),
        keys=(toolchain.family_keys(known),),
        folders=tuple(folder_name(name, cover) for name, cover in zip(tasks, covered, strict=True)),
        **limits,
    )


def planned(made: Generations, wanted: PrunePolicy, *, job_max: float = 0.0) -> PrunePlan:
    return retention.plan(made.root, wanted, job_max=job_max, now=time.time())


def pruned(program: Program, wanted: PrunePolicy, *, job_max: float = 0.0) -> Result:
    done = program.run(None, mode="prune", prune=wanted, job_max=job_max)
    assert done.status == 0, done.log
    return done


def digest(root: Path) -> str:
    """Of every name, content and time below it."""
    known = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        known.update(f"{path} {status.st_mode} {status.st_mtime_ns} {status.st_ctime_ns}".encode("utf-8", "replace"))
        known.update(path.read_bytes() if path.is_file() else b"")
    return known.hexdigest()


def test_decide_keeps_newest_toolchains_of_each_task(program: Program, made: Generations) -> None:
    for number, days in ((1, 30), (2, 20), (3, 10), (4, 1)):
        made.warmed(number, ["a", "b"] if number != 2 else ["a"], days=days)
    done = pruned(program, policy(made, 4))
    assert made.markers() == ["a@3", "a@4", "b@3", "b@4"]
    assert not made.place(1).exists()
    assert not made.place(2, "inductor").exists()
    assert made.place(3, "inductor").is_dir()
    assert not (made.root / "deep_gemm" / f"{made.key(1)}.json").exists()
    assert sorted(path.name for path in (made.root / "images").iterdir()) == [
        "hosts.json",
        *(memos.memo_path(made.root, image(number)).name for number in (3, 4)),
    ]
    assert unvouched(made.root) == []
    total = done.all(events.Freed)[0]
    assert total.freed > 0
    assert total.images == (image(1), image(2))
    assert pruned(program, policy(made, 4)).all(events.Pruned) == []


def test_decide_keeps_keys_of_manifest_image(program: Program, made: Generations) -> None:
    """The image of number 9 was never warmed: its kernels and its markers are those of number 1."""
    made.warmed(1, ["a"], days=99)
    made.warmed(2, ["a"], days=3)
    made.warmed(3, ["a"], days=2)
    same = {name: f"{name} 1" for name in ("deep_gemm_format", "deep_gemm", "deep_gemm_nvcc", "compute_capability")}
    same |= {"sm_count": "sm_count 1", "deep_gemm_path": "deep_gemm_path 1"}
    known: Record = {**record(9, **same), "sglang": made.made[1]["sglang"]}
    made.made[9] = known
    pruned(program, policy(made, 9, ("a",), keep=1, older_than=DAY, max_size=1))
    assert made.markers() == ["a@1"]
    assert unvouched(made.root) == []
    assert made.place(1).is_dir()
    assert not made.place(1, "inductor").exists()  # which is of the old image alone


def test_decide_older_than_removes_unused(program: Program, made: Generations) -> None:
    for number in (1, 2, 3):
        made.warmed(number, ["a"], days=20)
    (used,) = [path for path in made.root.glob("markers/*/*.json") if image(2) in path.read_text()]
    usage.stamp(made.root, str(used.relative_to(made.root)))
    pruned(program, policy(made, 4, older_than=14 * DAY, keep=9))
    assert made.markers() == ["a@2"]


def test_decide_removes_old_unlisted_entries_only(program: Program, made: Generations) -> None:
    made.warmed(1, ["a"], days=20)
    old = made.entry(made.key(1), "cache/other.1", days=20)
    young = made.entry(made.key(1), "cache/other.2", days=0.01)
    done = pruned(program, policy(made, 1, ("a",), older_than=14 * DAY))
    assert not old.exists()
    assert young.is_dir()
    assert made.place(1, "inductor").is_dir()
    assert [(event.kind, event.path) for event in done.all(events.Pruned)] == [
        ("entries", f"deep_gemm/{made.key(1)}/cache/other.1")
    ]
    assert unvouched(made.root) == []


def test_decide_max_size_removes_least_recently_used(program: Program, made: Generations) -> None:
    for number, days in ((1, 30), (2, 20), (3, 10), (4, 1)):
        made.warmed(number, ["a"], days=days, size=100_000)
    loose = made.entry(made.key(4), "cache/loose.1", size=100_000, days=25)
    before = planned(made, policy(made, 4, keep=9)).before
    wanted = policy(made, 4, keep=9, max_size=before - 450_000)
    found = planned(made, wanted)
    assert found.after <= before - 450_000
    done = pruned(program, wanted)
    assert made.markers() == ["a@2", "a@3", "a@4"]
    assert not made.place(1).exists()
    assert not loose.exists()  # used between the first and the second
    assert done.all(events.Freed)[0].after <= before - 450_000
    after = planned(made, wanted)
    assert after.before <= before - 450_000
    assert found.after - 100_000 < after.before <= found.after  # markers and memos are not foretold


def test_decide_max_size_too_small_keeps_needed_and_warns(program: Program, made: Generations) -> None:
    made.warmed(1, ["a", "b"], days=50)
    made.warmed(2, ["a", "b"], days=40)
    done = pruned(program, policy(made, 2, max_size=1))
    assert made.markers() == ["a@2", "b@2"]
    assert "more than the limit of 1 B" in done.all(events.Freed)[0].left[0]


def test_decide_keeps_recently_touched_with_markers(program: Program, made: Generations) -> None:
    """File times can be set back, the time of a change cannot: all of this was made just now."""
    made.warmed(1, ["a"], days=50)
    made.warmed(2, ["a"], days=40)
    done = pruned(program, policy(made, 2, keep=1), job_max=3600.0)
    assert made.markers() == ["a@1", "a@2"]
    assert done.all(events.Pruned) == []
    assert "a job may last 3600 s" in " ".join(done.all(events.Freed)[0].left)


@pytest.mark.parametrize("which", ["hold", "family"])
def test_prune_keeps_locked_families(program: Program, made: Generations, which: str) -> None:
    made.warmed(1, ["a"], days=50)
    made.warmed(2, ["a"], days=40)
    lock = layout.hold_lock(made.root) if which == "hold" else layout.family_lock(made.root, "deep_gemm", made.key(1))
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        done = pruned(program, policy(made, 2, keep=1))
        assert made.markers() == ["a@1", "a@2"]
        assert made.place(1).is_dir()
        assert made.place(1, "inductor").is_dir()
    why = "a test job holds the cache" if which == "hold" else f"a warm-up works in deep_gemm/{made.key(1)}"
    assert why in " ".join(done.all(events.Freed)[0].left)
    pruned(program, policy(made, 2, keep=1))
    assert made.markers() == ["a@2"]
    assert not made.place(1).exists()


def test_prune_dry_run_reports_same_and_changes_nothing(program: Program, made: Generations) -> None:
    for number, days in ((1, 30), (2, 20), (3, 10)):
        made.warmed(number, ["a", "b"], days=days)
    made.entry(made.key(3), "cache/loose.1", days=90)
    (made.root / "theirs").mkdir()
    before = digest(made.root)
    limits: dict[str, Any] = {"keep": 1, "older_than": 14 * DAY}
    dry = pruned(program, policy(made, 3, **limits, dry_run=True))
    assert digest(made.root) == before
    from_outside = planned(made, policy(made, 3, **limits))
    assert digest(made.root) == before
    told = [(event.kind, event.path, event.bytes) for event in dry.all(events.Planned)]
    assert told == [(step.kind, step.name, step.bytes) for step in from_outside.steps]
    done = pruned(program, policy(made, 3, **limits))
    assert [event.path for event in done.all(events.Pruned)] == [path for _, path, _ in told]
    assert (made.root / "theirs").is_dir()


def test_prune_of_garbage_never_raises_and_newer_marker_keeps_kernels(program: Program, made: Generations) -> None:
    made.warmed(1, ["a"], days=50)
    made.warmed(2, ["a"], days=40)
    (made.root / "markers" / "theirs").mkdir()
    (made.root / "markers" / "theirs" / "half.json").write_text("{")
    os.mkfifo(made.root / "markers" / "theirs" / "pipe.json")
    (made.root / "images" / "junk.json").write_text('{"memos": [{"record": 7}, 8], "image": 1}')
    (made.root / "used" / "theirs").mkdir(parents=True)
    (made.root / "deep_gemm" / ("f" * 16)).symlink_to("/etc")
    (made.root / "markers" / "newer").mkdir()
    newer = made.root / "markers" / "newer" / "1.json"
    newer.write_text('{"schema": 3}')
    done = pruned(program, policy(made, 2, keep=1))
    assert made.place(1).is_dir()
    assert "no kernels are removed" in " ".join(done.all(events.Freed)[0].left)
    newer.unlink()
    pruned(program, policy(made, 2, keep=1))
    assert not made.place(1).exists()
    assert (made.root / "markers" / "theirs" / "half.json").exists()


def test_prune_killed_leaves_valid_markers_and_next_finishes(program: Program, made: Generations) -> None:
    for number, days in ((1, 30), (2, 20), (3, 10)):
        made.warmed(number, ["a", "b", "c"], days=days, entries=100)
    wanted = policy(made, 3, ("a", "b", "c"), keep=1)

    def there() -> int:
        return len([*made.root.glob("markers/*"), *made.root.glob("*/*"), *made.root.glob("aside/pruned/*/cache/*")])

    whole = there()
    for kills in range(15):
        running = program.start(None, mode="prune", prune=wanted, job_max=0.0)
        # Further into it each time, from the first marker on.
        while there() == whole and running.process.poll() is None:
            pass
        deadline = time.monotonic() + kills * 0.012
        while time.monotonic() < deadline and running.process.poll() is None:
            pass
        running.process.send_signal(signal.SIGKILL)
        if running.process.wait() == 0:
            break
        assert unvouched(made.root) == []
        whole = there()
    assert kills > 0, "it was never killed on its way"
    pruned(program, wanted)
    assert made.markers() == ["a@3", "b@3", "c@3"]
    assert unvouched(made.root) == []
    assert list((made.root / "aside").glob("pruned/*")) == []
    assert sorted(path.name for path in (made.root / "deep_gemm").iterdir() if path.is_dir()) == [made.key(3)]


def test_decide_ignores_bytes_of_generations(program: Program, made: Generations) -> None:
    for number, days in ((1, 30), (2, 20), (3, 10)):
        made.warmed(number, ["a"], days=days, size=100_000)
    before = planned(made, policy(made, 3)).before
    generations.publish(made.root, check=lambda: None)
    again = planned(made, policy(made, 3, keep=3))
    assert again.before == before  # other names of the same files
    pruned(program, policy(made, 3, keep=2))
    left = planned(made, policy(made, 3, keep=2, max_size=before - 300_000))
    assert left.steps == ()
    assert "are held by generations and views alone" in left.left[0]
    assert made.markers() == ["a@2", "a@3"]
