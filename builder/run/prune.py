"""Bounds the disk that a cache takes: removes what no kept toolchain needs.

What is removed is decided from markers, and removed by a container under the run lock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from builder import events, flock
from builder.cache import layout, removal, retention, toolchain
from builder.cache.coverage import coverage
from builder.cache.marker_files import folder_name
from builder.engine.images import content, identity, names
from builder.errors import CANNOT_RUN, PreflightError, Problem
from builder.job import PrunePolicy
from builder.manifest.load import load
from builder.manifest.sections import ImageSpec
from builder.report.results import Section
from builder.run import cache_locks, image_cleanup, maintenance
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.run.plan import Plan
from builder.text import counted, printable, size

#: Kind of a row → its name in the table, if that is another word.
_KINDS = {"family": "kernels", "entries": "kernels", "aside": "quarantined"}


@dataclass(frozen=True)
class Limits:
    """What may be removed."""

    keep: int  # toolchains of each task
    older_than: float | None  # seconds without use
    max_size: int | None  # bytes of the cache root
    images: bool  # also serving images that have a tag


@dataclass(frozen=True)
class PruneRow:
    """One thing that was removed, or would be. The fields are keys of the JSON document."""

    kind: str  # marker, memo, family, entries, image or aside (quarantined)
    path: str
    family: str = ""
    key: str = ""
    bytes: int = 0
    why: str = ""
    stays: str = ""  # why it was not removed


@dataclass(frozen=True, kw_only=True)
class PruneSum:
    """A prune as it is in the JSON document. Sizes in bytes."""

    dry_run: bool
    steps: list[PruneRow]
    bytes_before: int
    bytes_after: int
    freed: int  # 0 with --dry-run
    image_bytes: int
    left: list[str]
    blocked_seconds: float


@dataclass
class PruneSection(Section):
    """The result of a prune."""

    prune: PruneSum


@dataclass
class PruneResult:
    """What a prune has removed so far, or would remove."""

    rows: list[PruneRow] = field(default_factory=list)
    before: int = 0  # bytes of the cache root
    after: int = 0  # bytes of it when all rows are removed
    freed: int = 0  # bytes that were deleted
    left: list[str] = field(default_factory=list)  # what keeps the root above its limit, one sentence each
    images: frozenset[str] = frozenset()  # identities that no marker or memo names any more
    kept_images: frozenset[str] = frozenset()  # identities that are still named
    image_bytes: int = 0
    blocked: float = 0.0  # seconds for which jobs have kept removals waiting

    @property
    def removed(self) -> list[PruneRow]:
        """Return the rows of what was removed."""
        return [row for row in self.rows if not row.stays]


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
        pins=tuple(sorted(_pins(executor))),
        dry_run=dry_run,
    )


def _pins(executor: ContainerExecutor) -> set[str]:
    """Return every name of the images that ``[cache] pins`` names.

    Raises PreflightError for an image that the engine does not have: what it needs is then unknown, and must stay.
    """
    found: set[str] = set()
    for pin in executor.context.manifest.cache.pins:
        spec = load(pin, pipes=False).image if pin.endswith((".toml", ".json")) else ImageSpec(ref=pin)
        image = executor.engine.image(spec.ref)
        digest = spec.ref.rpartition("@")[2]
        if image is not None:
            known = (identity(image.id, spec.setup), content(image, spec.setup), *names(image, spec.setup))
            found.update(name for name in known if name)
        elif digest.startswith("sha256:"):
            found.add(identity(digest, spec.setup))
        else:
            text = f"{pin} is not on this engine, so that it is unknown what of the cache it needs: nothing is removed."
            remedy = f"Run: docker pull {spec.ref}, or take it out of the pins."
            raise PreflightError(CANNOT_RUN, [Problem("[cache] pins", text, remedy)])
    return found


def prune(executor: ContainerExecutor, limits: Limits, *, dry_run: bool) -> None:
    """Remove what the limits do not keep, or report what would be removed. Raises PreflightError without a cache."""
    maintenance.require_root(executor)
    result = PruneResult()
    try:
        if dry_run:
            preview(executor, limits, result)
        else:
            with cache_locks.held(executor):
                prune_root(executor, limits, result)
        prune_images(executor, limits, result, dry_run=dry_run)
    finally:
        show(executor, result, dry_run=dry_run)


def preview(executor: ContainerExecutor, limits: Limits, result: PruneResult) -> None:
    """Add what would be removed now. Writes nothing, and starts no container if this process can read the root."""
    context = executor.context
    tasks = context.manifest.tasks
    known = executor.remembers(tasks)
    if not known:
        result.left.append(
            f"{context.manifest.image.ref} was never used with this cache; a dry run cannot know what it needs, "
            "prune can"
        )
    wanted = policy(executor, limits, executor.plan(tasks) if known else None, dry_run=True)
    direct = executor.direct_root()
    if direct is None:
        _run_in_container(executor, wanted, result)
        return
    found = retention.plan(direct, wanted, job_max=context.manifest.cache.job_max, now=time.time())
    result.rows += [
        PruneRow(step.kind, printable(step.name), step.family, step.key, step.bytes, step.why, step.stays)
        for step in found.steps
    ]
    result.before, result.after = found.before, found.after
    result.left += found.left
    result.images, result.kept_images = found.images, found.kept_images
    result.blocked = found.waits.seconds(found.refused)


def prune_root(executor: ContainerExecutor, limits: Limits, result: PruneResult) -> None:
    """Remove what the limits do not keep. The caller holds the run lock."""
    wanted = policy(executor, limits, executor.plan(executor.context.manifest.tasks), dry_run=False)
    _run_in_container(executor, wanted, result)


def _run_in_container(executor: ContainerExecutor, wanted: PrunePolicy, result: PruneResult) -> None:
    """Run a prune in a container, and add what it did, also where it did not succeed."""

    def on_event(event: events.Event) -> None:
        match event:
            case events.Pruned():  # and Planned
                result.rows.append(PruneRow(**vars(maintenance.printed(event))))
            case events.Removed():
                why = "quarantined for longer than a job may last"
                result.rows.append(PruneRow("aside", printable(event.path), why=why))
            case events.Freed():
                result.before, result.after, result.freed = event.before, event.after, event.freed
                result.left += map(printable, event.left)
                result.images, result.kept_images = frozenset(event.images), frozenset(event.kept_images)
                result.blocked = event.blocked

    maintenance.run(executor, "prune", on_event, ContainerRequest(prune=wanted))


def prune_images(executor: ContainerExecutor, limits: Limits, result: PruneResult, *, dry_run: bool) -> None:
    """Remove the engine's images of toolchains that nothing kept names any more, or only add what would be removed."""
    context = executor.context
    found = image_cleanup.superseded(
        executor.engine,
        dropped=result.images,
        kept=result.kept_images | {executor.serving.id},
        setup=context.manifest.image.setup,
        ref=context.manifest.image.ref,
        tagged=limits.images,
    )
    for gone in found if dry_run else image_cleanup.remove(executor.engine, found):
        image = gone.image
        result.rows.append(PruneRow("image", image.name, "", image.id, image.bytes, gone.why, gone.stays))
        result.image_bytes += 0 if gone.stays else image.bytes


