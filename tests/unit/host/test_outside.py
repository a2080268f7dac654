"""Nothing outside is waited for without a limit: at its open, at a write, at its close, in a call."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.host import outside
from builder.host.outside import StuckError, Writer


def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def writer(path: Path, most: int = 1 << 20) -> Writer:
    found = Writer(lambda: os.open(path, os.O_WRONLY | os.O_CREAT), most=most)
    found.start()
    return found


def test_writer_writes_in_order_and_closes(tmp_path: Path) -> None:
    found = writer(tmp_path / "file")
    for number in range(1000):
        assert found.put(b"%d\n" % number)
    assert found.close(5)
    assert (tmp_path / "file").read_bytes() == b"".join(b"%d\n" % number for number in range(1000))


def test_writer_of_fifo_without_reader_is_given_up(tmp_path: Path) -> None:
    path = fifo(tmp_path)
    found, began = writer(path), time.monotonic()
    found.put(b"x")
    assert not found.wait(0, 0.1)
    assert not found.close(0.1)
    assert not found.close(30, give_up=lambda: True)
    assert time.monotonic() - began < 5
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # lets the thread go


def test_writer_of_unread_pipe_is_given_up_and_goes_on_with_its_reader(tmp_path: Path) -> None:
    reader, end = os.pipe()
    found = Writer(lambda: end, most=1 << 20)
    found.start()
    found.put(b"x" * (1 << 18))
    assert not found.wait(0, 0.1)
    assert not found.put(b"y" * (1 << 20)) and found.dropped == 1 << 20
    taken = 0
    while taken < 1 << 18:
        taken += len(os.read(reader, 1 << 16))
    assert found.close(5)
    os.close(reader)


def test_writer_of_closed_pipe_has_its_error() -> None:
    reader, end = os.pipe()
    os.close(reader)
    found = Writer(lambda: end, most=100)
    found.start()
    found.put(b"x")
    assert found.wait(0, 5)
    assert not found.close(5)
    assert isinstance(found.error, BrokenPipeError)
    assert not found.put(b"y")


def test_writer_without_directory_has_its_error(tmp_path: Path) -> None:
    found = writer(tmp_path / "missing" / "file")
    assert not found.close(5)
    assert isinstance(found.error, FileNotFoundError)


def hang(over: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        over.wait(30)

    return wait


def test_call_that_hangs_is_given_up() -> None:
    over, began = threading.Event(), time.monotonic()
    with pytest.raises(StuckError, match="the place took nothing in time"):
        outside.call(hang(over), "the place", 0.1)
    with pytest.raises(StuckError):
        outside.call(hang(over), "the place", 30, give_up=lambda: True)
    assert time.monotonic() - began < 5
    over.set()


def test_call_returns_and_raises_what_the_action_does() -> None:
    def fail() -> None:
        raise OSError(28, "full")

    assert outside.call(lambda: 7, "it", 5) == 7
    with pytest.raises(OSError, match="full"):
        outside.call(fail, "it", 5)


def test_call_without_room_for_a_thread_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(StuckError, match="it was left alone: can't start new thread"):
        outside.call(lambda: 7, "it", 5)
