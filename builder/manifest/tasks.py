"""Reads the tasks of a manifest: [defaults] and [args] merged in, and the keys of each task checked together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from builder import sglang_args
from builder.cache.families import FAMILIES
from builder.manifest.document import Table
from builder.manifest.fields import OverrideReader, keys_of, read
from builder.manifest.labels import content, labels
from builder.manifest.sections import GpusSpec
from builder.manifest.task_keys import EXAMPLE_SHAPE, SERVERS, Defaults, TaskTable
from builder.manifest.values import SECRET_NAME, SECRET_VALUE, VARIABLE, Kind, a_table, an_argument, describe, list_of
from builder.task import PRETEND_VARIABLE, RECIPES, Task
from builder.text import did_you_mean

_OWN_VARIABLES = {name for family in FAMILIES for name, _ in family.env} | {
    "HF_HOME",
    "HF_MODULES_CACHE",
    "DG_JIT_CACHE_DIR",
}
_SECRET_OPTIONS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")
_MODEL_OPTIONS = ("--model-path", "--model")
_COMPILES_ONLY = "only recipe = 'shapes' compiles without running anything."


def read_tasks(root: Table, gpus: GpusSpec, overrides: OverrideReader) -> tuple[Task, ...]:
    """Return every [[task]] of the manifest, with [defaults] and [args] merged in. Problems go into the document."""
    groups = _read_groups(root.table("args"))
    table = root.table("defaults")
    base = Defaults(gpus=gpus.count)
    defaults = read(base, table, overrides, {"env": _environment(table, base.env)})
    tables = root.tables("task")
    if not tables and not root.has("task"):
        root.add_problem(None, "there is no [[task]]:", "a manifest names at least one model.")
    tasks = []
    for table in tables:
        kinds = {"env": _environment(table, defaults.env), "argv": _arguments(groups)}
        read_table = read(TaskTable(**vars(defaults)), table, overrides, kinds)
        task = Task(**{**vars(read_table), "label": "", "env": read_table.env or {}})
        for check in CHECKS:
            check(table, task, gpus)
        tasks.append(task)
    _report_duplicates(tables, tasks)
    extra = {} if gpus.pretend is None else {PRETEND_VARIABLE: gpus.pretend}
    return tuple(
        replace(task, label=label, env={**task.env, **extra}) for task, label in zip(tasks, labels(tasks), strict=True)
    )


def _read_groups(table: Table) -> dict[str, tuple[str, ...]]:
    """Read [args]: arguments that several tasks share, by name. A group may contain groups above it."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in table.data:
        groups[name] = table.read(name, _arguments(groups), ())
    return groups


def _arguments(groups: Mapping[str, tuple[str, ...]]) -> Callable[[Any], tuple[str, ...]]:
    """Return a converter for arguments that replaces ``@NAME`` by that group and ``@@x`` by ``@x``."""

    def expand(value: Any) -> tuple[str, ...]:
        argument = an_argument(value)
        if not argument.startswith("@") or argument == "@":
            return (argument,)
        name = argument[1:]
        if name.startswith("@"):
            return (name,)
        if name not in groups:
            known = did_you_mean(name, groups) if groups else "[args] has none"
            raise ValueError(f"no group {name!r} is in [args] above this ({known}); write '@@…' for a word with '@'")
        return groups[name]

    convert = list_of(Kind(expand, "argument", {}), "arguments")
    return lambda value: tuple(itertools.chain.from_iterable(convert(value)))


def _environment(table: Table, base: Mapping[str, str] | None) -> Callable[[Any], dict[str, str]]:
    """Return a converter for env that merges it into `base`. Each wrong variable is a problem with its own line."""

    def convert(value: Any) -> dict[str, str]:
        env = dict(base or {})
        for name, each in a_table(value).items():
            if problem := _variable_problem(name, each):
                table.document.add_problem((*table.path, "env", name), *problem)
            else:
                env[name] = str(each)
        return env

    return convert


def _variable_problem(name: str, value: object) -> tuple[str, str] | None:
    if not VARIABLE.fullmatch(name):
        return f"env: {name!r} is no name of an environment variable.", ""
    if SECRET_NAME.fullmatch(name) or (isinstance(value, str) and SECRET_VALUE.search(value)):
        return f"env: {name} is a secret, and env is recorded in markers:", "pass it by name, in [container] secrets."
    if name in _OWN_VARIABLES or name.startswith("WARM_CACHE_"):
        return f"env: {name} is set by the builder:", "it must point below the cache's mount."
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return f"env: {name}: expected a string, found {describe(value)}.", ""
    if "\0" in str(value):
        return f"env: {name}: NUL cannot be part of a value.", ""
    return None


