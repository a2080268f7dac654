"""Which containers and lease directories a sweep removes: only those whose owner is proven dead.

The locks are real, the engine is the fake. A dead owner is a lease that was released and whose file was kept.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from builder.engine.api import ContainerSpec
from builder.engine.lease import LABEL_DEADLINE, LABEL_LEASE, Lease, private_directory
from builder.engine.sweep import OTHERS_AGE, SAVED_ENTRIES, kept_for_others, save_log, sweep
from builder.errors import EngineLostError
from builder.host.hooks import PENDING_RELEASE, Hooks, record_pending_release
from tests.fakes import FakeEngine
from tests.scripts import HANG, command, err, leave, out


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def dead_owners_labels(state: Path, *, lifetime: float = 3600) -> dict[str, str]:
    """The labels of a builder that left its lease file behind, unlocked."""
    with Lease(state, run_id="dead") as lease:
        lease.keep = True
        return lease.labels("task", lifetime)


def container(engine: FakeEngine, labels: dict[str, str], *, start: bool = False, name: str = "") -> str:
    spec = ContainerSpec(image="tiny:1", name=name or os.urandom(4).hex(), command=command(HANG), labels=labels)
    made = engine.create(spec)
    if start:
        engine.start(made)
    return made


def test_sweep_living_owners_containers_are_not_mentioned(tmp_path: Path, engine: FakeEngine) -> None:
    with Lease(tmp_path, run_id="mine") as mine, Lease(tmp_path, run_id="other") as other:
        made = [
            container(engine, lease.labels("t", -1), start=start) for lease in (mine, other) for start in (True, False)
        ]
        assert sweep(engine, tmp_path) == []
        assert sweep(engine, tmp_path) == []
        assert sorted(engine.all) == sorted(made)
        assert mine.path.exists()
        assert other.path.exists()
        for one in made:
            engine.remove(one, force=True)


@pytest.mark.parametrize("start", [False, True], ids=["created", "running"])
def test_sweep_dead_owners_container_is_removed_with_its_lease(tmp_path: Path, engine: FakeEngine, start: bool) -> None:
    labels = dead_owners_labels(tmp_path)
    path = Path(json.loads(labels[LABEL_LEASE])["path"])
    assert path.exists()
    container(engine, labels, start=start, name="orphan")
    with Lease(tmp_path, run_id="next") as lease:
        (swept,) = sweep(engine, tmp_path)
        assert (swept.name, swept.task, swept.removed, swept.why) == ("orphan", "task", True, "its builder is gone")
        assert str(swept) == "removed orphan (task): its builder is gone"
        assert lease.path.exists()
    assert engine.all == {}
    assert not path.parent.exists()


def test_sweep_unremovable_container_keeps_its_lease(tmp_path: Path, engine: FakeEngine) -> None:
    labels = dead_owners_labels(tmp_path)
    made = container(engine, labels)

    def refuse(operation: str, spec: ContainerSpec | None) -> None:
        if operation == "remove":
            raise EngineLostError("not now")

    engine.hook = refuse
    (swept,) = sweep(engine, tmp_path)
    assert (swept.removed, swept.why) == (False, "not now")
    assert Path(json.loads(labels[LABEL_LEASE])["path"]).exists()
    engine.hook = lambda operation, spec: None
    (swept,) = sweep(engine, tmp_path)
    assert swept.removed
    assert made not in engine.all


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lease: lease | {"path": lease["path"] + "x"},
        lambda lease: lease | {"ino": lease["ino"] + 1},
        lambda lease: lease | {"dev": lease["dev"] + 1},
        lambda lease: lease | {"path": "/dev/zero"},
        lambda lease: lease | {"path": "/tmp"},
        lambda lease: lease | {"path": "\0"},
        lambda lease: lease | {"path": 7},
        lambda lease: {},
        lambda lease: [1],
    ],
    ids=["gone", "other-inode", "other-device", "device", "directory", "nul", "number", "empty", "list"],
)
def test_sweep_other_lease_file_proves_nothing(tmp_path: Path, engine: FakeEngine, spoil: object) -> None:
    labels = dead_owners_labels(tmp_path)
    labels[LABEL_LEASE] = json.dumps(spoil(json.loads(labels[LABEL_LEASE])))  # type: ignore[operator]
    running, created = (container(engine, labels, start=start) for start in (True, False))
    assert [(swept.removed, "lifetime" in swept.why) for swept in sweep(engine, tmp_path)] == [(False, True)] * 2
    assert sorted(engine.all) == sorted([running, created])
    engine.remove(running, force=True)


def test_sweep_unseen_lease_past_deadline_removes_only_ended(tmp_path: Path, engine: FakeEngine) -> None:
    labels = dead_owners_labels(tmp_path, lifetime=-5) | {
        LABEL_LEASE: json.dumps({"path": "/nowhere", "dev": 1, "ino": 1})
    }
    running, created = container(engine, labels, start=True), container(engine, labels)
    swept = {found.removed for found in sweep(engine, tmp_path)}
    assert swept == {True, False}
    assert list(engine.all) == [running]
    assert created not in engine.all
    engine.remove(running, force=True)


@pytest.mark.parametrize("text", ["", "soon", "-1", "1" * 400, "²"])
def test_sweep_deadline_that_is_no_number_is_never_past(tmp_path: Path, engine: FakeEngine, text: str) -> None:
    made = container(engine, {LABEL_LEASE: "not json", LABEL_DEADLINE: text})
    assert [swept.removed for swept in sweep(engine, tmp_path)] == [False]
    assert made in engine.all


def test_sweep_lease_that_is_a_link_proves_nothing(tmp_path: Path, engine: FakeEngine) -> None:
    target = tmp_path / "file"
    target.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(target)
    status = target.stat()
    container(engine, {LABEL_LEASE: json.dumps({"path": str(link), "dev": status.st_dev, "ino": status.st_ino})})
    assert [swept.removed for swept in sweep(engine, tmp_path)] == [False]


def test_sweep_removes_only_stale_lease_directories(tmp_path: Path, engine: FakeEngine) -> None:
    dead_owners_labels(tmp_path)
    home = private_directory(tmp_path)
    (home / "mine.txt").write_text("keep")
    (home / "held-strange").mkdir()
    (home / "held-pipe").mkdir()
    os.mkfifo(home / "held-pipe" / "lease")  # opening it would wait for a writer
    (home / "new-young").mkdir()
    (home / "new-old").mkdir()
    os.utime(home / "new-old", (0, 0))
    with Lease(tmp_path, run_id="alive") as lease:
        sweep(engine, tmp_path)
        left = sorted(path.name for path in home.iterdir())
        assert left == sorted(["held-pipe", "held-strange", "mine.txt", "new-young", lease.path.parent.name])


def test_sweep_on_another_engine_keeps_the_lease(tmp_path: Path, engine: FakeEngine) -> None:
    labels = dead_owners_labels(tmp_path)
    made, other = container(engine, labels), FakeEngine()
    other.identity = "other"
    assert sweep(other, tmp_path) == []
    (swept,) = sweep(engine, tmp_path)
    assert swept.removed and made not in engine.all


def test_sweep_removes_lease_of_another_engine_after_a_month(tmp_path: Path, engine: FakeEngine) -> None:
    with Lease(tmp_path, run_id="dead", engine="gone") as lease:
        lease.keep = True
    with Lease(tmp_path, run_id="alive", engine="gone") as alive:
        os.utime(alive.path, (0, 0))
        sweep(engine, tmp_path)
        assert kept_for_others(tmp_path, engine.identity) == [lease.path.parent]
        os.utime(lease.path, (0, time.time() - OTHERS_AGE - 60))
        sweep(engine, tmp_path)
        assert (lease.path.exists(), alive.path.exists()) == (False, True)


def test_sweep_is_not_kept_from_leases_by_those_of_other_engines(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that was installed anew has another identity, and nobody sweeps for the former one."""
    monkeypatch.setattr("builder.engine.sweep._LEASES", 2)
    dead = []
    for identity in ["gone"] * 8 + [engine.identity]:
        with Lease(tmp_path, run_id="dead", engine=identity) as lease:
            lease.keep = True
        dead.append(lease.path.parent)
    sweep(engine, tmp_path)
    assert [path.exists() for path in dead] == [True] * 8 + [False]


