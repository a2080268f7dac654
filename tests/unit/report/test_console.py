"""The console: tables, groups and annotations, in a pipe, on a terminal and in GitHub Actions."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.report.console import Console
from builder.report.results import TaskResult
from builder.report.tables import TASK_COLUMNS, task_table
from tests.results import RESULTS
from tests.strategies import FUZZ, texts


def console(**options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, terminal=options.pop("terminal", False), **options), stream


def test_table_in_a_pipe_has_one_line_a_task_and_no_colour() -> None:
    out, stream = console()
    out.table(TASK_COLUMNS, task_table(RESULTS))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "\x1b" not in stream.getvalue()
    assert lines[1].split() == ["V3-tp8", "warm", "–", "412", "deep_gemm", "yes", "since", "2026-11-23"]
    assert lines[2].split() == ["V3.2-tp8", "warmed", "3:41", "+518", "deep_gemm", "0", "new"]
    assert lines[0].split() == ["task", "state", "time", "entries", "verified", "note"]
    assert lines[3].endswith('  –         crash: "Scheduler hit an exception"')


def test_table_on_a_terminal_fits_its_width() -> None:
    stream = io.StringIO()
    Console(stream, terminal=True, width=80).table(TASK_COLUMNS, task_table(RESULTS))
    assert "\x1b[" in stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, plain)) <= 80


def test_group_and_annotation_in_github_escape_their_text() -> None:
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


def test_text_in_github_is_never_a_command() -> None:
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
    assert r"  : :error::no\r::error::no" in lines and "a::b" in lines


@pytest.mark.parametrize("github", [False, True])
def test_control_characters_never_reach_the_stream(github: bool) -> None:
    harmful = "/jit\x1b[2J\x1b]0;title\x07\x9b1m\u202e\r\x00"
    out, stream = console(github=github)
    out.say(f"{harmful}\n\tstays")
    with out.group(harmful):
        out.log("out", harmful)
    out.collapsed(harmful, [harmful])
    out.annotate(harmful, harmful)
    out.table(["root"], [[harmful]])
    assert re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", stream.getvalue()) == []
    assert "\n\tstays\n" in stream.getvalue() and r"/jit\x1b[2J" in stream.getvalue()


def test_annotation_outside_github_writes_nothing() -> None:
    out, stream = console()
    with out.group("title"):
        out.annotate("title", "text")
    assert stream.getvalue() == "title\n"


def test_say_on_a_closed_stream_ends_the_display_only() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    out = Console(Broken(), terminal=False)
    out.say("one")
    out.say("two")
    assert out.closed


def test_terminal_in_github_has_no_live_lines() -> None:
    assert Console(io.StringIO(), terminal=True).terminal is not None
    assert Console(io.StringIO(), terminal=True, github=True).terminal is None


@FUZZ
@given(
    st.lists(st.one_of(texts, st.just("│ × –")), min_size=1), st.sampled_from(["ascii", "latin-1", "utf-8", "cp1252"])
)
def test_display_shows_after_any_text(said: list[str], encoding: str) -> None:
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding=encoding), terminal=False)
    for text in said:
        console.say(text)
    console.say("last")
    assert not console.closed
    assert raw.getvalue().endswith(b"last\n")
    assert raw.getvalue().count(b"\n") == len(said) + 1 + "".join(said).count("\n")
