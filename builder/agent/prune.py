"""Mode ``prune``: removes what `cache.retention` plans.

Markers are removed first, then memos, then the kernels of both. A directory is renamed out of its place under the
locks of the removal rule, and only then deleted: after a kill at any moment, everything that a marker lists exists.
What a killed prune leaves in ``aside/pruned`` the next one deletes.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from builder import events, files, text
from builder.agent import views
from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.beneath import Tree
from builder.cache import blocked, layout, leaves, memos, removal, survey, usage
from builder.cache.blocked import Waits
from builder.cache.retention import PrunePlan, PruneStep, is_past_use, plan
from builder.events import FAILED, WARMED
from builder.job import Job

#: Folder below the root for what is being deleted.
PRUNED = "aside/pruned"


def prune(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``prune``: carry out the plan, and report every step and the sum."""
    policy, root, now = job.prune, Path(job.mount), time.time()
    if policy is None:
        output.say("there is no policy in this job")
        return FAILED
    if policy.dry_run:
        found = plan(root, policy, job_max=job.job_max, now=now)
        for step in found.steps:
            output.event(_event(events.Planned, step))
        _total(output, found, 0)
        return WARMED
    layout.prepare(root)
    views.remove_generations(root, guard)
    freed = sum(_delete(root, name) for name in _leftovers(root))
    found = plan(root, policy, job_max=job.job_max, now=now)
    refused = set(found.refused)
    for step in found.steps:
        guard.check()
        done, size = (step, 0) if step.stays else _do(root, step, found.waits)
        freed += size
        output.event(_event(events.Pruned, replace(done, bytes=step.bytes if done.stays else size)))
        if done.stays and step.family:
            refused.add(f"{step.family}/{step.key}")
    blocked.write(root, found.waits.still(refused))
    for family, key, path, stays in removal.clear_quarantine(root, job_max=job.job_max, now=now):
        guard.check()
        if stays is None:
            output.event(events.Removed(family, key, path))
    leaves.refresh(root)
    for mark in survey.marks(root)[0]:
        if mark.folder in policy.folders:
            usage.stamp(root, mark.path)
    _total(output, found, freed)
    return WARMED


def _event(kind: type[events.Pruned], step: PruneStep) -> events.Pruned:
    return kind(
        kind=step.kind,
        path=text.printable(step.name),
        family=step.family,
        key=step.key,
        bytes=step.bytes,
        why=step.why,
        stays=step.stays,
    )


def _total(output: Output, found: PrunePlan, freed: int) -> None:
    output.event(
        events.Freed(
            before=found.before,
            after=found.after,
            freed=freed,
            left=tuple(found.left),
            images=tuple(sorted(found.images)),
            kept_images=tuple(sorted(found.kept_images)),
            blocked=found.waits.seconds(found.refused),
        )
    )


# --- one step --------------------------------------------------------------------------------------------------------


def _do(root: Path, step: PruneStep, waits: Waits) -> tuple[PruneStep, int]:
    """Do one step. Returns it as it was done, and the bytes that it freed."""
    try:
        if step.kind == "marker":
            _drop_marker(root, step.name)
            return step, 0
        if step.kind == "memo":
            memos.drop_memos(root, root / step.name, step.key)
            return step, 0
        if step.kind == "family":
            return _drop_family(root, step, waits)
        return _drop_entries(root, step, waits)
    except OSError as error:
        return replace(step, stays=f"cannot be removed: {files.why(error)}"), 0


def _may_remove(
    root: Path, step: PruneStep, waits: Waits, what: Path | None = None
) -> contextlib.AbstractContextManager[str | None]:
    return removal.may_remove(
        root,
        step.family,
        step.key,
        job_max=waits.job_max,
        now=waits.now,
        what=what,
        past_hold=waits.is_over(blocked.HOLD),
        past_use=is_past_use(waits, step),
    )


def _drop_marker(root: Path, name: str) -> None:
    folder = name.rpartition("/")[0]
    with Tree(root) as tree:
        with contextlib.suppress(FileNotFoundError):
            tree.unlink(name)
        tree.sync(folder)
        usage.forget(root, name)
        with contextlib.suppress(OSError):
            tree.rmdir(folder)


def _drop_family(root: Path, step: PruneStep, waits: Waits) -> tuple[PruneStep, int]:
    with _may_remove(root, step, waits) as refusal:
        if refusal:
            return replace(step, stays=refusal), 0
        doomed = _move(root, step, f"{step.family}/{step.key}")
        with Tree(root) as tree, contextlib.suppress(FileNotFoundError):
            tree.unlink(f"{step.family}/{step.key}.json")
    return step, _delete(root, doomed)


def _drop_entries(root: Path, step: PruneStep, waits: Waits) -> tuple[PruneStep, int]:
    freed, stays = 0, ""
    for entry in step.names:
        name = f"{step.family}/{step.key}/{entry}"
        with _may_remove(root, step, waits, root / name) as refusal:
            if refusal:
                stays = stays or refusal
                continue
            doomed = _move(root, step, name)
        freed += _delete(root, doomed)
    return (replace(step, stays=stays) if stays and not freed else step), freed


def _move(root: Path, step: PruneStep, name: str) -> str:
    """Rename it into the folder of what is being deleted; return its new path below the root."""
    doomed = f"{PRUNED}/{step.family}-{step.key}-{os.urandom(16).hex()}"
    with Tree(root) as tree:
        tree.make_folder(PRUNED)
        tree.move(name, tree, doomed)
        tree.sync(name.rpartition("/")[0])
    return doomed


def _leftovers(root: Path) -> Iterator[str]:
    with Tree(root) as tree:
        yield from (item.name for item in tree.listing(PRUNED) or ())


def _delete(root: Path, name: str) -> int:
    """Delete it. Returns the bytes freed: those of files that had no other hard link."""
    freed = 0
    with contextlib.suppress(OSError), Tree(root) as tree:
        found = [tree.lstat(name)]
        for _, item in tree.walk(name) if stat.S_ISDIR(found[0].st_mode) else ():
            with contextlib.suppress(OSError):
                found += [item.stat()] if item is not None else []
        kept = [status for status in found if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1]
        freed = sum(status.st_blocks * 512 for status in kept)
    return freed if removal.remove(root, name) is None else 0
