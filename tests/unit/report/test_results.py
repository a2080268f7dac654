"""What people and machines are told at the end of a run."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest

from builder.errors import PreflightError, Problem
from builder.report.console import Console
from builder.report.results import Report, TaskResult
from builder.report.tables import TASK_COLUMNS, families, task_table
from builder.text import counted, duration, sentence, size


def console(**options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, terminal=options.pop("terminal", False), **options), stream


RESULTS = [
    TaskResult(
        "V3-tp8",
        "deepseek-ai/V3",
        "0a",
        "warm",
        entries={"deep_gemm": 412},
        proof="verified",
        verified=True,
        since="2026-11-23",
    ),
    TaskResult(
        "V3.2-tp8",
        "deepseek-ai/V3.2",
        "0b",
        "warmed",
        seconds=221.0,
        added={"deep_gemm": 518},
        proof="verified",
        verified=True,
    ),
    TaskResult(
        "Flash-tp4",
        "x/Flash",
        "0c",
        "failed",
        'crash: "Scheduler hit an exception"',
        seconds=52.2,
        proof="verified",
        verified=True,
        log="logs/Flash-tp4.log",
    ),
]


def test_a_piped_table_keeps_one_line_a_task_and_no_colour() -> None:
    out, stream = console()
    out.table(TASK_COLUMNS, task_table(RESULTS))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "\x1b" not in stream.getvalue()
    assert lines[1].split() == ["V3-tp8", "warm", "–", "412", "deep_gemm", "yes", "since", "2026-11-23"]
    assert lines[2].split() == ["V3.2-tp8", "warmed", "3:41", "+518", "deep_gemm", "0", "new"]
    assert lines[0].split() == ["task", "state", "time", "entries", "verified", "note"]
    assert lines[3].endswith('  –         crash: "Scheduler hit an exception"')


def test_a_terminal_table_fits_its_width() -> None:
    stream = io.StringIO()
    Console(stream, terminal=True, width=80).table(TASK_COLUMNS, task_table(RESULTS))
    assert "\x1b[" in stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, plain)) <= 80


def test_github_groups_and_annotations_cannot_be_broken_out_of() -> None:
    out, stream = console(github=True)
    with out.group("task\n::error::not ours"):
        out.log("out", "::set-output name=x::y")
        out.log("err", "##[error]no")
    out.annotate("task: a, b", "50%\nof it")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "::group::task%0A::error::not ours"
    assert lines[1] == "  │ ::set-output name=x::y"
    assert lines[2] == "  ┃ ## [error]no"
    assert lines[3:] == ["::endgroup::", "::error title=task%3A a%2C b::50%25%0Aof it"]


def test_in_github_nothing_foreign_is_a_command() -> None:
    out, stream = console(github=True)
    foreign = TaskResult("::x", "org/x", "0d", "failed", "##[error]no")
    out.table(TASK_COLUMNS, task_table([foreign]))
    out.say("crash\n  ::error::no\r::error::no\n\u3000::error::no")
    out.say("a::b")
    with out.group("##[group]x"):
        out.annotate("##[y]", "##[error]z")
    lines = re.split("[\r\n]", stream.getvalue())
    assert [line for line in lines if line.lstrip().startswith("::")] == [
        "::group::## [group]x",
        "::error title=## [y]::## [error]z",
        "::endgroup::",
    ]
    assert "##[" not in stream.getvalue()
    assert "  : :error::no" in lines and "a::b" in lines


def test_the_document_is_no_command_either() -> None:
    report = Report("warm", tasks=[TaskResult("x", "org/x", "0d", "failed", "##[error]no")])
    text = report.document(11, None)
    assert "##[" not in text
    assert json.loads(text)["tasks"][0]["reason"] == "##[error]no"


def test_outside_github_nothing_looks_like_a_command() -> None:
    out, stream = console()
    with out.group("title"):
        out.annotate("title", "text")
    assert stream.getvalue() == "title\n"


def test_a_closed_stream_ends_the_display_and_nothing_else() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    out = Console(Broken(), terminal=False)
    out.say("one")
    out.say("two")
    assert out.closed


def test_the_document_says_everything_once() -> None:
    report = Report("warm", "image:1", "sha256:1", "4be1", "/data", tasks=list(RESULTS), seconds=1214.5)
    document = json.loads(report.document(11, None))
    assert document["schema"] == 1 and document["verb"] == "warm" and document["exit"] == 11
    assert document["image"] == {"ref": "image:1", "id": "sha256:1"}
    assert [task["state"] for task in document["tasks"]] == ["warm", "warmed", "failed"]
    assert document["tasks"][1]["entries_added"] == 518
    assert document["tasks"][1]["verified"] is True
    assert [task["proof"] for task in document["tasks"]] == ["verified", "verified", None]
    assert document["tasks"][2]["verified"] is False
    assert {"model", "key", "state", "reason", "seconds", "entries_added", "verified"} <= set(document["tasks"][0])


def test_the_document_lists_every_problem() -> None:
    error = PreflightError("no", [Problem("GPUs", "none", "Buy some."), Problem("disk", "full")])
    document = json.loads(Report("doctor").document(12, error))
    assert [problem["place"] for problem in document["error"]["problems"]] == ["GPUs", "disk"]


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (0.4, "0:00"), (221.0, "3:41"), (3723.0, "1:02:03")])
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_sentence_ends() -> None:
    assert [sentence(text) for text in ("a", "a. ", "a?", "a!")] == ["a.", "a.", "a?", "a!"]


def test_counts_and_sizes() -> None:
    assert counted(1, "task") == "1 task"
    assert counted(0, "task") == "0 tasks"
    assert size(999) == "999 B"
    assert size(9_800_000_000) == "9.8 GB"
    assert families({"triton": 3, "deep_gemm": 518, "quack": 0}, "+") == "+518 deep_gemm, +3 triton"
    sizes = {"triton": 40_100, "deep_gemm": 51_200_000}
    told = families({"triton": 3, "deep_gemm": 518, "quack": 0}, "+", sizes)
    assert told == "+518 deep_gemm (51.2 MB), +3 triton (40.1 kB)"
    assert families({}) == "–"


def test_a_task_that_was_warmed_with_dummies_says_so() -> None:
    made: dict[str, Any] = {"label": "l", "model": "m", "key": "k", "loaded": "dummy weights, 4 layers"}
    assert TaskResult(**made, state="warmed").note == "with dummy weights, 4 layers"
    assert TaskResult(**made, state="warm", since="2026-11-23").note == "since 2026-11-23, with dummy weights, 4 layers"
    assert TaskResult(**made, state="failed", reason="crash").note == "crash"
    assert TaskResult("l", "m", "k", "warmed", loaded="weights").note == ""
