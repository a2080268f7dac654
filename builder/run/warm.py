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
from builder.run.container_job import Asked, describe
from builder.run.dispatch import Seat
from builder.run.estimates import Estimate
from builder.run.outcome import ENDED_EARLY, counts
from builder.run.plan import Item, Plan, result_of
from builder.run.session import Session
from builder.task import Task
from builder.text import counted, duration, printable, readable, sentence, size


def warm(session: Session, _said: Namespace) -> None:
    """Makes every task warm. Raises what keeps it from that; the session's report is complete either way."""
    tasks = session.manifest.tasks
    plan = session.plan(tasks)
    session.report.set_tasks(plan.results())
    if not todo(session, plan):
        session.sweep_debts()
        return
    session.sweep()
    session.ready()
    with cache_locks.held(session):
        expected: dict[str, Estimate] = {}
        plan = session.plan(tasks, expected)  # another builder may have finished while this one waited
        session.report.set_tasks(plan.results())
        announce(session, plan, expected)
        items = todo(session, plan)
        forecast.refuse(session, items)
        with gpu_reservation.taken(session, items) as gpus:
            dispatch.work(session, items, expected, lambda item, seat: warm_one(session, gpus, item, seat))
        recheck(session, tasks)
    conclude(session)


def warm_one(session: Session, gpus: gpu_reservation.Machine, item: Item, seat: Seat) -> None:
    """One task, from its title to the moment when its GPUs are free again. In a thread of its own."""
    label = item.task.label
    speak = open_output(session.console, seat.title, label, concurrent=seat.together)
    with speak as voice, gpus.free_after(label, seat.held):
        settle(session, voice, warm_task(session, item, seat, voice))


def recheck(session: Session, tasks: tuple[Task, ...]) -> None:
    """What was warm when its turn came may not be any more: a later task can have removed what it stands on."""
    results = {result.label: result for result in session.report.tasks}
    for item in session.plan(tasks).items:
        result = results[item.task.label]
        if result.state in ("warm", "warmed") and not item.warm:
            result.state, result.verified = "failed", False
            result.reason = f"no longer warm at the end of the run: {item.judgement.reason}"


def todo(session: Session, plan: Plan) -> tuple[Item, ...]:
    """What a run has to do: the cold tasks, or all of them when forced."""
    return plan.items if session.options.force else plan.cold


def warm_task(session: Session, item: Item, seat: Seat, voice: TaskOutput) -> TaskResult:
    """One task in one container, to a result that the disk confirms."""
    if item.config_problem:
        return result_of(item, "skipped", item.config_problem)
    limits = Deadlines(
        task=item.task.timeout,
        silence=item.task.silence,
        start=session.manifest.run.start,
        grace=session.manifest.run.grace,
    )
    outcome = session.run(
        "run",
        item.task,
        limits,
        Asked(
            devices=seat.devices,
            cancel=seat.cancel,
            display=voice.log,
            on_event=lambda event: tell(seat.activity, voice, event),
            budget=session.budget,
            beside=seat.together,
        ),
    )
    result = judge_outcome(session, item, outcome)
    result.seconds = outcome.seconds
    result.log = str(outcome.log_path) if outcome.log_path else None
    result.tail = outcome.tail
    if outcome.ended == "lost":
        settle(session, voice, result)
        raise EngineLostError(f"the engine was lost while {item.task.label} ran")
    if outcome.verdict and outcome.verdict.get("unusable") is True:
        settle(session, voice, result)
        raise PreflightError(CANNOT_RUN, [Problem("cache", sentence(result.reason))])
    return result


def judge_outcome(session: Session, item: Item, outcome: Outcome) -> TaskResult:
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
    now = session.plan((item.task,)).items[0]
    if not now.warm:
        return result_of(item, "failed", f"its marker does not hold: {now.judgement.reason}", **numbers)
    if not session.wrote(now.judgement.marker):
        return result_of(item, "failed", "its verdict is warmed, but the marker is an older one", **numbers)
    return result_of(now, "warmed", reason, verified=numbers["proof"] == "verified", **numbers)


def settle(session: Session, voice: TaskOutput, result: TaskResult) -> None:
    """Puts a task's result into the report, and says it."""
    session.report.add_result(result)
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


def announce(session: Session, plan: Plan, expected: Mapping[str, Estimate]) -> None:
    """The head of a run that has work to do."""
    image, manifest = session.serving, session.manifest
    devices = f"{manifest.gpus.count} GPUs" if manifest.gpus.count else "no GPUs"
    if manifest.gpus.pretend:
        devices = f"no GPU, pretending {manifest.gpus.pretend} (experimental: not proven on hardware)"
    session.console.say(f"warm-cache  {image.ref} ({image.id[:19]}…)  {devices}  cache {session.cache.name}")
    keys = toolchain.family_keys(plan.items[0].record)
    session.console.say(f"toolchain {plan.digest} of {len(keys)} families, logs in {session.options.log_dir}")
    cold = todo(session, plan)
    warm = len(plan.items) - len(plan.cold)
    sums = [f"{counted(len(plan.items), 'task')}: {warm} warm, {len(cold)} to do"]
    if cold:
        sums.append(dispatch.forecast(session, cold, expected))
    if root := session.cache.direct():
        sums.append(f"{size(shutil.disk_usage(root).free)} free")
    session.console.say(" · ".join(sums))
    for item in cold:
        session.console.say(f"  {item.task.label}: {item.judgement.reason or 'warm, forced'}")


def tell(activity: TaskProgress, voice: TaskOutput, event: Mapping[str, Any]) -> None:
    """An event of the container, as far as people want to see it between the lines of the log."""
    activity.hear(event)
    match event.get("event"):
        case "phase":
            voice.remark(printable(str(event.get("phase"))))
        case "swept":
            what = f"{event.get('family')}/{event.get('path')}: {event.get('why')}"
            voice.remark(f"moved aside {printable(what)}")


def conclude(session: Session) -> None:
    """Raises the one error that says what the run came to, if it is not success."""
    states = session.report
    unfinished = states.count("failed", "partial", "skipped")
    cold = states.count("cold")
    short = any(task.state == "cold" and task.reason.startswith("budget:") for task in states.tasks)
    if cold and (session.budget.over or short):
        raise BudgetError(
            f"the budget {'ended' if session.budget.over else 'is used as far as it goes,'} with {cold} of "
            f"{counted(len(states.tasks), 'task')} still cold; what is finished stays warm, run again to go on"
        )
    if unfinished or cold:
        kinds = [
            f"{states.count(state)} {state}"
            for state in ("failed", "partial", "skipped", "cold")
            if states.count(state)
        ]
        raise TasksError(f"{', '.join(kinds)} of {counted(len(states.tasks), 'task')}")
