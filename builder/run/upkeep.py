"""The verbs that look after a cache root between warm-ups: sweep and verify.

What they change, a container changes, under the run lock; what they say comes from its events.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from builder import events
from builder.cache.inventory import bad_entries
from builder.cache.layout import claimable_directories
from builder.errors import ColdError
from builder.run import cache_locks, maintenance, overlay
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.run.maintenance import row
from builder.text import counted


def sweep(executor: ContainerExecutor) -> None:
    """Ends containers of dead owners, moves unsafe leftovers aside, and removes what has lain there long enough."""
    context = executor.context
    containers = [dataclasses.asdict(container) for container in executor.sweep()]
    swept: list[dict[str, str]] = []
    removed: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    context.report.extra.update(containers=containers, swept=swept, removed=removed, kept=kept)

    def hear(event: events.Event) -> None:
        match event:
            case events.Quarantined():
                swept.append(row(event))
                context.console.say(f"moved aside {_place(swept[-1], 'path')}: {swept[-1]['why']}")
            case events.Removed():
                removed.append(row(event))
                why = (
                    "it lay aside for longer than a job may last" if removed[-1]["family"] else "nobody has it any more"
                )
                context.console.say(f"removed {removed[-1]['path']}: {why}")
            case events.Kept():
                kept.append(row(event))
                context.console.say(f"left {kept[-1]['path']}: {kept[-1]['why']}")

    if not is_there(executor):
        return
    with cache_locks.held(executor), overlay.swept(executor) as known:
        maintenance.run(executor, "sweep", hear, ContainerRequest(view=known))
    more = f", {len(kept)} left" if kept else ""
    context.console.say(f"{executor.cache.name}: {len(swept)} moved aside, {len(removed)} removed{more}")


def verify(executor: ContainerExecutor, *, repair: bool) -> None:
    """Every entry of every family directory. Raises ColdError when any is bad; with repair, when any is still bad."""
    context = executor.context
    entries = 0
    directories = 0
    bad: list[dict[str, str]] = []
    moved: list[dict[str, str]] = []

    def hear(event: events.Event) -> None:
        nonlocal entries, directories
        match event:
            case events.Quarantined():
                moved.append(row(event))
                context.console.say(f"moved aside {_place(moved[-1], 'path')}: {moved[-1]['why']}")
            case events.BadEntry():
                bad.append(row(event))
            case events.Checked():
                directories += 1
                entries += event.entries

    there = is_there(executor)
    if there and repair:
        with cache_locks.held(executor):
            maintenance.run(executor, "verify", hear, ContainerRequest(repair=True))
    elif there and executor.cache.direct() is None:
        maintenance.run(executor, "verify", hear)  # a copy of everything would be as large as everything
    elif there:
        with executor.cache.view() as root:
            for place in claimable_directories(root):
                found, problems = bad_entries(place, now=time.time())
                for name, problem in sorted(problems.items()):
                    hear(events.BadEntry(place.family.name, place.key, name, problem))
                hear(events.Checked(place.family.name, place.key, found))
    context.report.extra.update(entries=entries, bad=bad, repaired=moved)
    if not there:
        return
    if bad:
        columns = ("family", "key", "entry", "problem")
        context.console.table(columns, [[row[name] for name in columns] for row in bad])
    of = f"{counted(entries, 'entry')} in {counted(directories, 'family directory')}"
    if bad:
        remedy = (
            "see above why they stay" if repair else "run warm-cache verify --repair, so that they are compiled again"
        )
        raise ColdError(f"{len(bad)} bad of {of}; {remedy}")
    context.console.say(f"{executor.cache.name}: {of}, all valid" + (f"; {len(moved)} moved aside" if moved else ""))


def is_there(executor: ContainerExecutor) -> bool:
    """Whether there is a cache root to work on; where there is none, that is said."""
    there = maintenance.is_there(executor)
    if not there:
        executor.context.console.say(f"there is no cache at {executor.cache.name}, so there is nothing to do in it")
    return there


def _place(row: Mapping[str, str], name: str) -> str:
    return f"{row['family']}/{row['key']}/{row[name]}"
