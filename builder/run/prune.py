"""The verb `prune`: bounded disk. What goes is decided from markers, and goes in a container, under the run lock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from builder import events
from builder.cache import retention, toolchain
from builder.cache.coverage import coverage
from builder.cache.marker_files import folder_name
from builder.cache.retention import PrunePlan
from builder.job import PrunePolicy
from builder.run import cache_locks, maintenance, upkeep
from builder.run import image_cleanup as images
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.run.plan import Plan
from builder.text import counted, printable, size

#: For people: what one step is about.
_KINDS = {"marker": "marker", "memo": "memo", "family": "kernels", "entries": "kernels", "image": "image"}


@dataclass(frozen=True)
class Limits:
    """What may be removed."""

    keep: int  # toolchains of each task
    older_than: float | None  # seconds without use
    max_size: int | None  # bytes of the cache root
    images: bool  # also serving images that have a tag


@dataclass
class Outcome:
    """What a prune came to, or would. rows: of the table. Bytes of the cache root: before, after; freed: really."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    before: int = 0
    after: int = 0
    freed: int = 0
    left: list[str] = field(default_factory=list)
    images: frozenset[str] = frozenset()
    kept_images: frozenset[str] = frozenset()
    image_bytes: int = 0

    @property
    def gone(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if not row["stays"]]


def policy(executor: ContainerExecutor, limits: Limits, plan: Plan | None, *, dry_run: bool) -> PrunePolicy:
    """Return the policy: the limits, and what the manifest's image needs, which is never removed.

    plan: of all tasks; None where it is unknown what the image needs, because it was never used with this cache.
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


def prune(executor: ContainerExecutor, limits: Limits, *, dry_run: bool) -> None:
    """Remove what the limits do not keep, or report what would be removed."""
    if not upkeep.is_there(executor):
        return
    outcome = Outcome()
    try:
        if dry_run:
            look(executor, limits, outcome)
        else:
            with cache_locks.held(executor):
                carry_out(executor, limits, outcome)
        prune_images(executor, limits, outcome, dry_run=dry_run)
    finally:
        tell(executor, outcome, dry_run=dry_run)


def look(executor: ContainerExecutor, limits: Limits, outcome: Outcome) -> None:
    """What a prune would do now. Writes nothing, and starts no container where the root can be read from here."""
    context = executor.context
    tasks = context.manifest.tasks
    known = executor.remembers(tasks)
    if not known:
        outcome.left.append(
            f"{context.manifest.image.ref} was never warmed here; a dry run cannot tell what it needs, prune can"
        )
    wanted = policy(executor, limits, executor.plan(tasks) if known else None, dry_run=True)
    direct = executor.cache.direct()
    if direct is None:
        in_container(executor, wanted, outcome)
        return
    found = retention.plan(direct, wanted, job_max=context.manifest.cache.job_max, now=time.time())
    _take(outcome, found)


def carry_out(executor: ContainerExecutor, limits: Limits, outcome: Outcome) -> None:
    """Under the run lock, which the caller holds."""
    wanted = policy(executor, limits, executor.plan(executor.context.manifest.tasks), dry_run=False)
    in_container(executor, wanted, outcome)


def in_container(executor: ContainerExecutor, wanted: PrunePolicy, outcome: Outcome) -> None:
    """What the container said on its way, also where it did not come to its end."""

    def hear(event: events.Event) -> None:
        match event:
            case events.Pruned():  # and Planned
                outcome.rows.append(maintenance.row(event))
            case events.Removed():
                outcome.rows.append(
                    {"kind": "aside", "path": printable(event.path), "family": "", "key": ""}
                    | {"why": "lay aside for longer than a job may last", "bytes": 0, "stays": ""}
                )
            case events.Freed():
                outcome.before, outcome.after, outcome.freed = event.before, event.after, event.freed
                outcome.left += map(printable, event.left)
                outcome.images, outcome.kept_images = frozenset(event.images), frozenset(event.kept_images)

    maintenance.run(executor, "prune", hear, ContainerRequest(prune=wanted))


def _take(outcome: Outcome, found: PrunePlan) -> None:
    for step in found.steps:
        row = asdict(step)
        outcome.rows.append(
            {name: row[name] for name in ("kind", "family", "key", "why", "bytes", "stays")}
            | {"path": printable(step.name)}
        )
    outcome.before, outcome.after = found.before, found.after
    outcome.left += found.left
    outcome.images, outcome.kept_images = found.images, found.kept_images


def prune_images(executor: ContainerExecutor, limits: Limits, outcome: Outcome, *, dry_run: bool) -> None:
    """The engine's images of toolchains that nothing kept names any more."""
    context = executor.context
    serving = executor.serving
    found = images.superseded(
        executor.engine,
        dropped=outcome.images,
        kept=outcome.kept_images | {serving.id},
        setup=context.manifest.image.setup,
        ref=context.manifest.image.ref,
        tagged=limits.images,
    )
    for gone in found if dry_run else images.remove(executor.engine, found):
        outcome.rows.append(
            {"kind": "image", "path": gone.image.name, "family": "", "key": gone.image.id, "why": gone.why}
            | {"bytes": gone.image.bytes, "stays": gone.stays}
        )
        outcome.image_bytes += 0 if gone.stays else gone.image.bytes


def tell(executor: ContainerExecutor, outcome: Outcome, *, dry_run: bool) -> None:
    """The table, and what it came to."""
    context = executor.context
    say = context.console.say
    context.report.extra["prune"] = {
        "dry_run": dry_run,
        "steps": outcome.rows,
        "bytes_before": outcome.before,
        "bytes_after": outcome.after if dry_run else max(0, outcome.before - outcome.freed),
        "freed": 0 if dry_run else outcome.freed,
        "image_bytes": outcome.image_bytes,
        "left": outcome.left,
    }
    if outcome.rows:
        columns = ("what", "which", "size", "why")
        context.console.table(columns, [_row(row) for row in outcome.rows])
    for text in outcome.left:
        say(text)
    kinds = summary(outcome.gone)
    name = executor.cache.name
    if dry_run:
        would = (
            f"would remove {kinds}, {size(outcome.before - outcome.after)} of" if kinds else "would remove nothing of"
        )
        say(f"{name}: {would} {size(outcome.before)}; nothing was changed")
    else:
        what = f"removed {kinds}, freed {size(outcome.freed)} of" if kinds else "nothing to remove of"
        say(f"{name}: {what} {size(outcome.before)}")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """``2 markers, 3 kernel directories``."""
    names = {
        "marker": "marker",
        "memo": "memo",
        "family": "family directory",
        "entries": "set of entries",
        "image": "image",
        "aside": "thing that lay aside",
    }
    plurals = {"family": "family directories", "entries": "sets of entries", "aside": "things that lay aside"}
    parts = []
    for kind, noun in names.items():
        number = sum(row["kind"] == kind for row in rows)
        if number:
            parts.append(f"{number} {plurals[kind]}" if number > 1 and kind in plurals else counted(number, noun))
    return ", ".join(parts)


def _row(row: Mapping[str, Any]) -> list[str]:
    why = f"stays: {row['stays']}" if row["stays"] else row["why"]
    return [_KINDS.get(row["kind"], row["kind"]), row["path"], size(row["bytes"]) if row["bytes"] else "–", why]
