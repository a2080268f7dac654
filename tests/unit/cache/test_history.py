"""The history of a root: what is read back, how large it gets, and what other users may have put in its place."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.cache import history, layout
from builder.cache.history import HistoryLine


def line(number: int = 0, **others: object) -> HistoryLine:
    values = {"run": "r", "stage": "task", "label": f"t{number}", "state": "warmed", "began": 1e9 + number}
    return HistoryLine(**{**values, "seconds": 1.5, **others})  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layout.prepare(tmp_path / "root")
    return tmp_path / "root"


def test_lines_are_read_as_written(root: Path) -> None:
    first, second = line(1, gpus=(2, 3), added={"triton": 3}), line(2, reason="a\x1b[2Jb\n" + "é" * 500)
    history.add(root, first)
    history.add(root, second)
    found = history.read(root)
    assert found.damaged == 0
    assert found.lines[0] == first
    assert found.lines[1].reason.startswith("a\\x1b[2Jb\\n")
    assert len(found.lines[1].reason) <= 201


def test_file_is_bounded_and_keeps_the_newest_lines(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LIMIT", 32 << 10)
    (root / history.NAME).write_bytes(json.dumps({"run": "old"}).encode().ljust(1000) + b"\n")
    for number in range(300):
        history.add(root, line(number, reason="x" * 150))
    assert (root / history.NAME).stat().st_size <= history.LIMIT
    found = history.read(root)
    assert found.damaged == 0
    assert found.lines[-1].label == "t299"
    assert [each.label for each in found.lines] == [f"t{300 - len(found.lines) + n}" for n in range(len(found.lines))]


def test_writers_at_the_same_time_lose_no_line(root: Path) -> None:
    def write(at: int) -> None:
        for number in range(50):
            history.add(root, line(at * 50 + number))

    threads = [threading.Thread(target=write, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history.read(root).lines) == 200


def test_damaged_lines_are_counted_and_never_break_a_reader(root: Path) -> None:
    history.add(root, line(1))
    with (root / history.NAME).open("ab") as file:
        for raw in (b"\xff\xfe", b"[" * 100_000, b"{}", b'{"began": 1e400}', b"x" * 10_000, b'{"run": "half'):
            file.write(raw + b"\n")
        good = {"run": "r", "stage": "task", "label": "later", "state": "new", "began": 2e9, "seconds": 1, "more": []}
        for bad in ({"began": -1}, {"seconds": "1"}, {"began": 1e30}, {"added": {"x": "y"}}, {"gpus": [1.5]}):
            file.write(json.dumps({**good, **bad}).encode() + b"\n")
        file.write(json.dumps(good).encode() + b"\n" + b'{"run": "cut')
    history.add(root, line(2))
    found = history.read(root)
    assert [each.label for each in found.lines] == ["t1", "t2", "later"]
    assert found.damaged == 12


def test_what_is_no_file_is_neither_followed_nor_waited_for(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    target.write_text("theirs\n")
    place = root / history.NAME
    plants: list[Callable[[], None]] = [lambda: place.symlink_to(target), lambda: os.mkfifo(place), place.mkdir]
    for plant in plants:
        plant()
        history.add(root, line())
        assert history.read(root).lines == ()
        assert "cannot be read" in history.read(root).problem
        assert target.read_text() == "theirs\n"
        place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
    assert history.read(root) == history.History()