def test_sweep_keeps_lease_of_owner_that_died_after_its_list(tmp_path: Path, engine: FakeEngine) -> None:
    """The builder begins, makes a container and dies while a slow sweep stops another one."""
    container(engine, dead_owners_labels(tmp_path), start=True, name="slow")
    late: list[str] = []

    def meanwhile(operation: str, spec: ContainerSpec | None) -> None:
        if operation == "stop" and not late:
            late.append("")
            late[0] = container(engine, dead_owners_labels(tmp_path), name="late")

    engine.hook = meanwhile
    assert [swept.name for swept in sweep(engine, tmp_path)] == ["slow"]
    assert [(swept.name, swept.removed) for swept in sweep(engine, tmp_path)] == [("late", True)]
    assert list(private_directory(tmp_path).iterdir()) == []


def test_sweep_lease_that_names_no_engine_is_kept(tmp_path: Path, engine: FakeEngine) -> None:
    labels = dead_owners_labels(tmp_path)
    directory = Path(json.loads(labels[LABEL_LEASE])["path"]).parent
    (directory / "engine").unlink()
    assert sweep(engine, tmp_path) == []
    assert directory.exists()


# --- the pending release ---


def record(directory: Path) -> Path:
    record_pending_release(directory, Hooks(("true",), "dead", 20, "/"))
    return directory / PENDING_RELEASE


