"""When a marker was last of use."""

from __future__ import annotations

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
