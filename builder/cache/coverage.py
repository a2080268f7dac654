"""What a task covers: the factors that name its marker, and how two of them differ, in words.

A change of coverage makes the task cold. It never moves a family's directory, so only missing entries are compiled.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from typing import Any

from builder import sglang_args
from builder.cache import variables
from builder.cache.model_store import is_directory
from builder.cache.toolchain import Record, release
from builder.task import PRETEND_VARIABLE, RECIPES, Task
from builder.text import printable


def coverage(task: Task, *, record: Record, config_digest: str | None) -> dict[str, object]:
    """Return the coverage factors, in the order in which a difference is named; JSON types only."""
    recipe = RECIPES[task.recipe]
    # sglang's own parser ignores the order of a server's options; a command's argv may depend on it.
    argv = list(task.argv) if task.recipe == "command" else sglang_args.normalised(task.argv)
    factors: dict[str, object] = {
        # A build changes with every commit, and compiles the same kernels of the same sources: markers record it.
        "sglang": release(record["sglang"]["version"]),
        "model": task.model,
        "revision": task.revision,
        "config.json": config_digest or _in_image(task, record),
        "argv": argv,
        "env": _environment(task, record),
        "recipe": task.recipe,
        "recipe version": recipe.version,
        # What is compiled for a shape does not depend on how many GPUs there are to do it.
        "gpus": None if task.recipe == "shapes" else task.gpus,
        "families": None if task.families is None else sorted(set(task.families)),
    }
    for name in recipe.settings:
        value = getattr(task, name)
        if name == "shapes":
            value = [str(shape) for shape in sorted(set(value))]
        elif name in ("m_values", "shapes_from"):
            value = sorted(set(value))
        elif name == "requests":
            value = [list(pair) for pair in value]
        factors[name] = value
    return factors


def needs_config(task: Task) -> bool:
    """Return whether the task's kernels depend on the model's config.json."""
    return RECIPES[task.recipe].server or "config" in task.shapes_from


def _environment(task: Task, record: Record) -> dict[str, str]:
    """Return the task's variables over the switches of its environment, without those that are factors of nothing."""
    every = {**record.get("switches", {}), **task.env}
    return {
        name: value
        for name, value in sorted(every.items())
        if name != PRETEND_VARIABLE and not variables.is_inert(name)
    }


def _in_image(task: Task, record: Record) -> str | None:
    """Return what represents the config.json of a model in the image."""
    in_image = needs_config(task) and is_directory(task.model)
    return f"in the image {record['factors'].get('image')}" if in_image else None


def of_schema_1(factors: Mapping[str, Any]) -> dict[str, Any]:
    """Return coverage as markers of schema 1 have it, in the terms of today: the build is no factor any more."""
    version = factors.get("sglang")
    renamed = {**factors, "sglang": release(version) if isinstance(version, str) else version}
    renamed.pop("sglang commit", None)
    return renamed


def coverage_digest(factors: Mapping[str, object]) -> str:
    """Return 12 hex digits that are equal exactly where every factor is."""
    text = json.dumps(factors, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def differences(was: Mapping[str, object], now: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Return (factor, was, is) for every factor that differs, in words; environment variables one by one."""
    before, after = _flat(was), _flat(now)
    return [
        (printable(name) or "(no name)", describe(before.get(name)), describe(after.get(name)))
        for name in dict.fromkeys([*after, *before])
        if before.get(name) != after.get(name)
    ]


def describe(value: object) -> str:
    """Return a factor's value in words, on as many lines as it has."""
    if value is None:
        return "absent"
    if isinstance(value, str):
        return "\n".join(map(printable, value.split("\n"))) or "empty"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return printable(shlex.join(value)) or "none"
    try:
        return printable(json.dumps(value))
    except RecursionError:
        return "nested beyond reason"


def brief(was: str, now: str, limit: int = 100) -> tuple[str, str]:
    """Return both values as far as they differ: of lines the different ones, of long values the different part."""
    lines = was.split("\n"), now.split("\n")
    if max(map(len, lines)) > 1:
        was = " / ".join(line for line in lines[0] if line not in lines[1]) or was.replace("\n", " / ")
        now = " / ".join(line for line in lines[1] if line not in lines[0]) or now.replace("\n", " / ")
    if max(len(was), len(now)) <= limit:
        return was, now
    same = next((at for at, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, same - limit // 4)
    return _window(was, start, limit), _window(now, start, limit)


def _window(text: str, start: int, limit: int) -> str:
    end = start + limit
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _flat(factors: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in factors.items():
        if name == "env" and isinstance(value, dict):
            flat.update({f"env {variable}": text for variable, text in sorted(value.items())})
        else:
            flat[name] = value
    return flat
