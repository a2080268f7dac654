"""How the program of one task is ended with --here."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.job import Job
from builder.run import local_job
from builder.run.executor import Watcher


@pytest.mark.parametrize(("signals", "least", "most"), [(2, 0.0, 2.0), (1, 0.3, 3.0)])
def test_signal_while_a_program_is_ended_shortens_its_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int, least: float, most: float
) -> None:
    """The first signal leaves CANCEL_GRACE seconds, the second none, of a grace of a minute."""
    monkeypatch.setattr(local_job, "CANCEL_GRACE", 0.5)
    cancel = Cancel()
    for _ in range(signals):
        cancel.set(signal.SIGTERM)
    watcher = Watcher(lambda _stream, _line: None, lambda _event: None)
    agent = local_job.AgentProcess(Job(mode="run", nonce="n", mount="/jit"), {}, watcher, tmp_path / "log")
    stubborn = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; exec sleep 60"], stdout=subprocess.PIPE)
    with stubborn:
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline()
        began = time.monotonic()
        agent._end(stubborn, 60.0, cancel)
        assert least <= time.monotonic() - began < most
    assert agent.status == -signal.SIGKILL


def test_program_without_room_for_a_thread_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher(lambda _stream, _line: None, lambda _event: None)
    agent = local_job.AgentProcess(
        Job(mode="run", nonce="n", mount="/jit"), dict(os.environ), watcher, tmp_path / "log"
    )
    started: list[subprocess.Popen[bytes]] = []
    start = agent._start

    def start_and_keep() -> subprocess.Popen[bytes]:
        started.append(start())
        return started[0]

    def no_thread() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(agent, "_start", start_and_keep)
    monkeypatch.setattr(agent._display, "open", no_thread)
    deadline = Deadline(30)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        agent.run(task=deadline, silence=30, budget=deadline, grace=1, cancel=Cancel())
    assert started[0].poll() is not None
    assert not agent.file.is_open
