"""The tasks of a manifest: defaults merged, checked against their recipe, and labelled.

A label is what people and file names call a task: the model's last part and its parallelism. Where that names two
tasks of one manifest, both get a suffix from what they are (their recipe, else a digest of the task), so that a label
does not depend on the order of the tasks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from builder import sglang_args
from builder.cache.families import FAMILIES
from builder.manifest.document import Table
from builder.manifest.values import (
    SECRET_NAME,
    SECRET_VALUE,
    VARIABLE,
    a_string,
    a_table,
    an_argument,
    count,
    describe,
    list_of,
    one_of,
    positive,
    positive_seconds,
)
from builder.task import PRETEND_VARIABLE, Shape, Task
from builder.text import near, printable

RECIPES = ("compile-deep-gemm", "serve", "shapes", "command")
LOADS = ("weights", "dummy", "dummy-then-weights")
SHAPES_FROM = ("config", "markers")
VERIFY = ("second-pass", "steady", "inventory")

_OWN_VARIABLES = {name for family in FAMILIES for name, _ in family.env} | {
    "HF_HOME",
    "HF_MODULES_CACHE",
    "DG_JIT_CACHE_DIR",
}
_SECRET_OPTIONS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")
_MODEL_OPTIONS = ("--model-path", "--model")
_SERVERS = ("compile-deep-gemm", "serve")
_COMPILES_ONLY = "only recipe = 'shapes' compiles without running anything."
#: Keys that mean something for some recipes only.
_ONLY_FOR = {
    "shapes": ("shapes",),
    "shapes_from": ("shapes",),
    "m_values": ("shapes",),
    "workers": ("shapes", "compile-deep-gemm"),
    "requests": ("serve",),
    "load": _SERVERS,
    "layers": _SERVERS,
}
PARALLELISM = {
    "tp": sglang_args.TENSOR_PARALLEL,
    "pp": sglang_args.PIPELINE_PARALLEL,
    "dp": (*sglang_args.DATA_PARALLEL, *sglang_args.ATTENTION_DP),
    "ep": sglang_args.EXPERT_PARALLEL,
}


def read_tasks(
    root: Table, *, gpus: int, timeout: float | None, silence: float | None, pretend: str | None = None
) -> tuple[Task, ...]:
    """Every [[task]] of the manifest over [defaults]. timeout and silence: seconds that replace every task's own.

    gpus: how many the machine gives; what a task takes unless it says less. pretend: the GPU that is not there, but
    for which is compiled. Problems go into the document.
    """
    groups = _read_groups(root.table("args"))
    defaults = root.table("defaults")
    base = _read(defaults, Task(label="", model="", recipe="compile-deep-gemm", gpus=gpus))
    defaults.finish()
    tables = root.tables("task")
    if not tables and not root.has("task"):
        root.blame(None, "there is no [[task]]:", "a manifest names at least one model.")
    tasks = []
    for table in tables:
        task = _read_task(table, base, gpus, groups)
        tasks.append(replace(task, timeout=timeout or task.timeout, silence=silence or task.silence))
        if pretend is not None and task.recipe != "shapes":
            table.blame("recipe", f"on a pretended GPU nothing runs, and {task.recipe!r} runs kernels:", _COMPILES_ONLY)
    _blame_twins(tables, tasks)
    extra = {} if pretend is None else {PRETEND_VARIABLE: pretend}
    return tuple(
        replace(task, label=label, env={**task.env, **extra}) for task, label in zip(tasks, labels(tasks), strict=True)
    )


def _read(table: Table, base: Task) -> Task:
    """What may stand in [defaults] and in a task."""
    return replace(
        base,
        recipe=table.read("recipe", one_of(RECIPES, "recipe"), base.recipe),
        env={**base.env, **_environment(table)},
        gpus=table.read("gpus", count, base.gpus),
        timeout=table.read("timeout", positive_seconds, base.timeout),
        silence=table.read("silence", positive_seconds, base.silence),
        requests=table.read("requests", list_of(_request, "[prompt tokens, new tokens] pairs"), base.requests),
        m_values=table.read("m_values", list_of(positive, "values of M"), base.m_values),
        workers=table.read("workers", count, base.workers),
        load=table.read("load", one_of(LOADS, "way to load"), base.load),
        layers=table.read("layers", positive, base.layers),
        verify=table.read("verify", one_of(VERIFY, "way to verify"), base.verify),
        families=table.read("families", list_of(_family, "family names"), base.families),
    )


def _read_groups(table: Table) -> dict[str, tuple[str, ...]]:
    """[args]: words that several tasks have in common, by name. A group may hold those that stand above it."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in table.data:
        groups[name] = table.read(name, _arguments(groups), ())
    return groups


