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
    samples = metrics.Samples("refresh", {"manifest": NASTY, "cache": "/data"})
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
    first = metrics.Samples("refresh", {"cache": "/data"})
    first.add(metrics.SUCCESS, 1000)
    first.add("entries", 7, family="triton")
    metrics.write(path, first)
    second = metrics.Samples("refresh", {"cache": "/data"})
    second.keep(metrics.before(path))
    second.add("refresh_exit_code", 11)
    metrics.write(path, second)
    text = path.read_text()
    assert sample(text, f"warm_cache_{metrics.SUCCESS}") == [({"cache": "/data"}, 1000)]
    assert sample(text, "warm_cache_entries") == [({"cache": "/data", "family": "triton"}, 7)]
    other = metrics.Samples("refresh", {"cache": "/data2"})
    other.keep(text)
    assert sample(other.text(), f"warm_cache_{metrics.SUCCESS}") == []


def test_write_below_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such directory"):
        metrics.write(tmp_path / "typo" / "m.prom", metrics.Samples("refresh", {}))
    assert list(tmp_path.iterdir()) == []
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        metrics.write(tmp_path / "pipe", metrics.Samples("refresh", {}))
    assert (tmp_path / "pipe").is_fifo(), "root would lose its /dev/null"
    (tmp_path / "m.prom").mkdir()
    assert metrics.before(tmp_path / "m.prom") == ""


def test_verbs_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.prom"
    for verb, name, value in (("refresh", "refresh_tasks", 1), ("check", "check_exit_code", 10), ("check", "", 0)):
        samples = metrics.Samples(verb, {"cache": "/data"})  # type: ignore[arg-type]
        samples.keep(metrics.before(path))
        if name:
            samples.add(name, value)
        samples.add("build_info", 1, version=verb)
        metrics.write(path, samples)
    text = path.read_text()
    assert sample(text, "warm_cache_refresh_tasks") == [({"cache": "/data"}, 1)]
    assert sample(text, "warm_cache_check_exit_code") == []  # its own, and not measured now
    assert len(sample(text, "warm_cache_build_info")) == 1


def test_table_is_what_prometheus_takes() -> None:
    """Every metric with its labels is read by Prometheus' own parser, with its name and type."""
    assert len({metric.name for metric in metrics.TABLE}) == len(metrics.TABLE)
    for metric in metrics.TABLE:
        samples = metrics.Samples(metric.by[0], {"manifest": "m", "cache": "c"})
        samples.add(metric.name, 2, **dict.fromkeys(metric.labels, NASTY))
        (family,) = text_string_to_metric_families(samples.text())
        (one,) = family.samples
        assert (one.name, family.type) == (f"{metrics.PREFIX}{metric.name}", metric.type)
        assert set(one.labels) == {"manifest", "cache", *metric.labels}
        assert family.documentation == metric.help
        assert metric.name.endswith("_total") == (metric.type == "counter")
