"""What is said of a task while it runs."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest

from builder.events import EntryCounts, Event, Phase, Progress
from builder.host.deadlines import Deadline, poll
from builder.report import live as display
from builder.report.console import Console
from builder.report.live import LiveProgress
from builder.report.progress import TaskProgress
from builder.report.task_output import KEPT, open_output
from builder.text import span


class Watched(TaskProgress):
    """One whose clock a test turns."""

    def __init__(self, **more: Any) -> None:
        self.now = 100.0
        super().__init__("V3-tp8", "gpus 0-7", clock=lambda: self.now, **more)

    def after(self, seconds: float, event: Event) -> Watched:
        self.now += seconds
        self.on_event(event)
        return self


def test_phases_shapes_kernels_and_rates() -> None:
    task = Watched(expected=200.0, shapes=19)
    assert task.parts() == ["starting", "about 3 min left"]
    task.after(1, Phase("loading weights")).after(1, Progress(done=3, total=8, unit="shards"))
    assert task.parts() == ["loading weights", "3/8 shards", "about 3 min left"]
    task.after(98, Phase("DeepGEMM 11: GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"))
    task.after(0, EntryCounts({"deep_gemm": 400}, {"deep_gemm": 312}))
    for done in (1000, 2000, 3000):
        task.after(10, Progress(done=done, total=16384, unit="Ms"))
    assert task.parts() == ["DeepGEMM 11/19 shapes", "3000/16384 Ms", "312 kernels", "100/s", "about 70 s left"]
    task.now += 200
    assert task.parts()[-1] == "longer than expected"
    assert task.line().startswith("V3-tp8: DeepGEMM 11/19 shapes, ") and task.line().endswith(", 5:30 so far")


def test_where_the_bar_is_the_whole_the_rate_tells_what_is_left() -> None:
    task = Watched(expected=9999.0, parts=())
    for done in (0, 100, 200):
        task.after(5, Progress(done=done, total=1000, unit="Ms"))
    assert task.left == pytest.approx(40.0)


def test_a_rate_is_that_of_the_last_half_minute() -> None:
    task = Watched()
    task.after(0, Progress(done=0, total=10**6, unit="Ms"))
    for number in range(1, 61):
        task.after(1, Progress(done=number if number <= 30 else 30 + (number - 30) * 50, total=10**6, unit="Ms"))
    assert task.parts()[-1] == "50.0/s"
    task.after(1, Progress(done=5, total=777, unit="Ms"))
    assert task.parts()[-1] == "5/777 Ms", "another shape, another rate"


def test_progress_without_total_changes_nothing() -> None:
    assert Watched().after(0, Progress(done=3, total=0, unit="x")).parts() == ["starting"]


def test_no_phase_draws_on_a_terminal() -> None:
    assert Watched().after(0, Phase("\x1b[2Jx\r\n")).parts() == ["x\ufffd\ufffd"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (7, "7 s"), (43, "45 s"), (95, "2 min"), (540, "9 min"), (9000, "2.5 h")]
)
def test_a_span_is_as_exact_as_an_estimate(seconds: float, said: str) -> None:
    assert span(seconds) == said


# --- who says it -----------------------------------------------------------------------------------------------------


def test_in_github_a_task_among_others_is_one_piece_with_its_result_below() -> None:
    stream = io.StringIO()
    console = Console(stream, terminal=False, github=True)
    with open_output(console, "[1/2] a", "a", concurrent=True) as voice:
        for number in range(KEPT + 5):
            voice.log("out", f"::error::{number}")
        voice.finish("a: failed: why")
        voice.annotate("a failed", "why")
        console.say("somebody else")
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["[1/2] a begins", "somebody else", "::group::[1/2] a"]
    assert lines[3:5] == ["the first 5 lines are in the log file only", "  │ ::error::5"]
    assert lines[-3:] == ["::endgroup::", "a: failed: why", "::error title=a failed::why"]


def test_elsewhere_every_line_says_whose_it_is() -> None:
    stream = io.StringIO()
    with open_output(Console(stream, terminal=False), "[1/2] a", "a", concurrent=True) as voice:
        voice.log("err", "x")
        voice.remark("second pass")
    assert stream.getvalue() == "[1/2] a\n  ┃ a: x\n  ▸ a: second pass\n"


def test_a_heartbeat_only_while_something_runs() -> None:
    stream, beats = io.StringIO(), threading.Semaphore(0)

    def summary() -> str:
        beats.release()
        return "0 of 1 tasks done"

    with LiveProgress(Console(stream, terminal=False), summary, every=0.01) as shown:
        assert beats.acquire(timeout=5)
        assert stream.getvalue() == ""
        shown.add(Watched())
        for _ in range(3):
            assert beats.acquire(timeout=5)
    assert stream.getvalue().splitlines()[:2] == ["  ▸ 0:00: 0 of 1 tasks done", "  ▸ V3-tp8: starting, 0:00 so far"]


def test_a_terminal_that_takes_nothing_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-S: text is dropped and counted, and the run ends all the same."""
    for name in ("_PATIENCE", "_LAST"):
        monkeypatch.setattr(display, name, 0.05)
    stuck = threading.Event()

    class Stopped(io.StringIO):
        def write(self, text: str) -> int:
            stuck.wait(20)
            return super().write(text)

    console = Console(Stopped(), terminal=True)
    with LiveProgress(console, lambda: "", every=0.01):
        for number in range(4010):
            console.say(str(number))
    stuck.set()


def test_text_is_shown_above_the_lines_and_all_of_it() -> None:
    stream = io.StringIO()
    console = Console(stream, terminal=True)
    with LiveProgress(console, lambda: "0 of 1 tasks done") as live:
        live.add(Watched())
        for number in range(100):
            console.say(f"line {number} [bold]")
    console.say("after")
    shown = stream.getvalue()
    assert all(f"line {number} [bold]" in shown for number in range(100))
    assert shown.endswith("after\n")


def test_a_narrow_terminal_shows_what_a_task_does_and_not_only_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    task = TaskProgress("a-model-with-a-name-that-goes-on-and-on-and-on-tp8", "gpus 0-3")
    task.on_event(Phase("weights"))
    with LiveProgress(Console(stream, terminal=True), lambda: "0 of 1 tasks done") as live:
        live.add(task)
        poll(lambda: "tasks done" in stream.getvalue(), Deadline(10), 0.01)
    assert "gpus 0-3" in stream.getvalue()
    assert "0:00 weights" in stream.getvalue()


def test_no_live_lines_in_a_log_of_github() -> None:
    assert Console(io.StringIO(), terminal=True).terminal is not None
    assert Console(io.StringIO(), terminal=True, github=True).terminal is None
