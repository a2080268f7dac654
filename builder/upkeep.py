"""The verbs that look after a cache root between warm-ups: sweep and verify.

What they change, a container changes, under the run lock; what they say comes from its events.
"""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from builder import runlock
from builder.container import Deadlines
from builder.errors import ColdError, EngineLostError, PreflightError, Problem
from builder.launch import NOTHING_ELSE, Asked, describe
from builder.report import counted
from builder.session import Session
from builder.warmup.events import FAILED, WARMED
from builder.warmup.files import printable
from builder.warmup.places import bad_entries, places
from builder.warmup.task import Task

#: A root of a terabyte on a slow disk; a container that says nothing for so long hangs. Seconds.
TIMEOUT = 3600.0

Event = Mapping[str, Any]


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
                swept.append(_row(event, "path", "why"))
                session.console.say(f"moved aside {_place(swept[-1], 'path')}: {swept[-1]['why']}")
            case "removed":
                removed.append(_row(event, "path"))
                session.console.say(f"removed {removed[-1]['path']}: it lay aside for longer than a job may last")
            case "kept":
                kept.append(_row(event, "path", "why"))
                session.console.say(f"left {kept[-1]['path']}: {kept[-1]['why']}")

    if not is_there(session):
        return
    with runlock.held(session):
        in_container(session, "sweep", hear)
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
                moved.append(_row(event, "path", "why"))
                session.console.say(f"moved aside {_place(moved[-1], 'path')}: {moved[-1]['why']}")
            case "bad":
                bad.append(_row(event, "entry", "problem"))
            case "checked":
                directories += 1
                entries += int(event.get("entries") or 0)

    there, repair = is_there(session), bool(said.repair)
    if there and repair:
        with runlock.held(session):
            in_container(session, "verify", hear, Asked(repair=True))
    elif there and session.cache.direct() is None:
        in_container(session, "verify", hear)  # a copy of everything would be as large as everything
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
    """Whether there is a cache root to work on; nothing here makes one where somebody mistyped a name."""
    session.report.cache = session.cache.name
    if session.cache.exists():
        with session.cache.view(entries=False) as root:
            if (root / "layout.json").is_file():
                return True
    session.console.say(f"there is no cache at {session.cache.name}, so there is nothing to do in it")
    return False


def in_container(session: Session, mode: str, hear: Callable[[Event], None], asked: Asked = NOTHING_ELSE) -> None:
    """This mode to its end, and what it told. Raises what kept it from ending well."""
    run = session.manifest.run
    limits = Deadlines(task=TIMEOUT, silence=TIMEOUT, start=run.start, grace=run.grace)
    task = Task(label=mode, model="", recipe="command")
    outcome = session.run(mode, task, limits, asked)
    for event in outcome.events:
        hear(event)
    session.cancel.check()
    if outcome.ended == "exited" and outcome.exit_code == WARMED:
        return
    if outcome.exit_code == FAILED:
        problem = Problem("cache", outcome.tail[-1] if outcome.tail else "it cannot be used.")
        raise PreflightError("this machine can't run it", [problem])
    raise EngineLostError(f"the container that was to {mode} {describe(outcome)}", notes=outcome.tail)


def _row(event: Event, *names: str) -> dict[str, str]:
    return {name: printable(str(event.get(name, ""))) for name in ("family", "key", *names)}


def _place(row: Mapping[str, str], name: str) -> str:
    return f"{row['family']}/{row['key']}/{row[name]}"
