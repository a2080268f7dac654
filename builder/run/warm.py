"""The story of a run: plan, then run every cold task, judge it by its marker, and sum up.

`warm` is that story on one screen. It is the same in containers and in this environment (`--here`): only the executor
differs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from builder import events
from builder.cache import reasons
from builder.cache.families import CLAIMABLE
from builder.report.progress import TaskProgress
from builder.report.task_output import TaskOutput, open_output
from builder.run import dispatch, forecast, outcome, prebuild
from builder.run.context import Context
from builder.run.executor import Allocation, Executor, Reservation, Watcher
from builder.run.forecast import Estimate
from builder.run.plan import Item, Plan, result_of
from builder.text import counted, duration, printable, size


def warm(executor: Executor) -> None:
    """Make every task warm. Raises what prevents that; the report is complete either way."""
    context = executor.context
    tasks = context.manifest.tasks
    plan = executor.plan(tasks)
    context.report.set_tasks(plan.results())
    if not to_do(context, plan):
        executor.sweep_pending()
        return
    executor.sweep()
    executor.prepare()
    with executor.run_lock():
        with executor.snapshot(tasks) as (root, plan):  # another builder may have finished while this one waited
            estimates = forecast.expected_seconds(root, plan.items)
            known = prebuild.known_shapes(root, plan.items)
        context.report.set_tasks(plan.results())
        announce(executor, plan, estimates)
        items = to_do(context, plan)
        forecast.require_space(executor, items)
        stage = prebuild.run(executor, items, known)
        if context.options.prebuild_only:
            return
        items = prebuild.with_keys(stage, items)
        with executor.reserve_gpus(items) as gpus:
            dispatch.run_all(executor, items, estimates, lambda item, where: warm_task(executor, gpus, item, where))
        outcome.recheck(executor, tasks)
        prebuild.finish(executor, stage)
    outcome.raise_unless_warm(context)


def show_plan(executor: Executor) -> None:
    """Show what `warm` would do: which tasks, when, on which GPUs, and for how long. Starts none of it.

    An image that the cache does not know is probed, as for a check.
    """
    context = executor.context
    tasks = context.manifest.tasks
    with executor.snapshot(tasks) as (root, plan):
        estimates = forecast.expected_seconds(root, plan.items)
    context.report.set_tasks(plan.results())
    items = to_do(context, plan)
    rows = dispatch.planned_rows(executor, items, estimates)
    context.report.add(dispatch.PlanSection(rows))
    if not items:
        return
    announce(executor, plan, estimates, reasons_too=False)
    reasons_of = {item.task.label: item.config_problem or item.judgement.reason or "warm, forced" for item in items}
    context.console.table(
        ("task", "starts", "GPUs", "takes", "why"),
        [
            [
                row.task,
                "–" if row.start is None else duration(row.start),
                ",".join(map(str, row.gpus)) or "–",
                ("" if row.timed else "at most ") + duration(row.seconds),
                row.note or reasons_of[row.task],
            ]
            for row in rows
        ],
    )
    context.console.say("nothing was started: this is what warm would do")


def to_do(context: Context, plan: Plan) -> tuple[Item, ...]:
    """Return the cold tasks, or all of them when forced."""
    return plan.items if context.options.force else plan.cold


def warm_task(executor: Executor, gpus: Reservation, item: Item, allocation: Allocation) -> None:
    """Run one task, from its title to the moment when its GPUs are free again. Called in the task's thread."""
    report, label = executor.context.report, item.task.label
    opened = open_output(executor.context.console, allocation.title, label, concurrent=allocation.concurrent)
    with opened as output, gpus.free_after(label, allocation.reserved_gpus):
        if item.config_problem:
            outcome.add_result(report, output, result_of(item, "skipped", item.config_problem))
            return
        watcher = Watcher(output.log, lambda event: show(allocation.progress, output, event))
        execution = executor.execute(item, allocation, watcher)
        result = outcome.result_of_execution(executor, item, execution)
        result.gpus = allocation.visible_gpus or ()
        outcome.add_result(report, output, result)
        outcome.raise_if_fatal(execution, result)


def announce(executor: Executor, plan: Plan, estimates: Mapping[str, Estimate], *, reasons_too: bool = True) -> None:
    """Write the heading of a run that has work to do. reasons_too: and why each task is to run."""
    context = executor.context
    say = context.console.say
    say(f"warm-cache  {executor.heading()}  cache {executor.root_name}")
    anew = [item.judgement for item in plan.cold if item.judgement.anew]
    costliest = min(anew, key=lambda judgement: reasons.rank(judgement.anew[0]), default=None)
    why = f": {costliest.detail}" if costliest else f" of {len(CLAIMABLE)} families"
    logs = f", logs in {context.log_directory()}" if reasons_too else ""
    say(f"toolchain {plan.digest}{why}{logs}")
    items = to_do(context, plan)
    sums = [f"{counted(len(plan.items), 'task')}: {len(plan.items) - len(plan.cold)} warm, {len(items)} to do"]
    if items:
        sums.append(dispatch.expected_time(executor, items, estimates))
    if root := executor.direct_root():
        sums.append(f"{size(shutil.disk_usage(root).free)} free")
    say(" · ".join(sums))
    for item in items if reasons_too else ():
        say(f"  {item.task.label}: {item.judgement.reason or 'warm, forced'}")


def show(progress: TaskProgress, output: TaskOutput, event: events.Event) -> None:
    """Show an event of the task's program to people, between the lines of its log."""
    progress.on_event(event)
    match event:
        case events.Phase():
            output.remark(printable(event.phase))
        case events.Quarantined():
            output.remark(f"quarantined {printable(f'{event.family}/{event.path}: {event.why}')}")
        case events.Kept():
            output.remark(f"left {printable(f'{event.family}/{event.path}: {event.why}')}")
