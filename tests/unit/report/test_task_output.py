"""Output of a task among the output of others."""

from __future__ import annotations

import io

from builder.report.console import Console
from builder.report.task_output import KEPT, open_output


def test_output_in_github_of_a_concurrent_task_is_one_group() -> None:
    stream = io.StringIO()
    console = Console(stream, terminal=False, github=True)
    with open_output(console, "[1/2] a", "a", concurrent=True) as output:
        for number in range(KEPT + 5):
            output.log("out", f"::error::{number}")
        output.finish("a: failed: why")
        console.say("another line")
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["[1/2] a begins", "another line", "::group::[1/2] a"]
    assert lines[3:5] == ["the first 5 lines are in the log file only", "  │ ::error::5"]
    assert lines[-2:] == ["::endgroup::", "a: failed: why"]


def test_output_elsewhere_of_a_concurrent_task_labels_each_line() -> None:
    stream = io.StringIO()
    with open_output(Console(stream, terminal=False), "[1/2] a", "a", concurrent=True) as output:
        output.log("err", "x")
        output.remark("second pass")
    assert stream.getvalue() == "[1/2] a\n  ┃ a: x\n  ▸ a: second pass\n"


def test_tail_is_repeated_below_a_collapsed_group_alone() -> None:
    """Where the lines of the log were in sight, they are not written again."""
    for github, concurrent in ((True, True), (True, False), (False, True), (False, False)):
        stream = io.StringIO()
        console = Console(stream, terminal=False, github=github)
        with open_output(console, "[1/2] a", "a", concurrent=concurrent) as output:
            output.log("out", "first")
            output.log("out", "second")
            output.finish("a: failed: why", ["second"])
        text = stream.getvalue()
        assert text.count("second") == 1 + github
        if github:
            assert text.endswith("::endgroup::\na: failed: why\nthe last line of its log:\n  │ second\n")