def _report_duplicates(tables: Sequence[Table], tasks: Sequence[Task]) -> None:
    seen: dict[str, Table] = {}
    for table, task in zip(tables, tasks, strict=True):
        first = seen.setdefault(content(task), table)
        if first is not table and task.model:
            table.add_problem(None, "this task is the same as the one at", first.document.location(first.path) + ".")


def _check_recipe(table: Table, task: Task, _gpus: GpusSpec) -> None:
    if not _has_valid_recipe(table):
        return
    for name, declared in keys_of(TaskTable).items():
        if declared.recipes and table.has(name) and task.recipe not in declared.recipes:
            recipes = " and ".join(declared.recipes)
            table.add_problem(name, f"{name} has no meaning for the recipe {task.recipe!r};", f"it is for {recipes}.")
    if table.has("verify") and task.verify == "steady" and task.recipe != "serve":
        table.add_problem("verify", "verify = 'steady' repeats requests;", "it is for serve.")


def _check_shapes(table: Table, task: Task, _gpus: GpusSpec) -> None:
    if not _has_valid_recipe(table):
        return
    if task.recipe == "shapes" and not (table.has("shapes") or table.has("shapes_from")):
        table.add_problem(
            None,
            "a task with the recipe 'shapes' needs 'shapes' or 'shapes_from':",
            f'e.g. ["{EXAMPLE_SHAPE}"], or "config", or "markers".',
        )
    if table.has("shapes") and table.data["shapes"] == [] and not task.shapes_from:
        table.add_problem("shapes", "shapes is empty: nothing would be compiled.")


def _check_command(table: Table, task: Task, _gpus: GpusSpec) -> None:
    if task.recipe != "command" or not _has_valid_recipe(table):
        return
    if not table.has("argv") or table.data["argv"] == []:
        table.add_problem("argv", "a task with the recipe 'command' needs 'argv'.")
    if task.success is None and not task.families and not table.has("success"):
        table.add_problem(
            None,
            "a task with the recipe 'command' needs evidence beyond its exit status:",
            "'success' (a regexp that must appear) or 'families' (that must hold entries).",
        )


def _check_layers(table: Table, task: Task, _gpus: GpusSpec) -> None:
    if not _has_valid_recipe(table):
        return
    if table.has("layers") and task.recipe in SERVERS and task.load == "weights":
        table.add_problem("layers", "layers keeps a few layers of a model without weights;", 'it needs load = "dummy".')
    has_draft = sglang_args.value(task.argv, sglang_args.DRAFT_MODEL) is not None
    if task.layers is not None and task.load != "weights" and has_draft:
        table.add_problem("layers", "sglang would cut the draft model of argv to as many layers:", "leave layers out.")


def _has_valid_recipe(table: Table) -> bool:
    """Return False where the recipe is wrong, so that it is unknown which keys make sense."""
    return not table.has("recipe") or table.data["recipe"] in tuple(RECIPES)  # it may be a list


def _check_argv(table: Table, task: Task, _gpus: GpusSpec) -> None:
    names = sglang_args.names(task.argv)
    if task.recipe in SERVERS:
        for option in _MODEL_OPTIONS:
            if option in names:
                table.add_problem("argv", f"argv holds {option}:", "set the model with 'model'.")
    for option in _SECRET_OPTIONS:
        if option in names:
            table.add_problem(
                "argv", f"argv holds {option}, and argv is recorded in markers and logs:", "leave it out."
            )
    if task.load != "weights" and not _is_object(sglang_args.value(task.argv, sglang_args.OVERRIDES) or "{}"):
        table.add_problem("argv", f"argv: {sglang_args.OVERRIDES[0]} is no JSON object.")
    if any(SECRET_VALUE.search(argument) for argument in task.argv):
        table.add_problem(
            "argv", "argv holds what looks like an access token:", "pass it by name, in [container] secrets."
        )


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_gpus(table: Table, task: Task, gpus: GpusSpec) -> None:
    if task.gpus > gpus.count:
        table.add_problem("gpus", f"the task needs {task.gpus} GPUs, and [gpus] count is {gpus.count}.")
    needed = sglang_args.degree(task.argv, "tp") * sglang_args.degree(task.argv, "pp")
    if 0 < task.gpus < needed and task.recipe in SERVERS:
        where = "gpus" if table.has("gpus") else "argv"
        table.add_problem(where, f"tp × pp is {needed}, and the task has {task.gpus} GPUs.")
    if gpus.pretend is not None and task.recipe != "shapes":
        what = f"on a pretended GPU nothing runs, and {task.recipe!r} runs kernels:"
        table.add_problem("recipe", what, _COMPILES_ONLY)


CHECKS: tuple[Callable[[Table, Task, GpusSpec], None], ...] = (
    _check_recipe,
    _check_shapes,
    _check_command,
    _check_layers,
    _check_argv,
    _check_gpus,
)
