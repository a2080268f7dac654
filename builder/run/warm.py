"""The story of a run: plan, and for every cold task container → log → verdict → marker; then what it all came to.

``warm`` is that story on one screen. Everything it calls keeps one promise, in the module its name suggests.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from builder.cache import toolchain
from builder.engine.container import Deadlines, Outcome
from builder.errors import CANNOT_RUN, BudgetError, EngineLostError, PreflightError, Problem, TasksError
from builder.report.progress import TaskProgress
from builder.report.results import TaskResult
from builder.report.task_output import TaskOutput, open_output
from builder.run import cache_locks, dispatch, forecast, gpu_reservation
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import Asked, describe
from builder.run.dispatch import Seat
from builder.run.estimates import Estimate
from builder.run.outcome import ENDED_EARLY, counts
from builder.run.plan import Item, Plan, result_of
from builder.task import Task
from builder.text import counted, duration, printable, readable, sentence, size


def warm(executor: ContainerExecutor, _said: Namespace) -> None:
    """Makes every task warm. Raises what keeps it from that; the executor's report is complete either way."""
    context = executor.context
    tasks = context.manifest.tasks
    plan = executor.plan(tasks)
    context.report.set_tasks(plan.results())
    if not todo(executor, plan):
        executor.sweep_debts()
        return
    executor.sweep()
    executor.ready()
    with cache_locks.held(executor):
        expected: dict[str, Estimate] = {}
        plan = executor.plan(tasks, expected)  # another builder may have finished while this one waited
        context.report.set_tasks(plan.results())
        announce(executor, plan, expected)
        items = todo(executor, plan)
        forecast.refuse(executor, items)
        with gpu_reservation.taken(executor, items) as gpus:
            dispatch.work(executor, items, expected, lambda item, seat: warm_one(executor, gpus, item, seat))
        recheck(executor, tasks)
    conclude(executor)


def warm_one(executor: ContainerExecutor, gpus: gpu_reservation.Machine, item: Item, seat: Seat) -> None:
    """One task, from its title to the moment when its GPUs are free again. In a thread of its own."""
    label = item.task.label
    speak = open_output(executor.context.console, seat.title, label, concurrent=seat.together)
    with speak as voice, gpus.free_after(label, seat.held):
        settle(executor, voice, warm_task(executor, item, seat, voice))


def recheck(executor: ContainerExecutor, tasks: tuple[Task, ...]) -> None:
    """What was warm when its turn came may not be any more: a later task can have removed what it stands on."""
    results = {result.label: result for result in executor.context.report.tasks}
    for item in executor.plan(tasks).items:
        result = results[item.task.label]
        if result.state in ("warm", "warmed") and not item.warm:
            result.state, result.verified = "failed", False
            result.reason = f"no longer warm at the end of the run: {item.judgement.reason}"


def todo(executor: ContainerExecutor, plan: Plan) -> tuple[Item, ...]:
    """What a run has to do: the cold tasks, or all of them when forced."""
    return plan.items if executor.context.options.force else plan.cold


def warm_task(executor: ContainerExecutor, item: Item, seat: Seat, voice: TaskOutput) -> TaskResult:
    """One task in one container, to a result that the disk confirms."""
    context = executor.context
    if item.config_problem:
        return result_of(item, "skipped", item.config_problem)
    limits = Deadlines(
        task=item.task.timeout,
        silence=item.task.silence,
        start=context.manifest.run.start,
        grace=context.manifest.run.grace,
    )
    outcome = executor.run(
        "run",
        item.task,
        limits,
        Asked(
            devices=seat.devices,
            cancel=seat.cancel,
            display=voice.log,
            on_event=lambda event: tell(seat.activity, voice, event),
            budget=context.budget,
            beside=seat.together,
        ),
    )
    result = judge_outcome(executor, item, outcome)
    result.seconds = outcome.seconds
    result.log = str(outcome.log_path) if outcome.log_path else None
    result.tail = outcome.tail
    if outcome.ended == "lost":
        settle(executor, voice, result)
        raise EngineLostError(f"the engine was lost while {item.task.label} ran")
    if outcome.verdict and outcome.verdict.get("unusable") is True:
        settle(executor, voice, result)
        raise PreflightError(CANNOT_RUN, [Problem("cache", sentence(result.reason))])
    return result


