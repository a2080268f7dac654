"""`fleet summary`: one line for each run, and the one status that matters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from builder.cli import main as cli
from builder.fleet import summary
from builder.report.results import Report, TaskResult


def written(path: Path, status: int, **states: str) -> str:
    report = Report("warm", image_ref="tiny:1")
    report.tasks = [TaskResult(label, label, "", state) for label, state in states.items()]
    path.write_text(report.document(status, None))
    return str(path)


def test_deferred_run_does_not_hide_a_failed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        written(tmp_path / "h1.json", 0, one="warm", two="warmed"),
        written(tmp_path / "h2.json", 17, one="cold"),
        written(tmp_path / "h3.json", 11, one="failed", two="warm"),
    ]
    assert cli.main(["fleet", "summary", *names], environ={}) == 11
    said = capsys.readouterr().out
    assert "1 warm, 1 warmed" in said and "1 failed, 1 warm" in said
    assert f"not warm: one ({names[1]}), one ({names[2]})" in said
    assert said.rstrip().endswith("3 reports, exit 11")


@pytest.mark.parametrize(
    ("statuses", "counts"),
    [
        ([0, 0], 0),
        ([17, 0], 17),
        ([17, 15, 0], 15),
        ([17, 15, 10], 10),
        ([11, 14], 14),
        ([12, 11], 11),
        ([2, 12], 12),
        ([16, 13, 11], 16),
        ([1, 16], 1),
        ([1, 143, 130], 143),
        ([17, None], 11),
        ([0, 99], 99),
        ([], 0),
    ],
)
def test_status_that_counts(statuses: list[int | None], counts: int) -> None:
    reports = [summary.RunReport(str(at), status) for at, status in enumerate(statuses)]
    assert summary.status_of(reports) == counts


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the report is empty: the run was killed"),
        ("{", "no report of warm-cache --json"),
        ("[]", "no report of warm-cache --json"),
        ('{"exit": true}', "no report of warm-cache --json"),
        ('{"exit": 256}', "no report of warm-cache --json"),  # which a process would end with as 0
        ('{"exit": -256}', "no report of warm-cache --json"),
        (f'{{"exit": 0, "seconds": 1{"0" * 390}}}', ""),
        ("[" * 100_000, "no report of warm-cache --json"),
        ('{"exit": 0, "tasks": [{"state": 3}, 4], "seconds": "x", "image": 1, "error": []}', ""),
    ],
)
def test_run_without_a_report_counts_as_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    path = tmp_path / "h1.json"
    path.write_text(text)
    assert cli.main(["fleet", "summary", str(path)], environ={}) == (11 if why else 0)
    assert why in capsys.readouterr().out


def test_files_that_cannot_be_read_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fleet", "summary", str(tmp_path / "a"), str(tmp_path / "b")], environ={}) == 2
    assert capsys.readouterr().err.count("No such file") == 2
    assert cli.main(["fleet", "summary"], environ={}) == 2
    assert "fleet summary needs a REPORT: the documents that warm-cache --json wrote" in capsys.readouterr().err


@pytest.mark.attack(
    "a pipe or a directory is in the place of a run's report, or the report has a status that no process has (256)",
    by="other user",
    holds="it is not opened, and counts as a run without a report: 11; the other reports are summed up",
)
def test_what_is_no_report_hides_no_other_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    good = written(tmp_path / "h1.json", 0, one="warm")
    forged = written(tmp_path / "h2.json", 256, two="warm")
    names = [good, str(tmp_path / "pipe.json"), str(tmp_path), forged]
    assert cli.main(["fleet", "summary", *names], environ={}) == 11
    said = capsys.readouterr().out
    assert said.count("it is not a regular file") == 2 and "1 warm" in said and "2 warm" not in said


def test_names_in_reports_cannot_command_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = written(tmp_path / "h1.json", 11, **{"one\x1b[2J": "failed"})
    assert cli.main(["fleet", "summary", name], environ={}) == 11
    assert "\x1b" not in capsys.readouterr().out


def test_summary_is_a_document_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = written(tmp_path / "h1.json", 143, one="cold")
    assert cli.main(["fleet", "summary", "--json", name], environ={}) == 143
    document = json.loads(capsys.readouterr().out)
    assert document["exit"] == 143
    assert document["reports"][0]["states"] == {"cold": 1} and document["reports"][0]["failed"] == ["one"]