def show(executor: ContainerExecutor, result: PruneResult, *, dry_run: bool) -> None:
    """Report a result: the table, and the sum."""
    say, report, name = executor.context.console.say, executor.context.report, executor.root_name
    result.left += _holders(executor, result)
    pruned = PruneSum(
        dry_run=dry_run,
        steps=result.rows,
        bytes_before=result.before,
        bytes_after=result.after if dry_run else max(0, result.before - result.freed),
        freed=0 if dry_run else result.freed,
        image_bytes=result.image_bytes,
        left=result.left,
        blocked_seconds=round(result.blocked, 3),
    )
    report.add(PruneSection(pruned))
    if result.rows:
        executor.context.console.table(("what", "which", "size", "why"), list(map(_cells, result.rows)))
    for text in result.left:
        say(text)
    kinds = summary(result.removed)
    if dry_run:
        would = f"would remove {kinds}, {size(result.before - result.after)} of" if kinds else "would remove nothing of"
        say(f"{name}: {would} {size(result.before)}; nothing was changed")
    else:
        what = f"removed {kinds}, freed {size(result.freed)} of" if kinds else "nothing to remove of"
        say(f"{name}: {what} {size(result.before)}")


def _holders(executor: ContainerExecutor, result: PruneResult) -> list[str]:
    """Return which processes hold the cache, as far as this process sees, where that keeps something."""
    root = executor.direct_root()
    told = any(row.stays == removal.HELD for row in result.rows) or any(removal.HELD in text for text in result.left)
    if root is None or not told:
        return []
    return [f"the cache is held by {name}" for name in flock.holders(layout.hold_lock(root))]


def summary(rows: Sequence[PruneRow]) -> str:
    """Return how many things of each kind there are: ``2 markers, 3 family directories``."""
    names = {
        "marker": "marker",
        "memo": "memo",
        "family": "family directory",
        "entries": "set of entries",
        "image": "image",
        "aside": "quarantined item",
    }
    counts = {noun: sum(row.kind == kind for row in rows) for kind, noun in names.items()}
    return ", ".join(
        f"{number} sets of entries" if noun == "set of entries" and number > 1 else counted(number, noun)
        for noun, number in counts.items()
        if number
    )


def _cells(row: PruneRow) -> list[str]:
    why = f"stays: {row.stays}" if row.stays else row.why
    return [_KINDS.get(row.kind, row.kind), row.path, size(row.bytes) if row.bytes else "–", why]
