"""Live lines on a terminal, heartbeat lines elsewhere."""

from __future__ import annotations

import io
import threading

import pytest

from builder.events import Phase
from builder.host.deadlines import Deadline, poll
from builder.report import live as display
from builder.report.console import Console
from builder.report.live import LiveProgress
from builder.report.progress import TaskProgress


def test_heartbeat_without_tasks_writes_nothing() -> None:
    stream, beats = io.StringIO(), threading.Semaphore(0)

    def summary() -> str:
        beats.release()
        return "0 of 1 tasks done"

    with LiveProgress(Console(stream, terminal=False), summary, every=0.01) as shown:
        assert beats.acquire(timeout=5)
        assert stream.getvalue() == ""
        shown.add(TaskProgress("V3-tp8", "gpus 0-7", clock=lambda: 100.0))
        for _ in range(3):
            assert beats.acquire(timeout=5)
    assert stream.getvalue().splitlines()[:2] == ["  ▸ 0:00: 0 of 1 tasks done", "  ▸ V3-tp8: starting, 0:00 so far"]


def test_live_lines_on_a_stuck_terminal_drop_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-S: text is dropped and counted, and the run ends all the same."""
    for name in ("_PATIENCE", "_LAST"):
        monkeypatch.setattr(display, name, 0.05)
    stuck = threading.Event()

    class Stopped(io.StringIO):
        def write(self, text: str) -> int:
            stuck.wait(20)
            return super().write(text)

    stream = Stopped()
    console = Console(stream, terminal=True)
    with LiveProgress(console, lambda: "", every=0.01):
        for number in range(4010):
            console.say(str(number))
    assert stream.getvalue() == "", "the run waited for the terminal"
    stuck.set()
    assert poll(lambda: "lines not shown; the log file has them" in stream.getvalue(), Deadline(10), every=0.01)


def test_text_during_live_lines_is_all_shown() -> None:
    stream = io.StringIO()
    console = Console(stream, terminal=True)
    with LiveProgress(console, lambda: "0 of 1 tasks done") as live:
        live.add(TaskProgress("V3-tp8", "gpus 0-7"))
        for number in range(100):
            console.say(f"line {number} [bold]")
    console.say("after")
    shown = stream.getvalue()
    assert all(f"line {number} [bold]" in shown for number in range(100))
    assert shown.endswith("after\n")


def test_live_lines_on_a_narrow_terminal_show_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    task = TaskProgress("a-model-with-a-name-that-goes-on-and-on-and-on-tp8", "gpus 0-3")
    task.on_event(Phase("weights"))
    with LiveProgress(Console(stream, terminal=True), lambda: "0 of 1 tasks done") as live:
        live.add(task)
        poll(lambda: "tasks done" in stream.getvalue(), Deadline(10), 0.01)
    assert "gpus 0-3" in stream.getvalue()
    assert "0:00 weights" in stream.getvalue()


def test_terminal_without_rich_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside a test job, where nothing is installed for this program."""
    monkeypatch.setattr(display, "find_spec", lambda _: None)
    console = Console(stream := io.StringIO(), terminal=True)
    with LiveProgress(console, lambda: "0 of 1 tasks done"):
        console.say("a line")
    assert stream.getvalue() == "a line\n"
