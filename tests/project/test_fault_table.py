"""tests/engine/README.md has the rows that the tests of faults have, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import faults


def test_the_table_of_faults_is_that_of_the_tests() -> None:
    wanted = [[row.fault, row.how, row.holds, f"`{row.test}`"] for row in faults.rows()]
    assert [[*row[:3], row[4]] for row in faults.written()] == wanted, "make faults writes it again"
    assert len(wanted) > 30


def test_every_row_has_been_measured() -> None:
    assert [row for row in faults.written() if not float(row[3]) > 0] == []


def test_a_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [faults.Row("a | b", "`| head`", "0", "test_x.test_y"), faults.Row("c", "d", "11", "test_x.test_z")]
    monkeypatch.setattr(faults, "TABLE", tmp_path / "README.md")
    faults.TABLE.write_text(faults.table(rows, {"test_x.test_y": 1.26}, {"test_x.test_z": "2.0"}), encoding="utf-8")
    assert faults.written() == [
        ["a | b", "`| head`", "0", "1.3", "`test_x.test_y`"],
        ["c", "d", "11", "2.0", "`test_x.test_z`"],
    ]
