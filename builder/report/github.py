"""Files of GitHub Actions: the job summary in Markdown, outputs for later steps, variables.

Texts come from containers, caches and manifests of pull requests, so none of them may become markup, another output or
another variable. A file that cannot be written is a warning.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from builder.errors import BudgetError, BuilderError, ColdError, DeferredError, ProblemsError, TasksError, UsageError
from builder.host import outside
from builder.host.outside import GiveUp, StuckError, never
from builder.report.console import Console
from builder.report.results import Report, TaskResult
from builder.report.tables import TASK_COLUMNS, task_table
from builder.text import counted, readable, sentence, size

#: Verbs with a job summary and outputs.
REPORTED = ("warm", "check", "refresh")
_OUTPUTS = "GITHUB_OUTPUT"
_SUMMARY = "GITHUB_STEP_SUMMARY"
#: Seconds that each file has to take what is written to it.
TIMEOUT = 5.0
#: A line of a file, as problems of a manifest are located; and annotations that GitHub shows of one step, less one.
_LINE, _ANNOTATIONS = re.compile(r"(.+):(\d+)"), 9
#: GitHub drops a step's summary above 1 MiB.
_LONGEST_CELL, _MOST_ROWS, _MOST_FAMILIES = 600, 500, 40
#: Mermaid draws no diagram of more than 50,000 characters.
_MOST_BARS, _LONGEST_NAME = 200, 60
#: Characters of a name that Mermaid, or the end of its block, could interpret.
_NO_NAME = re.compile(r"[^A-Za-z0-9 ./+=_-]")
#: Characters that Markdown, its tables, autolinks, mentions or HTML could interpret.
_MARKUP = re.compile(r"[^\w ,/=%–×·…-]|_")

_SIGNS = {
    "warm": "✅",
    "warmed": "✅",
    "cold": "🟡",
    "deferred": "🟡",
    "partial": "🟡",
    "skipped": "🟡",
    "failed": "❌",
}


def write_files(
    report: Report,
    status: int,
    error: BuilderError | None,
    environ: Mapping[str, str],
    give_up: GiveUp = never,
) -> list[str]:
    """Append to the files that the runner named; return one sentence per file that could not be written.

    give_up: ends the wait for a file that takes nothing before TIMEOUT.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return []
    values = outputs(report, status, error)
    written = {
        _OUTPUTS: "".join(f"{variable(name, value)}\n" for name, value in values.items()),
        _SUMMARY: summary(report, status, error) if report.verb in REPORTED else "",
    }
    problems = []
    for name, text in written.items():
        if text and environ.get(name):
            path, data = Path(environ[name]), text.encode("utf-8", "backslashreplace")
            try:
                outside.call(functools.partial(_append, path, data), "it", TIMEOUT, give_up=give_up)
            except (OSError, ValueError, StuckError) as failed:
                why = failed.strerror if isinstance(failed, OSError) else str(failed)
                problems.append(f"{name} could not be written: {why}")
    return problems


def annotate(console: Console, report: Report, error: BuilderError, rank: Callable[[str], int], workspace: str) -> None:
    """Annotate a run that failed: once, with the costliest reason; or each line of a manifest that is wrong.

    rank: of a family by what compiling it costs, 0 for the costliest. workspace: of the runner.
    """
    worst = report.worst(rank) if isinstance(error, (TasksError, ColdError, BudgetError)) else None
    if worst is not None:
        console.annotate(f"{worst.label} {worst.state}", f"{worst.reason}\n{error.message}")
        return
    left, problems = [], error.problems if isinstance(error, ProblemsError) else ()
    for number, problem in enumerate(problems):
        shown = sentence(f"{problem.text} {problem.remedy}")
        place = _LINE.fullmatch(problem.location) if isinstance(error, UsageError) else None
        if place and number < _ANNOTATIONS:
            file = os.path.abspath(place[1]).removeprefix(workspace.rstrip("/") + "/")
            console.annotate("warm-cache", shown, file=file, line=int(place[2]))
        else:
            left.append(f"{problem.location}: {shown}")
    if left or not problems:
        console.annotate("warm-cache", "\n".join([error.message, *left]))


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def outputs(report: Report, status: int, error: BuilderError | None) -> dict[str, str]:
    """Return the outputs for later steps: ``state``, ``toolchain``, and for env ``docker-args``."""
    if report.verb == "env":
        return {"docker-args": report.text} if report.text and report.docker_arguments else {}
    if report.verb not in REPORTED:
        return {}
    return {"state": state(report, status, error), "toolchain": report.toolchain or ""}


