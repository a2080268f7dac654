"""Files for GitHub's runner. Texts come from pull requests: none of them becomes markup or another output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from builder.errors import BuilderError, ColdError, PreflightError, TasksError
from builder.report import github
from builder.report.results import Report, TaskResult
from tests.actions import entries

HOSTILE = (
    "| x | <img src=x onerror=alert(1)> [click](javascript:alert(1)) `code` **bold** _it_ @team #1 "
    "https://evil.example www.evil.example\n\n# heading\r\n::error::no\n<!-- --> &lt; \\| \x1b[31mred \u202e"
)


def report(*states: str, verb: str = "check") -> Report:
    tasks = [TaskResult(f"task-{at}", "org/model", "k", state, "why") for at, state in enumerate(states)]
    return Report(verb, image_ref="lmsysorg/sglang:v0.5.23", toolchain="4be1c0a97d21f3e8", cache="/jit", tasks=tasks)


@pytest.fixture
def environ(tmp_path: Path) -> Mapping[str, str]:
    names = ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
    return {"GITHUB_ACTIONS": "true", **{name: str(tmp_path / name) for name in names}}


@pytest.mark.parametrize(
    ("states", "status", "error", "state"),
    [
        (("warm", "warm"), 0, None, "warm"),
        (("warm", "warmed"), 0, None, "warm"),
        (("warm", "cold"), 10, ColdError("1 of 2 tasks cold"), "cold"),
        (("warm", "cold"), 0, None, "cold"),
        (("warm", "failed"), 11, TasksError("1 failed"), "failed"),
        ((), 12, PreflightError("no engine"), "failed"),
        (("cold",), 17, BuilderError("never idle"), "deferred"),
    ],
)
def test_state_of_a_run_is_one_word(
    environ: Mapping[str, str], states: tuple[str, ...], status: int, error: BuilderError | None, state: str
) -> None:
    assert github.write_files(report(*states), status, error, environ) == []
    found = entries(Path(environ["GITHUB_OUTPUT"]).read_text())
    assert found == {"state": state, "toolchain": "4be1c0a97d21f3e8"}
    assert f"warm-cache check: {state}" in Path(environ["GITHUB_STEP_SUMMARY"]).read_text()


def test_summary_has_the_table() -> None:
    text = github.summary(report("warm", "failed", verb="warm"), 11, TasksError("1 failed of 2 tasks"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| task | state | time | entries | verified | note |"
    assert re.fullmatch(r"\|( --- \|){6}", rows[1])
    assert rows[2].startswith("| task-0 | ✅ warm | – | – |") and rows[3].startswith("| task-1 | ❌ failed |")
    assert "**1 failed of 2 tasks** (exit 11)" in text


def test_text_with_markup_is_escaped() -> None:
    found = report("failed")
    found.tasks[0].label = found.tasks[0].reason = found.cache = found.image_ref = HOSTILE
    found.warnings.append(HOSTILE)
    text = github.summary(found, 11, TasksError(HOSTILE))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and all(row.count("|") == 7 for row in rows)
    plain = re.sub(r"&#\d+;", "", text)
    for sign in ("<", ">", "`", "[", "]", "@", "http:", "https:", "www.", "_", "\\", "\x1b", "\u202e"):
        assert sign not in plain, sign
    assert [line for line in text.splitlines() if line.startswith(("#", "::"))] == ["### ❌ warm-cache check: failed"]


def test_summary_of_many_tasks_is_cut() -> None:
    found = report(*["failed"] * 600)
    for task in found.tasks:
        task.reason = HOSTILE * 50
    assert len(github.summary(found, 11, TasksError("x")).encode()) < 1 << 20


@pytest.mark.parametrize("value", ["plain", "two\nlines", "a\nEVIL=1\n", "end\r\nx", ""])
def test_variable_with_newlines_stays_one_variable(value: str) -> None:
    assert entries(github.variable("NAME", value)).keys() == {"NAME"}


def test_write_files_outside_github_writes_nothing(environ: Mapping[str, str], tmp_path: Path) -> None:
    assert github.write_files(report("warm"), 0, None, {**environ, "GITHUB_ACTIONS": ""}) == []
    github.write_files(report("warm", verb="explain"), 0, None, environ)
    assert list(tmp_path.iterdir()) == [] or not any(path.stat().st_size for path in tmp_path.iterdir())


def test_outputs_of_env_are_docker_arguments() -> None:
    found = report(verb="env")
    found.text = "--mount type=bind,src=/a,dst=/jit,readonly -e A=b"
    assert github.outputs(found, 0, None) == {}
    found.docker_arguments = True
    assert github.outputs(found, 0, None) == {"docker-args": found.text}


def test_write_files_that_cannot_be_written_are_warnings(environ: Mapping[str, str], tmp_path: Path) -> None:
    (problem,) = github.write_files(report("warm"), 0, None, {**environ, "GITHUB_OUTPUT": str(tmp_path)})
    assert problem.startswith("GITHUB_OUTPUT could not be written: ")


def test_summary_has_a_time_line_and_families_with_no_name_interpreted() -> None:
    found = report("warmed", "failed", "warm", verb="warm")
    for at, task in enumerate(found.tasks[:2]):
        task.began, task.seconds, task.gpus = 1.8e9 + at * 60, 90.4, (at, at + 1)
        task.added, task.added_bytes, task.entries = {"deep_gemm": 2, HOSTILE: 1}, {"deep_gemm": 1000}, {"deep_gemm": 9}
        task.label = f"{HOSTILE}\n```\n{at}"
    text = github.summary(found, 11, TasksError("1 failed of 3 tasks"))
    block = re.search(r"```mermaid\n(.*?)\n```", text, re.DOTALL)
    assert block
    assert re.fullmatch(
        r"gantt\n    dateFormat X\n    axisFormat %H:%M:%S\n"
        r"    section GPU 0 1\n    [\w ./+=-]{1,60} :done, 1800000000, 1800000090\n"
        r"    section GPU 1 2\n    [\w ./+=-]{1,60} :crit, 1800000060, 1800000150",
        block[1],
    )
    assert "\n| deep&#95;gemm | 4 | 2&#46;0 kB | 2 |\n" in text
    assert text.count("```") == 2
    assert "<img" not in text
