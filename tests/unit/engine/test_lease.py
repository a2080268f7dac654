"""Whose containers may be swept: only those whose owner is proven dead. Locks are real; the engine is the fake."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.engine.api import ContainerSpec
from builder.engine.lease import (
    LABEL_DEADLINE,
    LABEL_LEASE,
    LABEL_RUN,
    LABEL_TASK,
    TARGET,
    Lease,
    private_directory,
    sweep,
)
from builder.errors import EngineLostError, PreflightError
from builder.host.deadlines import Deadline, poll
from tests.fakes import FakeEngine
from tests.scripts import HANG, command


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def container(engine: FakeEngine, labels: dict[str, str], *, start: bool = False, name: str = "") -> str:
    spec = ContainerSpec(image="tiny:1", name=name or os.urandom(4).hex(), command=command(HANG), labels=labels)
    made = engine.create(spec)
    if start:
        engine.start(made)
    return made


def dead_owners_labels(state: Path, *, lifetime: float = 3600) -> dict[str, str]:
    """The labels that a builder left which was killed while it held its lease."""
    code = (
        "import json, os, sys; from pathlib import Path; from builder.engine.lease import Lease\n"
        "lease = Lease(Path(sys.argv[1]), run_id='dead').__enter__()\n"
        "print(json.dumps(lease.labels('task', float(sys.argv[2]))), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(state), str(lifetime)], stdout=subprocess.PIPE, check=False)
    labels: dict[str, str] = json.loads(done.stdout)
    return labels


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_file_is_locked_says_its_nonce_and_goes_with_the_lease(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r") as lease:
        assert lease.path.read_text().strip() == lease.nonce
        assert is_locked(lease.path)
        home = lease.path.parent.parent
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE(lease.path.stat().st_mode) == 0o644
        mount = lease.mount()
        assert (mount.source, mount.target, mount.read_only) == (str(lease.path), TARGET, True)
    assert list(home.iterdir()) == []


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    lease = Lease(tmp_path, run_id="r").__enter__()
    lease.keep = True
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        lease.__exit__()
        # The kernel closes the child's copies one by one, so that the child may run a moment before the last.
        assert poll(lambda: not is_locked(lease.path), Deadline(5), every=0.01)
        child.communicate(b"\n")


def test_labels_name_the_very_file(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r") as lease:
        labels = lease.labels("a task", 100)
        status = lease.path.stat()
        expected = {"path": str(lease.path), "dev": status.st_dev, "ino": status.st_ino}
        assert json.loads(labels[LABEL_LEASE]) == expected
        assert (labels[LABEL_RUN], labels[LABEL_TASK]) == ("r", "a task")
        assert 0 <= int(labels[LABEL_DEADLINE]) - time.time() <= 101
        assert lease.nonce not in json.dumps(labels)


def test_a_living_owners_container_is_not_even_mentioned(tmp_path: Path, engine: FakeEngine) -> None:
    with Lease(tmp_path, run_id="mine") as mine, Lease(tmp_path, run_id="other") as other:
        made = [
            container(engine, lease.labels("t", -1), start=start) for lease in (mine, other) for start in (True, False)
        ]
        assert sweep(engine, tmp_path) == []
        assert mine.sweep(engine) == []
        assert sorted(engine.all) == sorted(made)
        assert mine.path.exists()
        assert other.path.exists()
        for one in made:
            engine.remove(one, force=True)


@pytest.mark.parametrize("start", [False, True], ids=["created", "running"])
def test_a_dead_owners_container_goes_and_its_file_with_it(tmp_path: Path, engine: FakeEngine, start: bool) -> None:
    labels = dead_owners_labels(tmp_path)
    path = Path(json.loads(labels[LABEL_LEASE])["path"])
    assert path.exists()
    container(engine, labels, start=start, name="orphan")
    with Lease(tmp_path, run_id="next") as lease:
        (swept,) = lease.sweep(engine)
        assert (swept.name, swept.task, swept.removed, swept.why) == ("orphan", "task", True, "its builder is gone")
        assert str(swept) == "removed orphan (task): its builder is gone"
        assert lease.path.exists()
    assert engine.all == {}
    assert not path.parent.exists()


def test_a_dead_owners_file_stays_while_a_container_cannot_be_removed(tmp_path: Path, engine: FakeEngine) -> None:
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
def test_a_file_that_is_not_the_labels_proves_nothing(tmp_path: Path, engine: FakeEngine, spoil: object) -> None:
    labels = dead_owners_labels(tmp_path)
    labels[LABEL_LEASE] = json.dumps(spoil(json.loads(labels[LABEL_LEASE])))  # type: ignore[operator]
    running, created = (container(engine, labels, start=start) for start in (True, False))
    assert [(swept.removed, "lifetime" in swept.why) for swept in sweep(engine, tmp_path)] == [(False, True)] * 2
    assert sorted(engine.all) == sorted([running, created])
    engine.remove(running, force=True)


def test_unseen_and_past_its_lifetime_only_what_does_not_run_goes(tmp_path: Path, engine: FakeEngine) -> None:
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
def test_a_deadline_that_is_no_time_is_never_past(tmp_path: Path, engine: FakeEngine, text: str) -> None:
    made = container(engine, {LABEL_LEASE: "not json", LABEL_DEADLINE: text})
    assert [swept.removed for swept in sweep(engine, tmp_path)] == [False]
    assert made in engine.all


def test_a_symbolic_link_is_not_followed(tmp_path: Path, engine: FakeEngine) -> None:
    target = tmp_path / "file"
    target.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(target)
    status = target.stat()
    container(engine, {LABEL_LEASE: json.dumps({"path": str(link), "dev": status.st_dev, "ino": status.st_ino})})
    assert [swept.removed for swept in sweep(engine, tmp_path)] == [False]


def test_only_leases_are_tidied_up(tmp_path: Path, engine: FakeEngine) -> None:
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


def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"warm-cache-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(PreflightError, match="XDG_RUNTIME_DIR"):
        Lease(tmp_path, run_id="r").__enter__()


def test_a_directory_that_cannot_be_made_is_said_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PreflightError, match="Set XDG_RUNTIME_DIR"):
        Lease(tmp_path / "file", run_id="r").__enter__()


def test_many_builders_starting_and_sweeping_at_once_never_sweep_each_other(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from builder.engine.lease import Lease, sweep\n"
        "sys.path.insert(0, sys.argv[2]); from tests.fakes import FakeEngine\n"
        "for _ in range(60):\n"
        "    with Lease(Path(sys.argv[1]), run_id='r') as lease:\n"
        "        sweep(FakeEngine(), Path(sys.argv[1]))\n"
        "        assert lease.path.read_text().strip() == lease.nonce\n"
    )
    root = Path(__file__).parents[3]
    builders = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(root)]) for _ in range(4)]
    assert [builder.wait(60) for builder in builders] == [0] * 4
