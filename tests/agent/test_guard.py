"""guard.py: the lease, the lifetime, signals, and the run lock that a container holds for its builder."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder import events, processes
from builder.agent import guard
from builder.cache import layout
from tests.agent.test_process import alive
from tests.program import NONCE, Program, Running

Until = Callable[..., None]

#: Says its pid, then waits without end and refuses SIGTERM.
STUBBORN = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("pid.tmp", "w").write(str(os.getpid()))
os.rename("pid.tmp", "pid")
signal.pause()
"""


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A lease file as a builder makes it, and the descriptor that holds its lock."""
    path = tmp_path / "lease"
    path.write_text(NONCE + "\n")
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield path, descriptor
    os.close(descriptor)


def child_of(program: Program, until: Until) -> int:
    until((program.place / "pid").exists, what="the child")
    return int((program.place / "pid").read_text())


def lease_mode(running: Running, until: Until) -> str:
    until(lambda: running.has(events.Started), what="the start event")
    return running.stdout.partition(b'"lease":"')[2].partition(b'"')[0].decode()


def test_lease_released_ends_all_processes(program: Program, lease: tuple[Path, int], until: Until) -> None:
    running = program.start(program.command(STUBBORN), lease=str(lease[0]), stdin=subprocess.PIPE)
    child = child_of(program, until)
    assert lease_mode(running, until) == "flock"
    assert running.process.stdin
    running.process.stdin.close()  # means nothing while the lock is held
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(0.3)
    fcntl.flock(lease[1], fcntl.LOCK_UN)
    assert running.process.wait(1.0) == guard.LEASE_ENDED
    assert not alive(child)


@pytest.mark.parametrize("case", ["another nonce", "not held", "no file"])
def test_lease_without_provable_lock_is_stdin(
    program: Program, lease: tuple[Path, int], until: Until, case: str
) -> None:
    path, descriptor = lease
    if case == "another nonce":
        path.write_text("somebody else's")
    elif case == "not held":
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    else:
        path.unlink()
    running = program.start(program.command(STUBBORN), lease=str(path), stdin=subprocess.PIPE)
    child = child_of(program, until)
    assert lease_mode(running, until) == "stdin"
    assert running.process.stdin
    running.process.stdin.close()
    assert running.process.wait(1.0) == guard.LEASE_ENDED
    assert not alive(child)


def test_lease_absent_when_started_by_hand(program: Program) -> None:
    done = program.run(program.command("pass"))
    assert done.all(events.Started)[0].lease == "none"
    assert done.status == 0


def test_lifetime_over_ends_the_program(program: Program) -> None:
    done = program.run(program.command(STUBBORN), lifetime=0.7)
    assert done.status == guard.LIFETIME_OVER
    assert done.verdict.state == "failed"
    assert "lifetime" in done.verdict.reason
    assert isinstance(done.events[-1], events.End)
    assert not alive(int((program.place / "pid").read_text()))


@pytest.mark.parametrize(
    ("signum", "recipe"), [(signal.SIGTERM, "compile-deep-gemm"), (signal.SIGTERM, "serve"), (signal.SIGINT, "serve")]
)
def test_signal_ends_stubborn_child_within_grace(program: Program, until: Until, signum: int, recipe: str) -> None:
    running = program.start(program.task("refuses-sigterm", recipe=recipe), grace=2.0)
    until(lambda: b"refused" in running._files[1].read_bytes(), what="the child")
    running.process.send_signal(signum)
    running.process.send_signal(signum)
    assert running.process.wait(2.0) == 128 + signum
    done = running.end()
    assert done.verdict.state == "stopped"
    assert done.verdict.marker is None
    assert done.verdict.entries == {}
    assert isinstance(done.events[-1], events.End)


def test_signal_during_shape_sweep_reports_partial(program: Program, until: Until) -> None:
    task = program.task(env={"TINY_COMPILE_SECONDS": "0.3", "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"})
    running = program.start(task)
    until(lambda: list(program.root.glob("deep_gemm/*/cache/*/.committed")), what="the first entry")
    running.process.send_signal(signal.SIGTERM)
    done = running.end(5)
    assert done.status == 143
    assert done.verdict.entries["deep_gemm"] == done.verdict.added["deep_gemm"] >= 1
    assert done.verdict.shapes
    assert not list(program.root.glob("markers/*/*"))


def test_run_lock_is_held_until_signal(program: Program, until: Until) -> None:
    first = program.start(None, mode="lock")
    until(lambda: first.has(events.Locked), what="the first lock")
    second = program.start(None, mode="lock")
    third = program.start(None, mode="lock")
    with layout.run_lock(program.root).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    until(lambda: Path(f"/proc/{third.process.pid}/task").is_dir() and alive(third.process.pid))
    assert not second.has(events.Locked)
    first.process.terminate()
    assert first.end().status == 143
    until(lambda: second.has(events.Locked) or third.has(events.Locked), what="the next lock")
    held, waiting = (second, third) if second.has(events.Locked) else (third, second)
    until(lambda: b"builder.agent" in Path(f"/proc/{waiting.process.pid}/cmdline").read_bytes())
    waiting.process.terminate()  # a signal reaches one that waits, too
    held.process.terminate()
    assert {waiting.process.wait(5), held.process.wait(5)} <= {143, -signal.SIGTERM}


def test_run_lock_ends_with_lease(program: Program, lease: tuple[Path, int], until: Until) -> None:
    running = program.start(None, mode="lock", lease=str(lease[0]))
    until(lambda: running.has(events.Locked), what="the lock")
    os.ftruncate(lease[1], 0)  # the content is read once: only the lock counts
    fcntl.flock(lease[1], fcntl.LOCK_UN)
    assert running.process.wait(1.0) == guard.LEASE_ENDED
    with layout.run_lock(program.root).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_descendants_are_found_by_parent_pid() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo ready; wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        found = processes.descendants(process.pid)
        assert len(found) == 1
        assert found < processes.descendants()
        for pid in found:
            os.kill(pid, signal.SIGKILL)