def _arguments(groups: Mapping[str, tuple[str, ...]]) -> Callable[[Any], tuple[str, ...]]:
    """A converter for arguments, of which ``@NAME`` stands for the words of that group, and ``@@x`` for ``@x``."""

    def words(value: Any) -> tuple[str, ...]:
        argument = an_argument(value)
        if not argument.startswith("@") or argument == "@":
            return (argument,)
        name = argument[1:]
        if name.startswith("@"):
            return (name,)
        if name not in groups:
            known = near(name, groups) if groups else "[args] has none"
            raise ValueError(f"no group {name!r} stands in [args] above this ({known}); a word that begins so is '@@…'")
        return groups[name]

    convert = list_of(words, "arguments")
    return lambda value: tuple(itertools.chain.from_iterable(convert(value)))


def _read_task(table: Table, base: Task, gpus: int, groups: Mapping[str, tuple[str, ...]]) -> Task:
    task = replace(
        _read(table, base),
        model=table.require("model", a_string, ""),
        revision=table.read("revision", a_string, None),
        argv=table.read("argv", _arguments(groups), ()),
        success=table.read("success", _regexp, None),
        shapes=table.read("shapes", list_of(_shape, "shapes"), ()),
        shapes_from=table.read("shapes_from", _places, ()),
    )
    table.finish()
    _check_recipe(table, task)
    _check_argv(table, task)
    if task.gpus > gpus:
        table.blame("gpus", f"the task wants {task.gpus} GPUs, and [gpus] count is {gpus}.")
    needed = _degree(task.argv, "tp") * _degree(task.argv, "pp")
    if 0 < task.gpus < needed and task.recipe in _SERVERS:
        table.blame("gpus" if table.has("gpus") else "argv", f"tp × pp is {needed}, and the task has {task.gpus} GPUs.")
    return task


def _check_recipe(table: Table, task: Task) -> None:
    if table.has("recipe") and table.data["recipe"] not in RECIPES:
        return  # which keys make sense is not known then
    for key, recipes in _ONLY_FOR.items():
        if table.has(key) and task.recipe not in recipes:
            table.blame(
                key, f"{key} means nothing to the recipe {task.recipe!r};", "it is for " + " and ".join(recipes) + "."
            )
    if task.recipe == "shapes" and not (table.has("shapes") or table.has("shapes_from")):
        table.blame(
            None,
            "a task with the recipe 'shapes' needs 'shapes' or 'shapes_from':",
            f'e.g. ["{Shape("GEMM_NT_F8F8BF16", 4096, 7168)}"], or "config", or "markers".',
        )
    if table.has("shapes") and table.data["shapes"] == [] and not task.shapes_from:
        table.blame("shapes", "shapes is empty: nothing would be compiled.")
    if task.recipe == "command":
        if not table.has("argv") or table.data["argv"] == []:
            table.blame("argv", "a task with the recipe 'command' needs 'argv'.")
        if task.success is None and not task.families and not table.has("success"):
            table.blame(
                None,
                "a task with the recipe 'command' needs evidence beyond its exit status:",
                "'success' (a regexp that must appear) or 'families' (that must hold entries).",
            )
    if table.has("verify") and task.verify == "steady" and task.recipe != "serve":
        table.blame("verify", "verify = 'steady' repeats requests;", "it is for serve.")
    if table.has("layers") and task.recipe in _SERVERS and task.load == "weights":
        table.blame("layers", "layers keeps a few layers of a model without weights;", 'it needs load = "dummy".')
    if (
        task.layers is not None
        and task.load != "weights"
        and sglang_args.value(task.argv, sglang_args.DRAFT_MODEL) is not None
    ):
        table.blame("layers", "sglang would cut the draft model of argv to as many layers:", "leave layers out.")


