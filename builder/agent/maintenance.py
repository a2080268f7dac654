"""Modes for a whole cache root between warm-ups: sweep, verify, status, families, survey."""

from __future__ import annotations

import time
from pathlib import Path

from builder import events
from builder.agent import views
from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.cache import environment, inventory, layout, leaves, removal, restore
from builder.cache import survey as holdings
from builder.cache.inventory import bad_entries, contents
from builder.cache.layout import FamilyDirectory, claimable_directories
from builder.events import WARMED
from builder.job import Job


def sweep(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``sweep``: quarantine unsafe leftovers and invalid entries; remove what has been there for `job_max`."""
    root = Path(job.mount)
    layout.prepare(root)
    for place in claimable_directories(root):
        guard.check()
        _quarantine(root, place, job, output)
        removal.clear_host_specific(root, place.family.name, place.key)
    for family, key, path, stays in removal.clear_quarantine(root, job_max=job.job_max, now=time.time()):
        guard.check()
        if stays is None:
            output.event(events.Removed(family, key, path))
        else:
            output.event(events.Kept(family, key, path, stays))
    for path in restore.sweep_staging(root):
        output.event(events.Removed("", "", path))
    views.sweep(root, job, output, guard)
    return WARMED


def verify(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``verify``: check every entry. With ``repair``, quarantine bad ones and leftovers first."""
    root = Path(job.mount)
    if job.repair:
        layout.prepare(root)
    for place in claimable_directories(root):
        guard.check()
        if job.repair:
            _quarantine(root, place, job, output)
        entries, bad = bad_entries(place, now=time.time())
        for name, problem in sorted(bad.items()):
            output.event(events.BadEntry(place.family.name, place.key, name, problem))
        output.event(events.Checked(place.family.name, place.key, entries))
    return WARMED


def status(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``status``: report the contents of every family directory, and when every marker was last used."""
    for held in contents(Path(job.mount)):
        guard.check()
        output.event(events.FamilyContents(**vars(held)))
    for mark in holdings.marks(Path(job.mount))[0]:
        output.event(events.MarkerUsed(mark.path, mark.used))
    return WARMED


def families(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``families``: report every family directory, and the factors of its key."""
    for each in environment.described(Path(job.mount)):
        guard.check()
        output.event(events.FamilyDescribed(**vars(each)))
    return WARMED


def survey(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``survey``: report the contents of the root as metrics."""
    for name, value, labels in holdings.samples(Path(job.mount)):
        guard.check()
        output.event(events.MetricSample(name, value, labels))
    return WARMED


def _quarantine(root: Path, place: FamilyDirectory, job: Job, output: Output) -> None:
    name = place.family.name
    if place.family.looked_at:
        leaves.refresh(root)  # what markers list is no leftover
    moved = inventory.sweep(
        place.family,
        place.tree(),
        layout.quarantine(root, name, place.key),
        now=time.time(),
        older_than=inventory.IN_PROGRESS,
        job_max=job.job_max,
        mount=place.mount(),
    )
    for path, why, stays in moved:
        if stays:
            output.event(events.Kept(name, place.key, path, f"{why}; {stays}"))
        else:
            output.event(events.Quarantined(name, place.key, path, why))
