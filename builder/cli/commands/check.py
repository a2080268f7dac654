"""The verbs that ask whether the cache is warm, and for what: check, explain and env."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from builder.cache import environment, families, toolchain
from builder.cache.coverage import brief
from builder.cache.environment import IMAGE_VARIABLE, Standing
from builder.cache.model_store import STORE_MOUNT as STORE
from builder.errors import ColdError, UsageError
from builder.report import github
from builder.report.console import Console
from builder.report.results import Report, TaskResult
from builder.run.container_executor import ContainerExecutor
from builder.run.plan import Plan
from builder.task import PRETEND_VARIABLE, Task
from builder.text import counted


def judged(executor: ContainerExecutor, tasks: tuple[Task, ...]) -> Plan | None:
    """The plan, reported; None (and every task cold) where there is no cache root to judge by, so that reading makes
    none.
    """
    context = executor.context
    context.report.image_ref = context.manifest.image.ref
    if missing := executor.missing_root():
        reason = f"no-marker: {missing}"
        context.report.tasks = [TaskResult(task.label, task.model, "", "cold", reason) for task in tasks]
        context.report.cache = executor.cache.name
        return None
    plan = executor.plan(tasks)
    context.report.set_tasks(plan.results())
    return plan


def check(executor: ContainerExecutor, said: Namespace) -> None:
    """Warm or cold per task. Raises ColdError when anything is cold."""
    context = executor.context
    judged(executor, context.manifest.tasks)
    gate(
        context.console,
        context.report,
        said.on_cold,
        "warm-cache warm, with the same options, warms them",
    )


def gate(console: Console, report: Report, on_cold: str | None, remedy: str) -> None:
    """What a check comes to: an annotation for every cold task, and ColdError, unless a cold cache is only to be warned
    of.
    """
    cold = [task for task in report.tasks if task.state == "cold"]
    level: Literal["warning", "error"] = "warning" if on_cold == "warn" else "error"
    for task in cold:
        console.annotate(f"{task.label} cold", task.reason, level)
    if not cold:
        return
    error = ColdError(f"{len(cold)} of {counted(len(report.tasks), 'task')} cold; {remedy}")
    if level == "error":
        raise error
    report.warnings.append(error.message)


def explain(executor: ContainerExecutor, _said: Namespace) -> None:
    """Per task what differs from the nearest marker, and per family what the cache has for this image."""
    context = executor.context
    plan = judged(executor, context.manifest.tasks)
    explained(context.console, context.report, plan)
    if plan is not None:
        families_told(
            context.console,
            context.report,
            environment.compare(executor.described(), plan.items[0].record),
        )


def families_told(
    console: Console, report: Report, standings: Sequence[Standing], *, shown: Sequence[Standing] | None = None
) -> None:
    """Reports, and says of all or of those to be shown, whether a family's directory is there, and how the nearest one
    differs.
    """
    report.extra["families"] = [
        {
            "family": each.family,
            "state": each.state,
            "key": each.key,
            "nearest": each.nearest,
            "factors": [dict(zip(("factor", "was", "is"), row, strict=True)) for row in each.rows],
        }
        for each in standings
    ]
    rows = [
        [each.family, each.state, each.key or "–", _against(each)] for each in (standings if shown is None else shown)
    ]
    if rows:
        console.table(("family", "state", "key", "against the nearest one"), rows, styles={})


def _against(standing: Standing) -> str:
    """What differs from the nearest directory, and whether it could ever be that one."""
    texts = []
    for factor, was, now in standing.rows:
        before, after = brief(was, now)
        texts.append(f"{factor} was {before} is {after}")
    bound = standing.state == "differs" and not families.FAMILY[standing.family].shared
    return "; ".join(texts) + (" (belongs to one image: never shared)" if bound else "")


def explained(console: Console, report: Report, plan: Plan | None) -> None:
    """Says, and reports, what differs for every task of the report."""
    explained = []
    for index, result in enumerate(report.tasks):
        judgement = plan.items[index].judgement if plan else None
        because = f", because {result.reason}" if result.reason else f", since {result.since}"
        if result.reservation:
            because += f"; {result.reservation}"
        console.say(f"{result.label}: {result.state}{because}")
        differences = list(judgement.differences) if judgement else []
        if differences:
            console.table(("factor", "marker", "now"), [[str(cell) for cell in row] for row in differences])
        explained.append(
            {
                "label": result.label,
                "state": result.state,
                "reason": result.reason,
                "reservation": result.reservation or None,
                "marker": judgement.path if judgement else None,
                "factors": [dict(zip(("factor", "marker", "now"), row, strict=True)) for row in differences],
            }
        )
    report.extra["explain"] = explained


# --- env
# -----------------------------------------------------------------------------------------------------------------


def env(executor: ContainerExecutor, said: Namespace) -> None:
    """Prints the mounts and variables, and raises ColdError where they lead to a cache in which something is cold."""
    context = executor.context
    context.report.text = printed(executor, context.manifest.tasks, said.format or "docker")
    blame_cold(context.report)


def blame_cold(report: Report) -> None:
    """Raises ColdError with the labels of what is cold."""
    cold = [task.label for task in report.tasks if task.state == "cold"]
    if cold:
        raise ColdError(f"{len(cold)} of {counted(len(report.tasks), 'task')} cold: {', '.join(cold)}")


def printed(executor: ContainerExecutor, tasks: tuple[Task, ...], form: str, root: Sequence[str] = ()) -> str:
    """The mounts and variables of a test job that must hit the cache, as docker arguments, shell, GitHub lines or JSON.

    With what all the tasks have in common in their own environment: kernels were compiled under it. Raises ColdError
    where there is no cache root, and UsageError for the forms that a process uses in place (shell, github) when the
    root does not lie at its mount path here, and for docker arguments that a shell would tear apart. root: mounts
    that the job gets instead of the cache root's.
    """
    context = executor.context
    plan = judged(executor, tasks)
    if plan is None:
        raise ColdError(f"{executor.cache.name} does not exist: nothing is warm there yet")
    keys = toolchain.family_keys(plan.items[0].record)
    cache = context.manifest.cache
    variables = {**common_env(tasks), **families.environment(cache.mount, keys)}
    if context.manifest.models.store:
        variables["HF_HOME"] = STORE
    if form in ("shell", "github") and not Path(cache.mount, "layout.json").is_file():
        raise UsageError(
            f"--format {form} is for a process that sees the cache at {cache.mount}, and there is none here. "
            f"Use --format docker, or mount {executor.cache.name} at {cache.mount}."
        )
    if form in ("shell", "github"):
        return lines(variables, form)
    variables[IMAGE_VARIABLE] = executor.identity
    mounts = [*(root or _root(executor)), *_store(executor)]
    if form == "docker":
        words = [*mounts, *(f"{name}={value}" for name, value in sorted(variables.items()))]
        torn = [
            word for word in words if shlex.quote(word) != word or "," in word.partition("src=")[2].split(",dst=")[0]
        ]
        if torn:
            raise UsageError(
                f"docker run $(…) would tear apart {torn[0]!r}: a shell splits and docker cuts at commas. "
                "Use --format json, or a cache root without such characters."
            )
        return " ".join([f"--mount {mount}" for mount in mounts] + [f"-e {word}" for word in words[len(mounts) :]])
    return json.dumps({"toolchain": context.report.toolchain, "mounts": mounts, "env": variables}, indent=2)


def lines(variables: Mapping[str, str], form: str) -> str:
    """Variables as a shell's exports, or as lines of GitHub's file of variables."""
    if form == "shell":
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items()))
    return "\n".join(github.variable(name, value) for name, value in sorted(variables.items()))


def common_env(tasks: tuple[Task, ...]) -> dict[str, str]:
    """The variables that every task has, with the same value."""
    first, *others = [task.env.items() for task in tasks]
    return {
        name: value
        for name, value in sorted(first)
        if name != PRETEND_VARIABLE and all((name, value) in other for other in others)
    }


def _root(executor: ContainerExecutor) -> list[str]:
    """Markers and memos are read-only for a job: what it runs may add kernels, never vouch for any."""
    cache = executor.context.manifest.cache
    if cache.root is None:
        return [f"type=volume,src={cache.volume},dst={cache.mount}"]
    return [f"type=bind,src={cache.root},dst={cache.mount}"] + [
        f"type=bind,src={cache.root}/{part},dst={cache.mount}/{part},readonly" for part in ("markers", "images")
    ]


def _store(executor: ContainerExecutor) -> list[str]:
    store = executor.context.manifest.models.store
    return [f"type=bind,src={store},dst={STORE},readonly"] if store else []
