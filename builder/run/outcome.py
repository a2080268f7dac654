"""Decides what became of a task and of a run, for containers and for `--here`.

Only a marker of this run that holds on disk makes a task warmed, whatever its program reports.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from builder.cache.marker_format import VERIFIED
from builder.cache.markers import reservation
from builder.errors import CANNOT_RUN, BudgetError, EngineLostError, PreflightError, Problem, TasksError
from builder.events import Verdict
from builder.report.results import Report, TaskResult
from builder.report.task_output import TaskOutput
from builder.run.context import Context
from builder.run.executor import Execution, Executor
from builder.run.plan import Item, result_of
from builder.task import Task
from builder.text import counted, duration, readable, sentence

#: Why a program was ended before it had a verdict → the task's state, and the reason for people.
ENDED_EARLY = {
    "start": ("failed", "start: no output within {run.start:.0f} s of the container's start"),
    "timeout": ("failed", "timeout: not finished after {task.timeout:.0f} s"),
    "silence": ("failed", "silence: no output for {task.silence:.0f} s"),
    "budget": ("cold", "budget: the run's budget ended while it was compiling"),
    "cancelled": ("cold", "interrupted"),
    "lost": ("failed", "the engine was lost"),
}


def result_of_execution(executor: Executor, item: Item, execution: Execution) -> TaskResult:
    """Return the result of a task after the end of its program."""
    verdict = execution.verdict or Verdict()
    result = _judge(executor, item, execution, verdict)
    result.seconds, result.began = execution.seconds, time.time() - execution.seconds
    result.log = str(execution.log) if execution.log else None
    result.tail = execution.tail
    result.entries = {} if result.state == "cold" else verdict.entries  # those of a cold task may be another's
    result.added, result.added_bytes = verdict.added, verdict.added_bytes
    result.loaded = readable(verdict.loaded or "")
    if result.state != "warmed":
        result.proof = verdict.proof
    return result


def _judge(executor: Executor, item: Item, execution: Execution, verdict: Verdict) -> TaskResult:
    """Return the state of the task, with its reason."""
    if execution.ended in ENDED_EARLY:
        state, reason = ENDED_EARLY[execution.ended]
        if state == "cold" and item.warm:  # forced, and its entries still exist
            state = "warm"
        result = result_of(item, state, reason.format(task=item.task, run=executor.context.manifest.run))
        result.short_of_budget = execution.ended == "budget"
        return result
    if execution.verdict is None:
        return result_of(item, "failed", f"{execution.how} and gave no verdict")
    reason = readable(verdict.reason)
    if execution.oom and verdict.state != "warmed":
        reason = f"out of memory inside the container; {reason}"
    if verdict.state != "warmed":
        return result_of(item, "failed" if verdict.state == "stopped" else verdict.state, reason)
    if not execution.succeeded:
        return result_of(item, "failed", f"its verdict is warmed, but {execution.how}")
    now = executor.plan((item.task,)).items[0]
    if not now.warm:
        return result_of(item, "failed", f"its marker does not hold: {now.judgement.reason}")
    marker = now.judgement.marker
    if marker is None or marker.observed.run != executor.context.run_id:
        return result_of(item, "failed", "its verdict is warmed, but the marker is an older one")
    result = result_of(now, "warmed", reason)
    result.proof, result.verified = marker.proof, marker.proof == VERIFIED
    result.reservation = reservation(marker)
    return result


def raise_if_fatal(execution: Execution, result: TaskResult) -> None:
    """Raise what ends the whole run: a lost engine, or a cache root that no task can use."""
    if execution.ended == "lost":
        raise EngineLostError(f"the engine was lost while {result.label} ran")
    if execution.verdict and execution.verdict.unusable:
        raise PreflightError(CANNOT_RUN, [Problem("cache", sentence(result.reason))])


def add_result(report: Report, output: TaskOutput, result: TaskResult) -> None:
    """Put a task's result into the report and write it."""
    report.add_result(result)
    if result.state in ("warmed", "warm", "cold"):
        why = f" ({result.reason})" if result.reason else ""
        output.finish(f"{result.label}: {result.state} in {duration(result.seconds)}{why}")
        return
    output.finish(f"{result.label}: {result.state}: {result.reason}", result.tail)


def recheck(executor: Executor, tasks: Sequence[Task]) -> None:
    """Judge all tasks again at the end of a run: a later task may have removed what an earlier one needs."""
    for item in executor.plan(tasks).items:
        result = executor.context.report.of(item.task.label)
        if result.state in ("warm", "warmed") and not item.warm:
            result.state, result.verified = "failed", False
            result.reason = f"no longer warm at the end of the run: {item.judgement.reason}"


def raise_unless_warm(context: Context) -> None:
    """Raise the one error that sums up the run, unless every task is warm."""
    report = context.report
    total, cold = counted(len(report.tasks), "task"), report.count("cold")
    expired = context.budget.expired
    if cold and (expired or any(task.short_of_budget and task.state == "cold" for task in report.tasks)):
        raise BudgetError(
            f"the budget {'ended' if expired else 'is used as far as it goes,'} with {cold} of {total} still cold; "
            "what is finished stays warm, run again to go on"
        )
    states = ("failed", "partial", "skipped", "cold")
    kinds = [f"{report.count(state)} {state}" for state in states if report.count(state)]
    if kinds:
        raise TasksError(f"{', '.join(kinds)} of {total}")
