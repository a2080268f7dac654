"""What may be removed from a cache root: only what nobody works in, holds, has touched or looks through."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from builder.beneath import Tree
from builder.cache import entries, inventory, layout, removal, usage
from builder.cache.families import FAMILY
from tests.unit.test_beneath import deep

KEY = "0123456789abcdef"
HOUR = 3600.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layout.prepare(tmp_path / "jit")
    (tmp_path / "jit" / "triton" / KEY / "entry").mkdir(parents=True)
    (tmp_path / "jit" / "triton" / KEY / "entry" / "file").write_text("x")
    return tmp_path / "jit"


def refusal(root: Path, *, job_max: float = 6 * HOUR, later: float = 7 * HOUR, mounts: str = "") -> str | None:
    table = root.parent / "mountinfo"
    table.write_text(mounts)
    with removal.may_remove(root, "triton", KEY, job_max=job_max, now=time.time() + later, mounts=table) as found:
        return found


def test_may_remove_untouched_for_job_max(root: Path) -> None:
    assert refusal(root) is None
    assert refusal(root, later=5 * HOUR) == "it was touched 18000 s ago, and a job may last 21600 s"
    assert refusal(root, later=0, job_max=0) is None


def test_may_remove_not_when_clock_was_set_back(root: Path) -> None:
    assert refusal(root, later=-HOUR) == "it was touched 0 s ago, and a job may last 21600 s"


def test_quarantine_move_counts_as_touch(root: Path) -> None:
    entry = root / "triton" / KEY / "entry"
    for path in (entry / "file", entry, entry.parent):
        os.utime(path, (1.0, 1.0))
    assert (refusal(root, later=60) or "").startswith("it was touched ")


@pytest.mark.attack(
    "files have times far in the future, so that they always seem to be in use, or to be written to just now",
    by="env",
    holds="a file was never written to after its last change, whose time nobody can choose: it ages like any other",
)
def test_times_of_the_future_age_like_others(root: Path) -> None:
    entry, future = root / "triton" / KEY / "entry", time.time() + 1000 * 24 * HOUR
    for path in (entry / "file", entry):
        os.utime(path, (future, future))
    assert refusal(root) is None
    assert usage.touched((entry / "file").stat(), accessed=True) <= time.time()
    with Tree(root, f"triton/{KEY}") as tree:
        damaged = entries.EntryProblem(entries.ProblemKind.UNFINISHED, "no __grp__ file")
        later = time.time() + inventory.IN_PROGRESS + 1
        assert not inventory.may_be_in_progress(FAMILY["triton"], tree, "entry", damaged, now=later)
    aside = root / "aside" / f"triton-{KEY}"
    aside.mkdir(parents=True)
    entry.rename(aside / f"triton-{KEY}-{'a' * 12}-{'b' * 32}")
    removed = list(removal.clear_quarantine(root, job_max=HOUR, now=time.time() + 2 * HOUR))
    assert [stays for *_, stays in removed] == [None]


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
@pytest.mark.parametrize(
    ("name", "reason"),
    [(f"triton-{KEY}.lock", f"a warm-up works in triton/{KEY}"), ("hold.lock", "a test job holds the cache")],
)
def test_may_remove_not_when_locked(root: Path, name: str, reason: str, kind: int) -> None:
    with (root / "locks" / name).open("w") as lock:
        fcntl.flock(lock, kind)
        assert refusal(root) == reason
    assert refusal(root) is None


def test_may_remove_holds_locks_during_removal(root: Path) -> None:
    with removal.may_remove(root, "triton", KEY, job_max=0, now=time.time()) as found:
        assert found is None
        for path in (layout.hold_lock(root), layout.family_lock(root, "triton", KEY)):
            with path.open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with layout.hold_lock(root).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_may_remove_not_when_lock_cannot_be_opened(root: Path) -> None:
    layout.family_lock(root, "triton", KEY).mkdir()
    assert refusal(root) == f"triton-{KEY}.lock cannot be locked: is no regular file, so it cannot be a lock: remove it"


@pytest.mark.parametrize(
    ("lower", "seen"),
    [
        ("{root}", True),
        ("{root}/triton/" + KEY, True),
        ("{root}/triton/" + KEY + "/entry", True),
        ("/elsewhere:{root}/triton", True),
        ("{root}/triton/0000", False),
        ("{root}2", False),
        ("jit/triton", False),
    ],
)
def test_may_remove_not_below_a_view(root: Path, lower: str, seen: bool) -> None:
    lower = lower.format(root=root)
    mounts = (
        "21 1 0:19 / / rw - overlay overlay rw,lowerdir=l/ABC:l/DEF,upperdir=/u,workdir=/w\n"
        "garbage\n"
        f"22 1 0:20 / /a\\040view rw,relatime - overlay overlay rw,lowerdir={lower},upperdir=/u,workdir=/w\n"
    )
    assert refusal(root, mounts=mounts) == ("the view at /a view has it below" if seen else None)


def test_may_remove_not_when_unjudgeable(root: Path) -> None:
    with removal.may_remove(root, "triton", "f" * 16, job_max=0, now=time.time()) as found:
        assert found == "it is not known when it was last touched"


def moved_aside(root: Path) -> Path:
    """What a sweep made of a broken entry."""
    entry = root / "deep_gemm" / KEY / "cache" / f"kernel.{'0' * 32}"
    entry.mkdir(parents=True)
    (entry / "kernel.cu").write_text("half")
    aside = layout.quarantine(root, "deep_gemm", KEY).path
    assert inventory.sweep(FAMILY["deep_gemm"], root / "deep_gemm" / KEY, aside, now=time.time(), older_than=600)
    (found,) = aside.iterdir()
    return found


def cleared(root: Path, *, job_max: float = HOUR, later: float = 2 * HOUR) -> list[tuple[str, str, str, str | None]]:
    return list(removal.clear_quarantine(root, job_max=job_max, now=time.time() + later))


def test_clear_quarantine_removes_old_things(root: Path) -> None:
    moved = moved_aside(root)
    assert cleared(root, later=0.5 * HOUR) == []
    assert moved.is_dir()
    name = str(moved.relative_to(root))
    with layout.hold_lock(root).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert cleared(root) == [("deep_gemm", KEY, name, "a test job holds the cache")]
    assert moved.is_dir()
    assert cleared(root) == [("deep_gemm", KEY, name, None)]
    assert not moved.exists()
    assert cleared(root) == []


def test_clear_quarantine_keeps_foreign_things(root: Path, tmp_path: Path) -> None:
    moved = moved_aside(root)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    foreign = [root / "aside" / "mine", moved.parent / "notes.txt", root / "aside" / f"deep_gemm-{'0' * 16}"]
    foreign[0].mkdir()
    foreign[1].write_text("mine")
    foreign[2].symlink_to(moved.parent)
    link = moved.with_name(f"deep_gemm-{KEY}-{'1' * 12}-{'2' * 32}")
    link.symlink_to(outside)
    other = moved.with_name(f"triton-{KEY}-{'1' * 12}-{'2' * 32}")
    other.mkdir()
    assert {path.rpartition("/")[2] for _, _, path, stays in cleared(root) if stays is None} == {moved.name, link.name}
    assert all(os.path.lexists(path) for path in (*foreign, other))
    assert (outside / "file").read_text() == "mine"


@pytest.mark.attack(
    "a tree of 5,000 directories, one in the other, lies in quarantine or among what prune deletes",
    by="env",
    holds="it is deleted like any other",
)
def test_clear_quarantine_removes_tree_of_any_depth(root: Path) -> None:
    found = moved_aside(root)
    deep(found, 5000)
    ((_, _, _, stays),) = cleared(root)
    assert stays is None
    assert not found.exists() and list(found.parent.iterdir()) == []


def test_clear_quarantine_finishes_what_a_killed_removal_left(root: Path) -> None:
    found = moved_aside(root)
    left = found.with_name(f".{'0' * 16}.tmp")
    found.rename(left)
    assert [stays for *_, stays in cleared(root)] == [None]
    assert not left.exists()


@pytest.mark.attack(
    "`aside`, or a folder in it, is a link to the markers or to another directory",
    by="env",
    holds="nothing is moved there and nothing behind it is deleted; the move is named as refused",
)
@pytest.mark.parametrize("level", ["aside", f"aside/deep_gemm-{KEY}"])
def test_linked_quarantine_takes_and_loses_nothing(root: Path, level: str) -> None:
    outside = root.parent / "outside"
    kept = outside / f"deep_gemm-{KEY}" / f"deep_gemm-{KEY}-{'0' * 12}-{'0' * 32}"
    kept.mkdir(parents=True)
    (root / level).parent.mkdir(exist_ok=True)
    (root / level).symlink_to(outside if level == "aside" else kept.parent)
    entry = root / "deep_gemm" / KEY / "cache" / f"kernel.{'0' * 32}"
    entry.mkdir(parents=True)
    place = Tree(root, f"deep_gemm/{KEY}")
    aside = layout.quarantine(root, "deep_gemm", KEY)
    (left,) = inventory.sweep(FAMILY["deep_gemm"], place, aside, now=time.time(), older_than=600)
    assert "it is a symbolic link, which is not followed" in str(left)
    assert entry.is_dir()
    assert cleared(root) == [] and kept.is_dir() and len(list(kept.parent.iterdir())) == 1