def test_sweep_living_owner_keeps_its_pending_release(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r1") as held:
        pending = record(held.path.parent)
        sweep(FakeEngine(), tmp_path, run_release=lambda directory: pytest.fail("the owner lives"))
        assert pending.exists()


def test_sweep_dead_owners_release_runs_before_its_directory_is_removed(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r1") as held:
        pending = record(held.path.parent)
    assert pending.exists() and held.path.exists()
    calls: list[Path] = []

    def fail(directory: Path) -> bool:
        calls.append(directory)
        return False

    sweep(FakeEngine(), tmp_path, run_release=fail)
    assert calls == [pending.parent] and pending.exists(), "it did not run, and stays"
    sweep(FakeEngine(), tmp_path, run_release=lambda directory: True)
    assert not pending.parent.exists()


def test_sweep_without_run_release_keeps_it(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r1") as held:
        pending = record(held.path.parent)
    sweep(FakeEngine(), tmp_path)
    assert pending.exists()


def test_sweep_without_pending_release_runs_none(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r1") as held:
        held.keep = True
    sweep(FakeEngine(), tmp_path, run_release=lambda directory: pytest.fail("there is no pending release"))
    assert not held.path.parent.exists()


# --- the end of the log ---


def ended(engine: FakeEngine, *steps: object) -> str:
    made = engine.create(ContainerSpec(image="tiny:1", name="orphan", command=command(*steps)))  # type: ignore[arg-type]
    engine.start(made)
    assert engine.all[made].ended.wait(5)
    return made


def test_save_log_writes_both_streams_with_their_marks(tmp_path: Path, engine: FakeEngine) -> None:
    ended(engine, out("one\n"), err("two\n"), out("three"), leave(0))
    (container,) = engine.containers([])
    path = tmp_path / "logs" / "swept-orphan.log"
    assert save_log(engine, container, path.parent) == f"the end of its log is in {path}"
    assert sorted(path.read_text().splitlines()) == ["err| two", "out| one", "out| three"]


def test_save_log_empty_log_writes_no_file(tmp_path: Path, engine: FakeEngine) -> None:
    ended(engine, leave(0))
    (container,) = engine.containers([])
    assert save_log(engine, container, tmp_path / "logs") == ""
    assert not (tmp_path / "logs").exists()


def test_save_log_long_log_keeps_its_end(tmp_path: Path, engine: FakeEngine) -> None:
    ended(engine, out("".join(f"{number}\n" for number in range(SAVED_ENTRIES + 5))), leave(0))
    (container,) = engine.containers([])
    save_log(engine, container, tmp_path)
    lines = (tmp_path / "swept-orphan.log").read_text().splitlines()
    assert (len(lines), lines[0]) == (SAVED_ENTRIES, "out| 5")


def test_save_log_failures_are_described_not_raised(tmp_path: Path, engine: FakeEngine) -> None:
    made = ended(engine, out("one\n"), leave(0))
    (container,) = engine.containers([])
    (tmp_path / "file").touch()
    assert "could not be saved" in save_log(engine, container, tmp_path / "file")
    engine.lost = True
    assert save_log(engine, container, tmp_path) == "the end of its log could not be saved (the engine is away)"
    engine.lost = False
    engine.remove(made)
    assert save_log(engine, container, tmp_path) == ""
