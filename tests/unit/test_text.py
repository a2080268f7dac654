"""Text for people: durations, counts, sizes, sentences."""

from __future__ import annotations

import pytest

from builder.text import counted, duration, sentence, size, span


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (0.4, "0:00"), (221.0, "3:41"), (3723.0, "1:02:03")])
def test_duration_in_seconds_is_shown_in_minutes(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (7, "7 s"), (43, "45 s"), (95, "2 min"), (540, "9 min"), (9000, "2.5 h")]
)
def test_span_is_as_exact_as_an_estimate(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_sentence_without_stop_gets_one() -> None:
    assert [sentence(text) for text in ("a", "a. ", "a?", "a!")] == ["a.", "a.", "a?", "a!"]


def test_counted_and_size_have_units() -> None:
    assert counted(1, "task") == "1 task"
    assert counted(0, "task") == "0 tasks"
    assert size(999) == "999 B"
    assert size(9_800_000_000) == "9.8 GB"
