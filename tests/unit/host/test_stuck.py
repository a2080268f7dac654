"""The watch for threads that are stuck in a file system; a FIFO that nobody writes to stands for one that hangs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.host import stuck
from builder.host.deadlines import Deadline, poll
from builder.host.stuck import StuckWatch

Found = list[tuple[str, int | None, bool]]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Found]:
    monkeypatch.setattr(stuck, "_EVERY", 0.02)
    found: Found = []
    watch = StuckWatch(lambda *what: found.append(what), 0.2)
    watch.start()
    yield found
    watch.stop()


def test_task_stuck_in_files_is_found_with_its_path(found: Found, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    thread = threading.Thread(target=fifo.read_bytes, name="task of a run", daemon=True)
    thread.start()
    poll(lambda: found, Deadline(10), every=0.02)
    os.close(os.open(fifo, os.O_WRONLY))
    thread.join(10)
    assert found == [(str(fifo), None, False)]


def test_waits_that_are_no_files_and_other_threads_are_left_alone(found: Found, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    over = threading.Event()
    threads = [
        threading.Thread(target=fifo.read_bytes, name="outside", daemon=True),  # has a deadline of its own
        threading.Thread(target=over.wait, name="task that waits", daemon=True),
    ]
    for thread in threads:
        thread.start()
    assert not poll(lambda: found, Deadline(0.6), every=0.02)
    over.set()
    os.close(os.open(fifo, os.O_WRONLY))
    for thread in threads:
        thread.join(10)


def test_task_that_works_with_files_for_long_is_not_stuck(found: Found, tmp_path: Path) -> None:
    over = Deadline(0.6)

    def work() -> None:
        while not over.expired:
            tmp_path.is_dir()

    thread = threading.Thread(target=work, name="task that works", daemon=True)
    thread.start()
    thread.join(20)
    assert found == []
