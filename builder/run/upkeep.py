"""The verbs that look after a cache root between warm-ups: sweep and verify.

What they change, a container changes, under the run lock; what they say comes from its events.
"""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Mapping

from builder.cache.family_directories import bad_entries, places
from builder.errors import ColdError
from builder.run import cache_locks, maintenance, overlay
from builder.run.container_job import Asked
from builder.run.maintenance import Event, row
from builder.run.session import Session
from builder.text import counted


def sweep(session: Session, _said: Namespace) -> None:
    """Ends containers of dead owners, moves unsafe leftovers aside, and removes what has lain there long enough."""
    containers = [dataclasses.asdict(container) for container in session.sweep()]
    swept: list[dict[str, str]] = []
    removed: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    session.report.extra.update(containers=containers, swept=swept, removed=removed, kept=kept)

    def hear(event: Event) -> None:
        match event.get("event"):
            case "swept":
                swept.append(row(event, "path", "why"))
                session.console.say(f"moved aside {_place(swept[-1], 'path')}: {swept[-1]['why']}")
            case "removed":
                removed.append(row(event, "path"))
                why = (
                    "it lay aside for longer than a job may last" if removed[-1]["family"] else "nobody has it any more"
                )
                session.console.say(f"removed {removed[-1]['path']}: {why}")
            case "kept":
                kept.append(row(event, "path", "why"))
                session.console.say(f"left {kept[-1]['path']}: {kept[-1]['why']}")

    if not is_there(session):
        return
    with cache_locks.held(session), overlay.swept(session) as known:
        maintenance.run(session, "sweep", hear, Asked(view=known))
    more = f", {len(kept)} left" if kept else ""
    session.console.say(f"{session.cache.name}: {len(swept)} moved aside, {len(removed)} removed{more}")


def verify(session: Session, said: Namespace) -> None:
    """Every entry of every family directory. Raises ColdError when any is bad; with repair, when any is still bad."""
    entries = 0
    directories = 0
    bad: list[dict[str, str]] = []
    moved: list[dict[str, str]] = []

    def hear(event: Event) -> None:
        nonlocal entries, directories
        match event.get("event"):
            case "swept":
                moved.append(row(event, "path", "why"))
                session.console.say(f"moved aside {_place(moved[-1], 'path')}: {moved[-1]['why']}")
            case "bad":
                bad.append(row(event, "entry", "problem"))
            case "checked":
                directories += 1
                entries += int(event.get("entries") or 0)

    there, repair = is_there(session), bool(said.repair)
    if there and repair:
        with cache_locks.held(session):
            maintenance.run(session, "verify", hear, Asked(repair=True))
    elif there and session.cache.direct() is None:
        maintenance.run(session, "verify", hear)  # a copy of everything would be as large as everything
    elif there:
        with session.cache.view() as root:
            for place in places(root):
                found, problems = bad_entries(place, now=time.time())
                shared = {"family": place.family.name, "key": place.key}
                for name, problem in sorted(problems.items()):
                    hear({"event": "bad", **shared, "entry": name, "problem": problem})
                hear({"event": "checked", **shared, "entries": found})
    session.report.extra.update(entries=entries, bad=bad, repaired=moved)
    if not there:
        return
    if bad:
        columns = ("family", "key", "entry", "problem")
        session.console.table(columns, [[row[name] for name in columns] for row in bad])
    of = f"{counted(entries, 'entry')} in {counted(directories, 'family directory')}"
    of = of.replace("entrys", "entries").replace("directorys", "directories")
    if bad:
        remedy = (
            "see above why they stay" if repair else "run warm-cache verify --repair, so that they are compiled again"
        )
        raise ColdError(f"{len(bad)} bad of {of}; {remedy}")
    session.console.say(f"{session.cache.name}: {of}, all valid" + (f"; {len(moved)} moved aside" if moved else ""))


def is_there(session: Session) -> bool:
    """Whether there is a cache root to work on; where there is none, that is said."""
    there = maintenance.is_there(session)
    if not there:
        session.console.say(f"there is no cache at {session.cache.name}, so there is nothing to do in it")
    return there


def _place(row: Mapping[str, str], name: str) -> str:
    return f"{row['family']}/{row['key']}/{row[name]}"
