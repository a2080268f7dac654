"""Locks that all builders of a machine share: made by whoever comes first, used by everybody, waited for by name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.errors import BusyError, Interrupted
from builder.host import gpu_locks
from builder.host.cancel import Cancel
from builder.host.locks import Patience

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two directories, as on a machine; the second one's parent is like /tmp, and open to everybody."""
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    tmp.chmod(0o1777)
    directories = [tmp_path / "run", tmp / "locks"]
    monkeypatch.setattr(gpu_locks, "DIRECTORIES", tuple(directories))
    monkeypatch.setattr(gpu_locks.usable, "__defaults__", (tuple(directories),))
    return directories


class Waiting:
    """One builder's wait, and what it says."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.cancel = Cancel()
        self._seconds = seconds

    def locked(self, *names: str) -> contextlib.AbstractContextManager[None]:
        patience = Patience(self._seconds, say=self.said.append, cancel=self.cancel)
        return gpu_locks.locked({name: f"GPU {name}" for name in names}, patience, self.warned.append)


@contextlib.contextmanager
def somebody_else(directory: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds this lock."""
    code = (
        "import fcntl, sys; from pathlib import Path; from builder.host.gpu_locks import lock_file\n"
        "d = lock_file(Path(sys.argv[1]), sys.argv[2]); fcntl.flock(d, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(directory), name]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def is_free(directory: Path, name: str) -> bool:
    descriptor = gpu_locks.lock_file(directory, name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_held_in_every_directory_as_long_as_the_context_is(shared: list[Path]) -> None:
    with Waiting().locked("b", "a"):
        assert [is_free(directory, name) for directory in shared for name in "ab"] == [False] * 4
    assert [is_free(directory, name) for directory in shared for name in "ab"] == [True] * 4
    assert sorted(path.name for path in shared[0].iterdir()) == ["a.lock", "b.lock"]


def test_everybody_may_use_what_somebody_made(shared: list[Path]) -> None:
    before = os.umask(0o077)
    try:
        with Waiting().locked("a"):
            pass
    finally:
        os.umask(before)
    for directory in shared:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o1777
        assert stat.S_IMODE((directory / "a.lock").stat().st_mode) == 0o666


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("maker", [0, NOBODY])
def test_two_users_exclude_each_other(maker: int) -> None:
    """Whoever of them made directory and file; the kernel guards files of others in sticky directories."""
    with tempfile.TemporaryDirectory() as everybodys:
        Path(everybodys).chmod(0o1777)
        directory = Path(everybodys, "locks")
        assert as_user(maker, lambda: gpu_locks.usable([directory]) == [directory] and is_free(directory, "gpu"))
        assert (directory / "gpu.lock").stat().st_uid == maker
        assert as_user(NOBODY, lambda: is_free(directory, "gpu"))
        descriptor = gpu_locks.lock_file(directory, "gpu")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert as_user(NOBODY, lambda: not is_free(directory, "gpu"))
        os.close(descriptor)


def as_user(uid: int, act: Callable[[], bool]) -> bool:
    """What this returns, in a child that is this user."""
    with warnings.catch_warnings():
        # The child runs nothing that another thread of this process could have locked.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.setgid(uid)
            os.setuid(uid)
            status = 0 if act() else 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_who_is_waited_for_is_said_and_named_in_the_end(shared: list[Path]) -> None:
    gpu_locks.usable()
    with somebody_else(shared[1], "a") as other:
        waiting = Waiting(0.3)
        with pytest.raises(BusyError) as error, waiting.locked("a", "b"):
            pytest.fail("it was locked twice")
        assert waiting.said and waiting.said[0].startswith(f"waiting for pid {other.pid} (")
        assert waiting.said[0].endswith("which holds GPU a")
        assert f"GPU a is in use by pid {other.pid} (" in error.value.message
        assert "--lock-timeout" in error.value.message
    assert is_free(shared[0], "a"), "what was locked on the way is free again"


def test_the_lock_dies_with_its_holder(shared: list[Path]) -> None:
    gpu_locks.usable()
    with somebody_else(shared[0], "a") as other:
        threading.Timer(0.2, other.kill).start()
        waiting = Waiting(20)
        with waiting.locked("a"):
            assert len(waiting.said) == 1


def test_two_builders_with_overlapping_gpus_never_wait_for_each_other(shared: list[Path]) -> None:
    """Each wants both, and names them in its own order."""
    turns: list[str] = []

    def build(*names: str) -> None:
        for _ in range(20):
            with Waiting(30).locked(*names):
                turns.append(names[0])

    threads = [threading.Thread(target=build, args=names) for names in (("a", "b"), ("b", "a"), ("b", "c", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(turns) == 60


def test_a_signal_ends_the_wait(shared: list[Path]) -> None:
    gpu_locks.usable()
    with somebody_else(shared[0], "a"):
        waiting = Waiting(60)
        threading.Timer(0.2, waiting.cancel.set, [signal.SIGTERM]).start()
        with pytest.raises(Interrupted), waiting.locked("a"):
            pytest.fail("it was locked twice")


def test_what_is_not_a_directory_of_ours_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "file").write_text("")
    places = [tmp_path / "link", tmp_path / "file", tmp_path / "no" / "such", tmp_path / "good"]
    assert gpu_locks.usable(places) == [tmp_path / "good"]
    assert list(elsewhere.iterdir()) == []


def test_no_place_for_locks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_locks.usable, "__defaults__", ((tmp_path / "no" / "such",),))
    waiting = Waiting()
    with waiting.locked("a"):
        assert "may not be kept off its GPUs: no access to" in waiting.warned[0]


def test_a_file_that_cannot_be_opened_is_said(shared: list[Path]) -> None:
    (gpu_locks.usable()[0] / "a.lock").symlink_to("/etc/passwd")
    waiting = Waiting()
    with waiting.locked("a"):
        assert "a.lock" in waiting.warned[0]
        assert not is_free(shared[1], "a")


def test_a_name_stays_in_its_directory(shared: list[Path]) -> None:
    with Waiting().locked("../../x"):
        assert [path.name for path in shared[0].iterdir()] == [".._.._x.lock"]


def test_at_once_or_not_at_all(shared: list[Path]) -> None:
    with gpu_locks.at_once("service") as free:
        assert free
        with gpu_locks.at_once("service") as again:
            assert not again
    with gpu_locks.at_once("service") as free:
        assert free


def test_directories_that_are_made_at_the_same_time_are_one(tmp_path: Path) -> None:
    place = tmp_path / "locks"
    held: list[int] = []

    def make() -> None:
        if gpu_locks.usable([place]):
            held.append(gpu_locks.lock_file(place, "a"))

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({os.fstat(descriptor).st_ino for descriptor in held}) == 1 and len(held) == 16
    for descriptor in held:
        os.close(descriptor)
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]
