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
from builder.cache import layout, memos, removal, survey, usage
from builder.cache.families import directory
from builder.cache.retention import PrunePlan, PruneStep, plan
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
    freed = sum(_delete(path) for path in _leftovers(root))
    found = plan(root, policy, job_max=job.job_max, now=now)
    for step in found.steps:
        guard.check()
        done, size = (step, 0) if step.stays else _do(root, step, job, now)
        freed += size
        output.event(_event(events.Pruned, replace(done, bytes=step.bytes if done.stays else size)))
    for family, key, path, stays in removal.clear_quarantine(root, job_max=job.job_max, now=now):
        guard.check()
        if stays is None:
            output.event(events.Removed(family, key, path))
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
        )
    )


# --- one step --------------------------------------------------------------------------------------------------------


def _do(root: Path, step: PruneStep, job: Job, now: float) -> tuple[PruneStep, int]:
    """Do one step. Returns it as it was done, and the bytes that it freed."""
    try:
        if step.kind == "marker":
            _drop_marker(root, step.name)
            return step, 0
        if step.kind == "memo":
            memos.drop_memos(root, root / step.name, step.key)
            return step, 0
        if step.kind == "family":
            return _drop_family(root, step, job, now)
        return _drop_entries(root, step, job, now)
    except OSError as error:
        return replace(step, stays=f"cannot be removed: {files.why(error)}"), 0


def _drop_marker(root: Path, name: str) -> None:
    path = root / name
    path.unlink(missing_ok=True)
    files.sync_directory(path.parent)
    usage.forget(root, name)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _drop_family(root: Path, step: PruneStep, job: Job, now: float) -> tuple[PruneStep, int]:
    path = Path(directory(str(root), step.family, step.key))
    with removal.may_remove(root, step.family, step.key, job_max=job.job_max, now=now) as refusal:
        if refusal:
            return replace(step, stays=refusal), 0
        doomed = _move(root, path, f"{step.family}-{step.key}")
        (path.parent / f"{step.key}.json").unlink(missing_ok=True)
    return step, _delete(doomed)


def _drop_entries(root: Path, step: PruneStep, job: Job, now: float) -> tuple[PruneStep, int]:
    base = Path(directory(str(root), step.family, step.key))
    freed, stays = 0, ""
    for name in step.names:
        with removal.may_remove(root, step.family, step.key, job_max=job.job_max, now=now, what=base / name) as refusal:
            if refusal:
                stays = stays or refusal
                continue
            doomed = _move(root, base / name, f"{step.family}-{step.key}")
        freed += _delete(doomed)
    return (replace(step, stays=stays) if stays and not freed else step), freed


def _move(root: Path, path: Path, name: str) -> Path:
    """Rename it into the folder of what is being deleted."""
    doomed = root / PRUNED / f"{name}-{os.urandom(16).hex()}"
    doomed.parent.mkdir(parents=True, exist_ok=True)
    path.rename(doomed)
    files.sync_directory(path.parent)
    return doomed


def _leftovers(root: Path) -> Iterator[Path]:
    for item in files.listing(str(root / PRUNED)) or ():
        yield Path(item.path)


def _delete(path: Path) -> int:
    """Delete it. Returns the bytes freed: those of files that had no other hard link."""
    freed = 0
    with contextlib.suppress(OSError):
        found = [path]
        if stat.S_ISDIR(path.lstat().st_mode):
            found += [path / name for name, _ in files.walk(str(path), ())]
        for item in found:
            with contextlib.suppress(OSError):
                status = item.lstat()
                if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:
                    freed += status.st_blocks * 512
    return freed if removal.remove(path) is None else 0
