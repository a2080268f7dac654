"""tests/engine/README.md has the rows that the tests of faults and attacks have, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import attacks, faults


def test_fault_table_equals_marks_of_tests() -> None:
    wanted = [[row.fault, row.how, row.holds, f"`{row.test}`"] for row in faults.rows()]
    assert [[*row[:3], row[4]] for row in faults.written()] == wanted, "make faults writes it again"
    assert len(wanted) > 30


def test_fault_table_every_row_has_seconds() -> None:
    assert [row for row in faults.written() if not float(row[3]) > 0] == []


def test_fault_table_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [faults.Row("a | b", "`| head`", "0", "test_x.test_y"), faults.Row("c", "d", "11", "test_x.test_z")]
    monkeypatch.setattr(faults, "TABLE", tmp_path / "README.md")
    faults.TABLE.write_text(faults.table(rows, {"test_x.test_y": 1.26}, {"test_x.test_z": "2.0"}), encoding="utf-8")
    assert faults.written() == [
        ["a | b", "`| head`", "0", "1.3", "`test_x.test_y`"],
        ["c", "d", "11", "2.0", "`test_x.test_z`"],
    ]


def test_attack_table_equals_marks_of_tests() -> None:
    text = attacks.TABLE.read_text(encoding="utf-8")
    assert text.endswith(attacks.section(attacks.attacks())), "python3 -m tests.engine.attacks writes it again"
