"""GPU locks within one process: made once with the right mode, held in every directory, warned about if impossible."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from builder.host import gpu_locks
from builder.host.cancel import Cancel
from builder.host.locks import LockWait


@pytest.fixture(name="shared")
def lock_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two directories, as on a machine; the second one's parent has the mode of /tmp."""
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    tmp.chmod(0o1777)
    directories = [tmp_path / "run", tmp / "locks"]
    monkeypatch.setattr(gpu_locks, "DIRECTORIES", tuple(directories))
    monkeypatch.setattr(gpu_locks.usable_directories, "__defaults__", (tuple(directories),))
    return directories


class Waiting:
    """One builder's wait, with what it prints and warns."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.printed: list[str] = []
        self.warned: list[str] = []
        self.cancel = Cancel()
        self._seconds = seconds

    def locked(self, *names: str) -> contextlib.AbstractContextManager[None]:
        wait = LockWait(self._seconds, say=self.printed.append, cancel=self.cancel)
        return gpu_locks.locked({name: f"GPU {name}" for name in names}, wait, self.warned.append)


def is_free(directory: Path, name: str) -> bool:
    descriptor = gpu_locks.open_lock_file(directory, name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_locked_holds_every_directory_until_exit(shared: list[Path]) -> None:
    with Waiting().locked("b", "a"):
        assert [is_free(directory, name) for directory in shared for name in "ab"] == [False] * 4
    assert [is_free(directory, name) for directory in shared for name in "ab"] == [True] * 4
    assert sorted(path.name for path in shared[0].iterdir()) == ["a.lock", "b.lock"]


def test_locked_makes_files_that_all_users_can_lock(shared: list[Path]) -> None:
    before = os.umask(0o077)
    try:
        with Waiting().locked("a"):
            pass
    finally:
        os.umask(before)
    for directory in shared:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o1777
        assert stat.S_IMODE((directory / "a.lock").stat().st_mode) == 0o666


def test_locked_overlapping_names_never_deadlock(shared: list[Path]) -> None:
    turns: list[str] = []  # every builder names the locks in its own order

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


def test_usable_directories_skips_links_files_and_missing_parents(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "file").write_text("")
    places = [tmp_path / "link", tmp_path / "file", tmp_path / "no" / "such", tmp_path / "good"]
    assert gpu_locks.usable_directories(places) == [tmp_path / "good"]
    assert list(elsewhere.iterdir()) == []


def test_locked_without_usable_directory_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_locks.usable_directories, "__defaults__", ((tmp_path / "no" / "such",),))
    waiting = Waiting()
    with waiting.locked("a"):
        assert "may use its GPUs at the same time: no access to" in waiting.warned[0]


def test_locked_unopenable_file_warns_and_locks_the_rest(shared: list[Path]) -> None:
    (gpu_locks.usable_directories()[0] / "a.lock").symlink_to("/etc/passwd")
    waiting = Waiting()
    with waiting.locked("a"):
        assert "a.lock" in waiting.warned[0]
        assert not is_free(shared[1], "a")


def test_locked_name_with_slashes_stays_in_its_directory(shared: list[Path]) -> None:
    with Waiting().locked("../../x"):
        assert [path.name for path in shared[0].iterdir()] == [".._.._x.lock"]


def test_try_lock_yields_whether_it_was_free(shared: list[Path]) -> None:
    with gpu_locks.try_lock("service") as free:
        assert free
        with gpu_locks.try_lock("service") as again:
            assert not again
    with gpu_locks.try_lock("service") as free:
        assert free


def test_usable_directories_made_concurrently_are_one(tmp_path: Path) -> None:
    place = tmp_path / "locks"
    held: list[int] = []

    def make() -> None:
        if gpu_locks.usable_directories([place]):
            held.append(gpu_locks.open_lock_file(place, "a"))

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({os.fstat(descriptor).st_ino for descriptor in held}) == 1 and len(held) == 16
    for descriptor in held:
        os.close(descriptor)
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]


@pytest.mark.attack(
    "the directory of GPU locks is another user's, or has no sticky bit, so that its files can be replaced",
    by="other user",
    holds="it is not used, and named with the remedy; builders of one user still exclude each other",
)
@pytest.mark.parametrize(("uid", "mode"), [(65534, 0o1777), (None, 0o777)])
def test_locked_directory_of_others_is_named_and_private_one_used(
    shared: list[Path], monkeypatch: pytest.MonkeyPatch, uid: int | None, mode: int
) -> None:
    real = os.lstat
    for directory in shared:
        directory.mkdir()
        directory.chmod(mode)
        (directory / "other").touch()

    def lstat(path: Path) -> os.stat_result:
        found = real(path)
        return os.stat_result([*found[:4], uid, *found[5:10]]) if uid and path in shared else found

    monkeypatch.setattr(Path, "lstat", lstat)
    waiting = Waiting()
    with waiting.locked("a"):
        assert [str(directory) in text for directory, text in zip(shared, waiting.warned, strict=True)] == [True, True]
        assert all(gpu_locks.TMPFILES in text for text in waiting.warned)
        private = Path(f"{shared[1]}-{os.geteuid()}")
        assert stat.S_IMODE(private.stat().st_mode) == 0o700 and not is_free(private, "a")
    assert [path.name for directory in shared for path in directory.iterdir()] == ["other", "other"]


@pytest.mark.attack(
    "a lock file of a GPU is removed, by the user who made it, while a builder waits for it",
    by="other user",
    holds="the builder locks the file that is there then; root's builder takes files of others over",
)
def test_locked_file_replaced_while_waited_for_is_locked_again(shared: list[Path]) -> None:
    directory = gpu_locks.usable_directories()[0]
    held = gpu_locks.open_lock_file(directory, "a")
    fcntl.flock(held, fcntl.LOCK_EX)

    def replace() -> None:
        (directory / "a.lock").unlink()
        os.close(gpu_locks.open_lock_file(directory, "a"))
        os.close(held)

    timer = threading.Timer(0.1, replace)
    timer.start()
    with Waiting(20).locked("a"):
        assert not is_free(directory, "a")
    timer.join()