def state(report: Report, status: int, error: BuilderError | None) -> str:
    """Return warm, cold, failed or deferred. Only a check is cold; a run that left a task cold has failed."""
    if status == DeferredError.exit_code:
        return "deferred"
    if isinstance(error, ColdError) or (not status and report.count("cold")):
        return "cold"
    return "failed" if status else "warm"


def summary(report: Report, status: int, error: BuilderError | None) -> str:
    """Return the job summary: state, facts, error, warnings, and the tasks as a table."""
    word = state(report, status, error)
    lines = [f"### {_SIGNS[word]} warm-cache {report.verb}: {word}", ""]
    facts = [
        f"toolchain {report.toolchain}" if report.toolchain else "",
        report.image_ref,
        f"cache {report.cache}" if report.cache else "",
    ]
    lines += [" · ".join(text(fact) for fact in facts if fact), ""]
    if error is not None:
        lines += [f"**{text(error.message)}** (exit {status})", ""]
        if isinstance(error, ProblemsError):
            lines += [
                f"- {text(problem.location)}: {text(f'{problem.text} {problem.remedy}')}" for problem in error.problems
            ]
            lines.append("")
    lines += [f"⚠️ {text(warning)}\n" for warning in report.warnings]
    if report.tasks:
        lines += [_row(TASK_COLUMNS), _row(["---"] * len(TASK_COLUMNS))]
        for row in task_table(report.tasks[:_MOST_ROWS]):
            label, word, *rest = (text(cell) for cell in row)
            lines.append(_row([label, f"{_SIGNS.get(word, '')} {word}".strip(), *rest]))
        if len(report.tasks) > _MOST_ROWS:
            lines += ["", f"and {counted(len(report.tasks) - _MOST_ROWS, 'more task')}"]
        lines += [*_families(report), *_gantt(report)]
    return "\n".join(lines) + "\n\n"


def _families(report: Report) -> list[str]:
    """Return a table of what the run added, by family; nothing where it added nothing."""
    names = sorted({name for task in report.tasks for name, number in task.added.items() if number})
    if not names:
        return []
    lines = ["", _row(("family", "compiled", "bytes", "tasks that need it")), _row(["---"] * 4)]
    for name in names[:_MOST_FAMILIES]:
        added = sum(task.added.get(name, 0) for task in report.tasks)
        room = sum(task.added_bytes.get(name, 0) for task in report.tasks)
        using = sum(name in task.entries for task in report.tasks)
        lines.append(_row([text(name), str(added), text(size(room)), str(using)]))
    return lines


def _gantt(report: Report) -> list[str]:
    """Return a Mermaid diagram of which task ran when, on which GPUs; nothing where fewer than two tasks ran."""
    ran = [task for task in report.tasks if task.began is not None and task.seconds is not None]
    if len(ran) < 2:
        return []
    lines = ["", "```mermaid", "gantt", "    dateFormat X", "    axisFormat %H:%M:%S"]
    places: dict[str, list[TaskResult]] = {}
    for task in sorted(ran[:_MOST_BARS], key=lambda task: (list(task.gpus), task.began)):
        places.setdefault(f"GPU {' '.join(map(str, task.gpus))}" if task.gpus else "no GPU", []).append(task)
    for place, tasks in places.items():
        lines.append(f"    section {place}")
        for task in tasks:
            began, mark = int(task.began or 0), "crit" if task.state == "failed" else "done"
            ended = began + max(1, round(task.seconds or 0))
            name = _NO_NAME.sub(" ", task.label)[:_LONGEST_NAME].strip() or "task"
            lines.append(f"    {name} :{mark}, {began}, {ended}")
    return [*lines, "```"]


def text(raw: str) -> str:
    """Return Markdown that shows this text on one line, with no character interpreted."""
    shown = readable(" ".join(raw.split()))
    if len(shown) > _LONGEST_CELL:
        shown = shown[:_LONGEST_CELL] + "…"
    # A character reference is text everywhere; a backslash would be shown in a code span and in a table.
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", shown)


def variable(name: str, value: str) -> str:
    """Return one entry of a file of variables or outputs; a value of several lines gets a random delimiter."""
    if "\n" not in value and "\r" not in value:
        return f"{name}={value}"
    end = f"end-{os.urandom(12).hex()}"
    return f"{name}<<{end}\n{value}\n{end}"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
