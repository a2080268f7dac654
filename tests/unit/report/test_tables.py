"""How tables are drawn."""

from __future__ import annotations

import pytest

from builder.report import tables
from builder.report.tables import TASK_COLUMNS, table

COLUMNS = ("task", "state", "note")
ROWS = [["a-tp8", "failed", "crash: the scheduler hit an exception, and more words follow"], ["日本", "warm", ""]]


def test_table_without_width_keeps_one_line_a_row() -> None:
    lines = tables.table(COLUMNS, ROWS).split("\n")
    assert len(lines) == 3
    assert lines[1].endswith("and more words follow")
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("width", [40, 48, 80, 200])
def test_table_on_a_terminal_fits_its_width_and_keeps_every_word(width: int) -> None:
    lines = tables.table(COLUMNS, ROWS, width=width).split("\n")
    assert max(map(tables._width, lines)) <= width
    assert " ".join(" ".join(lines).split()).count("exception") == 1


def test_table_with_a_word_longer_than_its_column_is_cut_and_loses_nothing() -> None:
    word = "x" * 300
    lines = tables.table(("task", "note"), [["t", word]], width=40).split("\n")
    assert max(map(len, lines)) <= 40
    assert "".join(lines).count("x") == 300


def test_table_with_styles_colours_states_and_nothing_else() -> None:
    drawn = tables.table(COLUMNS, [["warm", "warm", "warm"]], width=80, styles=tables.STATE_STYLE)
    assert drawn.count("\x1b[32m") == 1


def test_table_narrower_than_possible_still_draws() -> None:
    assert tables.table(COLUMNS, ROWS, width=1)


def test_families_are_sorted_with_sign_and_size() -> None:
    counts = {"triton": 3, "deep_gemm": 518, "quack": 0}
    assert tables.families(counts, "+") == "+518 deep_gemm, +3 triton"
    sizes = {"triton": 40_100, "deep_gemm": 51_200_000}
    assert tables.families(counts, "+", sizes) == "+518 deep_gemm (51.2 MB), +3 triton (40.1 kB)"
    assert tables.families({}) == "–"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_table_of_tasks_fits_the_terminal_and_cuts_no_word(width: int) -> None:
    note = "crash: Scheduler hit an exception while it compiled"
    rows = [["DeepSeek-V3.2-tp8", "failed", "0:52", "+31 deep_gemm (1.2 MB)", "–", note]]
    drawn = table(TASK_COLUMNS, rows, width=width)
    assert max(map(len, drawn.splitlines())) <= width
    words = drawn.split()
    assert {"failed", "Scheduler", "exception", "compiled"} <= set(words)
    assert table(TASK_COLUMNS, rows, width=40, styles={"failed": "31"}).count("\x1b[31mfailed\x1b[0m") == 1
