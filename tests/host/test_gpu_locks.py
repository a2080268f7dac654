"""GPU locks between processes and between users: exclusive, waited for by name, freed with their holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
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
from tests.unit.host.test_gpu_locks import Waiting, is_free, lock_directories  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


@contextlib.contextmanager
def other_process(directory: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds this lock."""
    code = (
        "import fcntl, sys; from pathlib import Path; from builder.host.gpu_locks import open_lock_file\n"
        "d = open_lock_file(Path(sys.argv[1]), sys.argv[2]); fcntl.flock(d, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(directory), name]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def as_user(uid: int, act: Callable[[], bool]) -> bool:
    """Return what `act` returns in a child process of this user."""
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_locks_of_two_users_exclude_each_other() -> None:
    """Root's directory, a file of the other: in sticky directories the kernel guards files of others."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o1777)
        directory = Path(parent, "locks")
        assert gpu_locks.usable_directories([directory]) == [directory]
        assert as_user(NOBODY, lambda: is_free(directory, "gpu"))
        assert (directory / "gpu.lock").stat().st_uid == NOBODY
        descriptor = gpu_locks.open_lock_file(directory, "gpu")
        assert (directory / "gpu.lock").stat().st_uid == 0
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert as_user(NOBODY, lambda: not is_free(directory, "gpu"))
        os.close(descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_lock_directory_of_another_user_is_not_used() -> None:
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o1777)
        directory = Path(parent, "locks")
        assert as_user(NOBODY, lambda: gpu_locks.usable_directories([directory]) == [directory])
        assert as_user(NOBODY, lambda: is_free(directory, "gpu"))
        assert gpu_locks.usable_directories([directory]) == [Path(f"{directory}-0")]


def test_wait_names_the_holder_and_times_out(shared: list[Path]) -> None:
    gpu_locks.usable_directories()
    with other_process(shared[1], "a") as other:
        waiting = Waiting(0.3)
        with pytest.raises(BusyError) as error, waiting.locked("a", "b"):
            pytest.fail("it was locked twice")
        assert waiting.printed and waiting.printed[0].startswith(f"waiting for pid {other.pid} (")
        assert waiting.printed[0].endswith("which holds GPU a")
        assert f"GPU a is in use by pid {other.pid} (" in error.value.message
        assert "--lock-timeout" in error.value.message
    assert is_free(shared[0], "a"), "what was locked on the way is free again"


def test_lock_is_freed_when_its_holder_is_killed(shared: list[Path]) -> None:
    gpu_locks.usable_directories()
    with other_process(shared[0], "a") as other:
        threading.Timer(0.2, other.kill).start()
        waiting = Waiting(20)
        with waiting.locked("a"):
            assert len(waiting.printed) == 1


def test_wait_ends_with_a_signal(shared: list[Path]) -> None:
    gpu_locks.usable_directories()
    with other_process(shared[0], "a"):
        waiting = Waiting(60)
        threading.Timer(0.2, waiting.cancel.set, [signal.SIGTERM]).start()
        with pytest.raises(Interrupted), waiting.locked("a"):
            pytest.fail("it was locked twice")
