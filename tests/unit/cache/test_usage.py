"""When a marker was last of use."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from builder.cache import marker_files, markers, usage
from tests.generations import DAY, Generations, task


@pytest.mark.parametrize("label", ["a", "another-label"])
def test_judge_warm_counts_as_use_of_marker(tmp_path: Path, label: str) -> None:
    made = Generations(tmp_path)
    if not usage.has_access_times(made.root):
        pytest.skip("this file system is mounted without access times")
    known = made.warmed(1, ["a"], days=20)
    (path,) = made.root.glob("markers/*/*.json")
    marker, written = str(path.relative_to(made.root)), path.stat().st_mtime
    assert time.time() - usage.last(made.root, marker, written) > 19 * DAY
    assert marker_files.read(path)  # reading the marker alone is no use
    assert time.time() - usage.last(made.root, marker, written) > 19 * DAY
    same_work = replace(task("a"), label=label)
    assert markers.judge(made.root, same_work, record=known, config_digest=None).state == "warm"
    assert time.time() - usage.last(made.root, marker, written) < DAY


@pytest.mark.attack(
    "`used`, or a folder in it, is a link to the markers",
    by="env",
    holds="no marker is written to; the stamp is not made, and the warm-up goes on",
)
@pytest.mark.parametrize("level", ["used", "used/folder"])
def test_stamp_through_a_link_is_not_written(tmp_path: Path, level: str) -> None:
    marker = tmp_path / "markers" / "folder" / "1.json"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")
    (tmp_path / level).parent.mkdir(exist_ok=True)
    (tmp_path / level).symlink_to(tmp_path / "markers" / level.removeprefix("used").lstrip("/"))
    before = marker.stat()
    usage.stamp(tmp_path, "markers/folder/1.json")
    usage.note(tmp_path, "markers/folder/1.json")
    usage.forget(tmp_path, "markers/folder/1.json")
    assert marker.read_text() == "{}" and marker.stat().st_mtime_ns == before.st_mtime_ns
    assert usage.last(tmp_path, "markers/folder/1.json", 5.0) == 5.0


def test_stamp_that_is_a_device_or_fifo_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "used" / "folder").mkdir(parents=True)
    os.mkfifo(tmp_path / "used" / "folder" / "1.json")
    usage.note(tmp_path, "markers/folder/1.json")
    usage.stamp(tmp_path, "markers/folder/1.json")  # would wait for a reader
