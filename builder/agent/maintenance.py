"""What is done to a whole cache root between warm-ups, in a container, as everything that writes below it."""

from __future__ import annotations

import time
from pathlib import Path

from builder import events
from builder.agent import views
from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.cache import environment, inventory, layout, removal
from builder.cache import survey as holdings
from builder.cache.inventory import bad_entries, contents
from builder.cache.layout import FamilyDirectory, claimable_directories
from builder.events import WARMED
from builder.job import Job


def sweep(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``sweep``: unsafe leftovers and invalid entries move aside, and what lay there long enough is removed."""
    root = Path(job.mount)
    layout.prepare(root)
    for place in claimable_directories(root):
        guard.check()
        _move_aside(root, place, output)
        removal.clear_host_specific(root, place.family.name, place.key)
    for family, key, path, stays in removal.clear_quarantine(root, job_max=job.job_max, now=time.time()):
        guard.check()
        if stays is None:
            output.event(events.Removed(family, key, path))
        else:
            output.event(events.Kept(family, key, path, stays))
    views.sweep(root, job, output, guard)
    return WARMED


def verify(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``verify``: every entry is looked at. With ``repair`` bad ones, and leftovers, move aside first."""
    root = Path(job.mount)
    if job.repair:
        layout.prepare(root)
    for place in claimable_directories(root):
        guard.check()
        if job.repair:
            _move_aside(root, place, output)
        entries, bad = bad_entries(place, now=time.time())
        for name, problem in sorted(bad.items()):
            output.event(events.BadEntry(place.family.name, place.key, name, problem))
        output.event(events.Checked(place.family.name, place.key, entries))
    return WARMED


def status(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``status``: what every family directory holds, and when every marker was last of use."""
    for held in contents(Path(job.mount)):
        guard.check()
        output.event(events.FamilyContents(**vars(held)))
    for mark in holdings.marks(Path(job.mount))[0]:
        output.event(events.MarkerUsed(mark.path, mark.used))
    return WARMED


def families(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``families``: which family directories there are, and what each is for."""
    for each in environment.described(Path(job.mount)):
        guard.check()
        output.event(events.FamilyDescribed(**vars(each)))
    return WARMED


def survey(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``survey``: what the root holds, as metrics."""
    for name, value, labels in holdings.samples(Path(job.mount)):
        guard.check()
        output.event(events.MetricSample(name, value, labels))
    return WARMED


def _move_aside(root: Path, place: FamilyDirectory, output: Output) -> None:
    name = place.family.name
    moved = inventory.sweep(
        place.family,
        place.path,
        layout.quarantine(root, name, place.key),
        now=time.time(),
        older_than=inventory.IN_PROGRESS,
        mount=place.mount(),
    )
    for path, why in moved:
        output.event(events.Quarantined(name, place.key, path, why))