def judge_outcome(executor: ContainerExecutor, item: Item, outcome: Outcome) -> TaskResult:
    """What became of the task. Only a marker that holds on disk makes it warmed, whatever the container said."""
    verdict = outcome.verdict or {}
    numbers: dict[str, Any] = {
        "entries": counts(verdict.get("entries")),
        "added": counts(verdict.get("added")),
        "added_bytes": counts(verdict.get("added_bytes")),
        "loaded": readable(str(verdict.get("loaded") or "")),
        "proof": verdict.get("proof"),
    }
    if outcome.ended in ENDED_EARLY:
        state, reason = ENDED_EARLY[outcome.ended]
        if state == "cold" and item.warm:  # forced, and what it had is there still
            state = "warm"
        elif state == "cold":
            numbers["entries"] = {}  # what lies there is not known to be this task's
        return result_of(item, state, reason.format(task=item.task), **numbers)
    if outcome.verdict is None:
        return result_of(item, "failed", f"the container {describe(outcome)} and gave no verdict", **numbers)
    state, reason = str(verdict.get("state")), readable(str(verdict.get("reason") or ""))
    if outcome.oom and state != "warmed":
        reason = f"out of memory inside the container; {reason}"
    if state != "warmed":
        state = state if state in ("partial", "skipped") else "failed"
        return result_of(item, state, reason, **numbers)
    if outcome.exit_code != 0:
        return result_of(item, "failed", f"its verdict is warmed, but the container {describe(outcome)}", **numbers)
    now = executor.plan((item.task,)).items[0]
    if not now.warm:
        return result_of(item, "failed", f"its marker does not hold: {now.judgement.reason}", **numbers)
    if not executor.wrote(now.judgement.marker):
        return result_of(item, "failed", "its verdict is warmed, but the marker is an older one", **numbers)
    return result_of(now, "warmed", reason, verified=numbers["proof"] == "verified", **numbers)


def settle(executor: ContainerExecutor, voice: TaskOutput, result: TaskResult) -> None:
    """Puts a task's result into the report, and says it."""
    executor.context.report.add_result(result)
    if result.state in ("warmed", "warm", "cold"):
        why = f" ({result.reason})" if result.reason else ""
        voice.finish(f"{result.label}: {result.state} in {duration(result.seconds)}{why}")
        return
    voice.finish(f"{result.label}: {result.state}: {result.reason}")
    if result.tail:
        lines = "line" if len(result.tail) == 1 else f"{len(result.tail)} lines"
        voice.say(f"the last {lines} of its log:")
        for line in result.tail:
            voice.log("out", line)
    voice.annotate(f"{result.label} {result.state}", result.reason)


def announce(executor: ContainerExecutor, plan: Plan, expected: Mapping[str, Estimate]) -> None:
    """The head of a run that has work to do."""
    context = executor.context
    image, manifest = executor.serving, context.manifest
    devices = f"{manifest.gpus.count} GPUs" if manifest.gpus.count else "no GPUs"
    if manifest.gpus.pretend:
        devices = f"no GPU, pretending {manifest.gpus.pretend} (experimental: not proven on hardware)"
    context.console.say(f"warm-cache  {image.ref} ({image.id[:19]}…)  {devices}  cache {executor.cache.name}")
    keys = toolchain.family_keys(plan.items[0].record)
    context.console.say(f"toolchain {plan.digest} of {len(keys)} families, logs in {context.options.log_dir}")
    cold = todo(executor, plan)
    warm = len(plan.items) - len(plan.cold)
    sums = [f"{counted(len(plan.items), 'task')}: {warm} warm, {len(cold)} to do"]
    if cold:
        sums.append(dispatch.forecast(executor, cold, expected))
    if root := executor.cache.direct():
        sums.append(f"{size(shutil.disk_usage(root).free)} free")
    context.console.say(" · ".join(sums))
    for item in cold:
        context.console.say(f"  {item.task.label}: {item.judgement.reason or 'warm, forced'}")


def tell(activity: TaskProgress, voice: TaskOutput, event: Mapping[str, Any]) -> None:
    """An event of the container, as far as people want to see it between the lines of the log."""
    activity.hear(event)
    match event.get("event"):
        case "phase":
            voice.remark(printable(str(event.get("phase"))))
        case "swept":
            what = f"{event.get('family')}/{event.get('path')}: {event.get('why')}"
            voice.remark(f"moved aside {printable(what)}")


def conclude(executor: ContainerExecutor) -> None:
    """Raises the one error that says what the run came to, if it is not success."""
    context = executor.context
    states = context.report
    unfinished = states.count("failed", "partial", "skipped")
    cold = states.count("cold")
    short = any(task.state == "cold" and task.reason.startswith("budget:") for task in states.tasks)
    if cold and (context.budget.over or short):
        raise BudgetError(
            f"the budget {'ended' if context.budget.over else 'is used as far as it goes,'} with {cold} of "
            f"{counted(len(states.tasks), 'task')} still cold; what is finished stays warm, run again to go on"
        )
    if unfinished or cold:
        kinds = [
            f"{states.count(state)} {state}"
            for state in ("failed", "partial", "skipped", "cold")
            if states.count(state)
        ]
        raise TasksError(f"{', '.join(kinds)} of {counted(len(states.tasks), 'task')}")
