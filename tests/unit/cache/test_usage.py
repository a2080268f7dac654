"""When a marker was last of use."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from builder.cache import marker_files, markers, usage
from tests.generations import DAY, Generations, task


def test_decide_counts_access_time_as_use(tmp_path: Path) -> None:
    made = Generations(tmp_path)
    if not usage.has_access_times(made.root):
        pytest.skip("this file system is mounted without access times")
    known = made.warmed(1, ["a"], days=20)
    (path,) = made.root.glob("markers/*/*.json")
    marker, written = str(path.relative_to(made.root)), path.stat().st_mtime
    assert time.time() - usage.last(made.root, marker, written) > 19 * DAY
    assert marker_files.read(path)  # anybody's look at it
    assert time.time() - usage.last(made.root, marker, written) > 19 * DAY
    assert markers.judge(made.root, task("a"), record=known, config_digest=None).state == "warm"
    assert time.time() - usage.last(made.root, marker, written) < DAY
