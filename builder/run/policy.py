"""What `prune` and `refresh` may remove: the manifest's word, or what was said instead."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from builder.cache import toolchain
from builder.cache.coverage import coverage
from builder.cache.marker_files import folder_name
from builder.errors import Problem, UsageError
from builder.job import PrunePolicy
from builder.manifest.values import a_string, positive_seconds, size
from builder.run.container_executor import ContainerExecutor
from builder.run.plan import Plan

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True)
class Limits:
    """keep: toolchains of each task; older_than: seconds without use; max_size: bytes. images: tagged ones too."""

    keep: int
    older_than: float | None
    max_size: int | None
    images: bool


def limits(executor: ContainerExecutor, said: Namespace) -> Limits:
    """Raises UsageError, with every problem, for a value that cannot be used."""
    cache = executor.context.manifest.cache
    problems: list[Problem] = []
    found = Limits(
        keep=given(said, "keep", _count, cache.keep, problems),
        older_than=given(said, "older-than", positive_seconds, cache.older_than, problems),
        max_size=given(said, "max-size", size, cache.max_size, problems),
        images=bool(said.images),
    )
    if problems:
        raise UsageError("options cannot be used as they are", problems)
    return found


def given(said: Namespace, option: str, convert: Callable[[Any], T], otherwise: D, problems: list[Problem]) -> T | D:
    """What the option says, converted; otherwise the manifest's value."""
    value = getattr(said, option.replace("-", "_"), None)
    if value is None:
        return otherwise
    try:
        return convert(value)
    except ValueError as error:
        problems.append(Problem(str(said.sources.get(option, f"--{option}")), f"{error}."))
        return otherwise


def _count(value: Any) -> int:
    text = a_string(value).strip()
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 1 << 31:
        raise ValueError(f"a number of at least 1 is wanted, found {text!r}")
    return int(text)


def policy(executor: ContainerExecutor, limits: Limits, plan: Plan | None, *, dry_run: bool) -> PrunePolicy:
    """With what the manifest's image needs, which never goes. plan: of all its tasks; None where nobody can tell what
    the image needs, because it never was in this cache.
    """
    items = plan.items if plan is not None else ()
    keys = {toolchain.digest(found): found for found in (toolchain.family_keys(item.record) for item in items)}
    return PrunePolicy(
        keep=limits.keep,
        older_than=limits.older_than,
        max_size=limits.max_size,
        image=executor.identity,
        keys=tuple(keys.values()),
        folders=tuple(
            folder_name(item.task.label, coverage(item.task, record=item.record, config_digest=item.config_digest))
            for item in items
        ),
        tasks=tuple(item.task.label for item in items if item.config_problem),
        dry_run=dry_run,
    )
