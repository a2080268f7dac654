"""Progress of a task: what its events add up to."""

from __future__ import annotations

from typing import Any

import pytest

from builder.events import EntryCounts, Event, Phase, Progress
from builder.report.progress import TaskProgress


class Watched(TaskProgress):
    """Progress with a clock that the test sets."""

    def __init__(self, **more: Any) -> None:
        self.now = 100.0
        super().__init__("V3-tp8", "gpus 0-7", clock=lambda: self.now, **more)

    def after(self, seconds: float, event: Event) -> Watched:
        self.now += seconds
        self.on_event(event)
        return self


def test_line_has_phase_shapes_kernels_and_rate() -> None:
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


def test_left_with_known_total_follows_from_the_rate() -> None:
    task = Watched(expected=9999.0, parts=())
    for done in (0, 100, 200):
        task.after(5, Progress(done=done, total=1000, unit="Ms"))
    assert task.left == pytest.approx(40.0)


def test_rate_is_of_the_last_half_minute() -> None:
    task = Watched()
    task.after(0, Progress(done=0, total=10**6, unit="Ms"))
    for number in range(1, 61):
        task.after(1, Progress(done=number if number <= 30 else 30 + (number - 30) * 50, total=10**6, unit="Ms"))
    assert task.parts()[-1] == "50.0/s"
    task.after(1, Progress(done=5, total=777, unit="Ms"))
    assert task.parts()[-1] == "5/777 Ms", "another shape, another rate"


def test_progress_without_total_is_ignored() -> None:
    assert Watched().after(0, Progress(done=3, total=0, unit="x")).parts() == ["starting"]


def test_phase_with_control_characters_is_made_readable() -> None:
    assert Watched().after(0, Phase("\x1b[2Jx\r\n")).parts() == ["x\ufffd\ufffd"]
