"""The run lock: a kernel lock where its file can be opened, a container's where not."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from builder import flock
from builder.errors import BusyError, Interrupted
from builder.host.cancel import Cancel
from builder.host.locks import LockWait
from builder.run import cache_locks
from builder.run.container_executor import ContainerExecutor


class Here:
    """An executor with a cache root."""

    def __init__(self, root: Path | None, seconds: float = 0.2) -> None:
        self.said: list[str] = []
        self.context: Any = SimpleNamespace(
            cancel=Cancel(), lock_wait=lambda: LockWait(seconds, say=self.said.append, cancel=self.context.cancel)
        )
        self.root_name = str(root)
        self.direct_root = lambda: root

    def held(self) -> contextlib.AbstractContextManager[None]:
        return cache_locks.held(cast(ContainerExecutor, self))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "locks").mkdir()
    (tmp_path / cache_locks.RUN).touch()
    return tmp_path


def is_free(root: Path) -> bool:
    with (root / cache_locks.RUN).open("rb") as file:
        return flock.try_lock(file.fileno())


@contextlib.contextmanager
def taken(root: Path) -> Iterator[int]:
    with (root / cache_locks.RUN).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def test_lock_held_as_long_as_the_context(root: Path) -> None:
    executor = Here(root)
    with executor.held():
        assert not is_free(root)
    assert is_free(root)
    with pytest.raises(ZeroDivisionError), executor.held():
        raise ZeroDivisionError
    assert is_free(root)
    assert executor.said == []


def test_lock_in_use_names_its_holder_and_times_out(root: Path) -> None:
    executor = Here(root)
    with taken(root), pytest.raises(BusyError) as error, executor.held():
        pytest.fail("it was locked twice")
    assert executor.said == [executor.said[0]]
    assert executor.said[0].startswith(f"waiting for pid {os.getpid()} (")
    assert f"{root} is in use by pid {os.getpid()} (" in error.value.message
    assert "raise --lock-timeout" in error.value.message


def test_lock_released_by_another_is_taken(root: Path) -> None:
    executor = Here(root, 20.0)
    with taken(root) as descriptor:
        threading.Timer(0.1, fcntl.flock, (descriptor, fcntl.LOCK_UN)).start()
        with executor.held():
            assert len(executor.said) == 1


def test_wait_for_a_lock_is_interrupted_by_a_signal(root: Path) -> None:
    executor = Here(root, 20.0)
    threading.Timer(0.1, executor.context.cancel.set, (signal.SIGINT,)).start()
    with taken(root), pytest.raises(Interrupted), executor.held():
        pytest.fail("it was locked twice")


@pytest.mark.parametrize("where", ["elsewhere", "without a file", "a directory"])
def test_lock_whose_file_cannot_be_opened_is_held_by_a_container(
    root: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[cache_locks.ContainerLock] = []

    @contextlib.contextmanager
    def by_container(_executor: Any, lock: cache_locks.ContainerLock) -> Iterator[None]:
        asked.append(lock)
        yield

    monkeypatch.setattr(cache_locks, "held_by_container", by_container)
    (root / "layout.json").touch()
    if where != "elsewhere":
        (root / cache_locks.RUN).unlink()
    if where == "a directory":
        (root / "locks").rmdir()
        (root / "locks").touch()
    with Here(None if where == "elsewhere" else root).held():
        pass
    (lock,) = asked
    assert (lock.mode, lock.owner_description, lock.lifetime) == ("lock", "another builder", None)


def test_lock_of_a_new_root_is_held_by_this_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container lays it out first; what it held is free again before the run begins."""
    (root / cache_locks.RUN).unlink()

    @contextlib.contextmanager
    def by_container(_executor: Any, _lock: cache_locks.ContainerLock) -> Iterator[None]:
        (root / cache_locks.RUN).touch()
        yield

    monkeypatch.setattr(cache_locks, "held_by_container", by_container)
    with Here(root).held(), (root / cache_locks.RUN).open() as again, pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_holder_is_found_in_the_kernels_list(root: Path, tmp_path: Path) -> None:
    listing = tmp_path / "locks.txt"
    with (root / cache_locks.RUN).open("rb") as file:
        status = os.fstat(file.fileno())
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        listing.write_text(
            f"1: POSIX  ADVISORY  WRITE 11 {place} 0 EOF\n"
            f"2: FLOCK  ADVISORY  WRITE 12 {place}0 0 EOF\n"
            f"3: -> FLOCK  ADVISORY  WRITE 13 {place} 0 EOF\n"
            "garbage\n"
            f"4: FLOCK  ADVISORY  WRITE 999999999 {place} 0 EOF\n"
        )
        assert flock.holder(file.fileno(), listing) == "pid 999999999"
        listing.write_text("")
        assert flock.holder(file.fileno(), listing) == "another builder"
        assert flock.holder(file.fileno(), tmp_path / "missing") == "another builder"
