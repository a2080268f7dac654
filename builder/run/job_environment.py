"""What a test job needs so that it hits the cache: mounts and variables, in several formats."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from builder.cache import families, toolchain
from builder.cache.environment import IMAGE_VARIABLE
from builder.cache.model_store import STORE_MOUNT as STORE
from builder.errors import ColdError, UsageError
from builder.report import github
from builder.report.results import TaskResult
from builder.run.container_executor import ContainerExecutor
from builder.run.executor import Executor
from builder.run.plan import Plan
from builder.task import PRETEND_VARIABLE, Task

#: Why a task is cold whose image must not be probed.
NO_MEMO = "no-memo: the cache does not know this image, and --no-probe builds and starts nothing to look at it"


def judge(executor: Executor) -> Plan | None:
    """Return the plan of the manifest's tasks, and put it into the report.

    None where there is no cache root, which reading must not make: then every task is cold. None as well where an
    image is unknown and must not be probed: then the tasks that this concerns are cold.
    """
    context = executor.context
    tasks = context.manifest.tasks
    if missing := executor.missing_root():
        reason = f"no-marker: {missing}"
        context.report.tasks = [TaskResult(task.label, task.model, "", "cold", reason) for task in tasks]
        context.report.cache = executor.root_name
        return None
    if unknown := executor.unknown(tasks):
        known = [task for task in tasks if task not in unknown]
        results = {result.label: result for result in (executor.plan(known).results() if known else ())}
        cold = {task.label: TaskResult(task.label, task.model, "", "cold", NO_MEMO) for task in unknown}
        context.report.set_tasks([(results | cold)[task.label] for task in tasks])
        context.report.cache = executor.root_name
        return None
    plan = executor.plan(tasks)
    context.report.set_tasks(plan.results())
    return plan


def render(executor: ContainerExecutor, form: str, root: Sequence[str] = ()) -> str:
    """Return the mounts and variables of a job: docker arguments, shell, lines for GitHub, or JSON.

    With the variables that all tasks have in common: kernels were compiled under them.
    Raises ColdError where there is no cache root. Raises UsageError for the formats that a process uses in place
    (shell, github) where the root is not at its mount path here, and for docker arguments that a shell would split.

    root: mounts that the job gets instead of the cache root's.
    """
    context = executor.context
    plan = judge(executor)
    if plan is None:
        raise ColdError(f"{executor.missing_root() or NO_MEMO}: nothing is warm there yet")
    keys = toolchain.family_keys(plan.items[0].record)
    cache = context.manifest.cache
    variables = {**common_env(context.manifest.tasks), **families.environment(cache.mount, keys)}
    if context.manifest.models.store:
        variables["HF_HOME"] = STORE
    if form in ("shell", "github") and not Path(cache.mount, "layout.json").is_file():
        raise UsageError(
            f"--format {form} is for a process that sees the cache at {cache.mount}, and there is none here. "
            f"Use --format docker, or mount {executor.root_name} at {cache.mount}."
        )
    if form in ("shell", "github"):
        return render_variables(variables, form)
    variables[IMAGE_VARIABLE] = executor.identity
    mounts = [*(root or _root(executor)), *_store(executor)]
    if form == "docker":
        return _docker_arguments(mounts, variables)
    return json.dumps({"toolchain": context.report.toolchain, "mounts": mounts, "env": variables}, indent=2)


def _docker_arguments(mounts: Sequence[str], variables: Mapping[str, str]) -> str:
    words = [*mounts, *(f"{name}={value}" for name, value in sorted(variables.items()))]
    split = [word for word in words if shlex.quote(word) != word or "," in word.partition("src=")[2].split(",dst=")[0]]
    if split:
        raise UsageError(
            f"docker run $(…) would split {split[0]!r}: the shell at blanks, docker at commas. "
            "Use --format json, or a cache root without such characters."
        )
    return " ".join([f"--mount {mount}" for mount in mounts] + [f"-e {word}" for word in words[len(mounts) :]])


def render_variables(variables: Mapping[str, str], form: str) -> str:
    """Return variables as a shell's exports, or as lines of GitHub's file of variables."""
    if form == "shell":
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items()))
    return "\n".join(github.variable(name, value) for name, value in sorted(variables.items()))


def common_env(tasks: tuple[Task, ...]) -> dict[str, str]:
    """Return the variables that all tasks have, with the same value."""
    first, *others = [task.env.items() for task in tasks]
    return {
        name: value
        for name, value in sorted(first)
        if name != PRETEND_VARIABLE and all((name, value) in other for other in others)
    }


def _root(executor: ContainerExecutor) -> list[str]:
    """Return the mounts of the root. A job may add kernels; markers and memos are read-only for it."""
    cache = executor.context.manifest.cache
    if cache.root is None:
        return [f"type=volume,src={cache.volume},dst={cache.mount}"]
    return [f"type=bind,src={cache.root},dst={cache.mount}"] + [
        f"type=bind,src={cache.root}/{part},dst={cache.mount}/{part},readonly" for part in ("markers", "images")
    ]


def _store(executor: ContainerExecutor) -> list[str]:
    store = executor.context.manifest.models.store
    return [f"type=bind,src={store},dst={STORE},readonly"] if store else []