def _check_argv(table: Table, task: Task) -> None:
    names = [argument.partition("=")[0] for argument in task.argv]
    if task.recipe in _SERVERS:
        for option in _MODEL_OPTIONS:
            if option in names:
                table.blame("argv", f"argv holds {option}:", "the model is what 'model' says.")
    for option in _SECRET_OPTIONS:
        if option in names:
            table.blame("argv", f"argv holds {option}, and argv is recorded in markers and logs:", "leave it out.")
    if task.load != "weights" and not _is_object(sglang_args.value(task.argv, sglang_args.OVERRIDES) or "{}"):
        table.blame("argv", f"argv: {sglang_args.OVERRIDES[0]} is no JSON object.")
    if any(SECRET_VALUE.search(argument) for argument in task.argv):
        table.blame("argv", "argv holds what looks like an access token:", "pass it by name, in [container] secrets.")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _environment(table: Table) -> dict[str, str]:
    """The env table, checked entry by entry; refused entries are left out."""
    env = {}
    for name, value in table.read("env", a_table, {}).items():
        path = (*table.path, "env", name)
        if not VARIABLE.fullmatch(name):
            table.document.blame(path, f"env: {name!r} is no name of an environment variable.")
        elif SECRET_NAME.fullmatch(name) or (isinstance(value, str) and SECRET_VALUE.search(value)):
            table.document.blame(
                path,
                f"env: {name} is a secret, and env is recorded in markers:",
                "pass it by name, in [container] secrets.",
            )
        elif name in _OWN_VARIABLES or name.startswith("WARM_CACHE_"):
            table.document.blame(path, f"env: {name} is set by the builder:", "it must point below the cache's mount.")
        elif isinstance(value, bool) or not isinstance(value, (str, int)):
            table.document.blame(path, f"env: {name}: a string is wanted, found {describe(value)}.")
        elif "\0" in str(value):
            table.document.blame(path, f"env: {name}: NUL cannot be part of a value.")
        else:
            env[name] = str(value)
    return env


def _blame_twins(tables: Sequence[Table], tasks: Sequence[Task]) -> None:
    seen: dict[str, Table] = {}
    for table, task in zip(tables, tasks, strict=True):
        first = seen.setdefault(_content(task), table)
        if first is not table and task.model:
            table.blame(None, "this task is the same as the one at", first.document.place(first.path) + ".")


def labels(tasks: Sequence[Task]) -> list[str]:
    """One label per task, all different, each the same in whatever order the tasks stand."""
    plain = [_plain_label(task) for task in tasks]
    names = list(plain)
    for tell in (lambda task: task.recipe, lambda task: digest(task)[:4], digest):
        names = _told_apart(names, plain, tasks, tell)
    return names


def digest(task: Task) -> str:
    """Of everything that makes the task what it is; not of its deadlines or its label."""
    return hashlib.sha256(_content(task).encode()).hexdigest()[:16]


def _told_apart(
    names: Sequence[str], plain: Sequence[str], tasks: Sequence[Task], tell: Callable[[Task], str]
) -> list[str]:
    """Names, those that several tasks share (in whatever case: file systems differ) made longer by what `tell` says."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        groups[name.lower()].append(index)
    result = list(names)
    for members in groups.values():
        told = {index: f"{plain[index]}-{tell(tasks[index])}" for index in members}
        if len(members) > 1 and len(set(told.values())) == len(members):
            for index, name in told.items():
                result[index] = name
    return result


def _plain_label(task: Task) -> str:
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", task.model.rstrip("/").rpartition("/")[2]).strip("-.")[:64] or "task"]
    parts += [f"{name}{degree}" for name in PARALLELISM if (degree := _degree(task.argv, name)) > 1]
    return "-".join(parts)


def _degree(argv: Sequence[str], name: str) -> int:
    """The degree that argv gives for tp, pp, dp or ep; 1 where it gives none. The last one counts, as with argparse."""
    degree = 1
    for index, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option in PARALLELISM[name]:
            text = value if equals else argv[index + 1] if index + 1 < len(argv) else ""
            degree = int(text) if re.fullmatch(r"[0-9]{1,4}", text) else degree
    return degree


def _content(task: Task) -> str:
    apart: dict[str, Any] = {"label": "", "timeout": 0, "silence": 0, "workers": 0}
    if task.recipe == "shapes":
        apart["gpus"] = 0  # who compiles does not change what is compiled
    return json.dumps({**asdict(task), **apart}, sort_keys=True)


def _shape(value: Any) -> Shape:
    return Shape.parse(a_string(value))


def _places(value: Any) -> tuple[str, ...]:
    """One place that shapes come from, or several, each once."""
    place = one_of(SHAPES_FROM, "place that shapes come from")
    places = (place(value),) if isinstance(value, str) else list_of(place, "places that shapes come from")(value)
    return tuple(dict.fromkeys(places))


def _family(value: Any) -> str:
    name = one_of([family.name for family in FAMILIES], "family")(value)
    if not next(family for family in FAMILIES if family.name == name).claimable:
        raise ValueError(f"the family {name!r} cannot be claimed: its entries depend on the driver alone")
    return name


def _request(value: Any) -> tuple[int, int]:
    numbers = list_of(positive, "two numbers")(value)
    if len(numbers) != 2:
        raise ValueError(f"[prompt tokens, new tokens] is wanted, found {describe(value)}")
    return numbers[0], numbers[1]


def _regexp(value: Any) -> str:
    """Compiled as the container will: over bytes."""
    text = a_string(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that another Python may read otherwise
            re.compile(text.encode(), re.MULTILINE)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"{text!r} is no regular expression: {printable(str(error))}") from None
    return text
