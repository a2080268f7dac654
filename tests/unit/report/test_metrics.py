"""The metrics file, as Prometheus' own parser reads it, whatever is in the labels and in the file before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from builder.report import metrics

NASTY = 'a "quoted" \\ path\nof two lines \udcff'


def sample(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    families = list(text_string_to_metric_families(text))
    return [(dict(one.labels), one.value) for family in families for one in family.samples if one.name == name]


def test_samples_have_escaped_labels_and_types(tmp_path: Path) -> None:
    samples = metrics.Samples({"manifest": NASTY, "cache": "/data"})
    samples.add("refresh_tasks", 2, state="warm")
    samples.add("refresh_duration_seconds", 1.5)
    metrics.write(tmp_path / "m.prom", samples)
    text = (tmp_path / "m.prom").read_text()
    ((labels, value),) = sample(text, "warm_cache_refresh_tasks")
    assert labels == {"manifest": 'a "quoted" \\ path\nof two lines ?', "cache": "/data", "state": "warm"}
    assert value == 2
    assert sample(text, "warm_cache_refresh_duration_seconds")[0][1] == 1.5
    assert {family.type for family in text_string_to_metric_families(text)} == {"gauge"}
    assert (tmp_path / "m.prom").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["m.prom"]


def test_samples_not_measured_are_kept_from_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "m.prom"
    first = metrics.Samples({"cache": "/data"})
    first.add(metrics.SUCCESS, 1000)
    first.add("entries", 7, family="triton")
    metrics.write(path, first)
    second = metrics.Samples({"cache": "/data"})
    second.keep(metrics.before(path), (metrics.SUCCESS, *metrics.CONTENTS))
    second.add("refresh_exit_code", 11)
    metrics.write(path, second)
    text = path.read_text()
    assert sample(text, f"warm_cache_{metrics.SUCCESS}") == [({"cache": "/data"}, 1000)]
    assert sample(text, "warm_cache_entries") == [({"cache": "/data", "family": "triton"}, 7)]
    other = metrics.Samples({"cache": "/data2"})
    other.keep(text, (metrics.SUCCESS,))
    assert sample(other.text(), f"warm_cache_{metrics.SUCCESS}") == []


def test_write_below_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such directory"):
        metrics.write(tmp_path / "typo" / "m.prom", metrics.Samples({}))
    assert list(tmp_path.iterdir()) == []
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        metrics.write(tmp_path / "pipe", metrics.Samples({}))
    assert (tmp_path / "pipe").is_fifo(), "root would lose its /dev/null"
    (tmp_path / "m.prom").mkdir()
    assert metrics.before(tmp_path / "m.prom") == ""
