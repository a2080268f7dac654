"""The verb `verify`: check every entry of the cache."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from builder import events
from builder.cache.inventory import bad_entries
from builder.cache.layout import claimable_directories
from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.errors import ColdError
from builder.report.console import Console
from builder.report.results import Section
from builder.run import cache_locks, maintenance
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.text import counted

COLUMNS = ("family", "key", "entry", "problem")


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(ManifestArgs):
    """Arguments of `verify`."""

    repair: bool = False
    lock_timeout: str | None = None


def run(args: VerifyArgs, invocation: Invocation) -> None:
    """Check every entry. Raises ColdError if one is bad; with repair, if one still is."""
    manifest = invocation.manifest(lock_timeout=args.lock_timeout)
    with invocation.containers(invocation.context(manifest)) as executor:
        maintenance.require_root(executor)
        _verify(executor, args.repair)


@dataclass
class Verification(Section):
    """What a check of every entry found."""

    entries: int = 0
    bad: list[events.BadEntry] = field(default_factory=list)
    repaired: list[events.Quarantined] = field(default_factory=list)


class _Verifying:
    """What was found so far."""

    def __init__(self, console: Console) -> None:
        self._say = console.say
        self.found = Verification()
        self.directories = 0

    def on_event(self, event: events.Event) -> None:
        match event := maintenance.printed(event):
            case events.Quarantined():
                self.found.repaired.append(event)
                self._say(f"quarantined {event.family}/{event.key}/{event.path}: {event.why}")
            case events.Kept():
                self._say(f"left {event.family}/{event.key}/{event.path}: {event.why}")
            case events.BadEntry():
                self.found.bad.append(event)
            case events.Checked():
                self.directories += 1
                self.found.entries += event.entries


def _verify(executor: ContainerExecutor, repair: bool) -> None:
    console, report = executor.context.console, executor.context.report
    verifying = _Verifying(console)
    _check_entries(executor, verifying, repair)
    found = verifying.found
    report.add(found)
    total = f"{counted(found.entries, 'entry')} in {counted(verifying.directories, 'family directory')}"
    if found.bad:
        console.table(COLUMNS, [[row.family, row.key, row.entry, row.problem] for row in found.bad])
        remedy = (
            "see above why they stay" if repair else "run warm-cache verify --repair, so that they are compiled again"
        )
        raise ColdError(f"{len(found.bad)} bad of {total}; {remedy}")
    more = f"; {len(found.repaired)} quarantined" if found.repaired else ""
    console.say(f"{executor.root_name}: {total}, all valid{more}")


def _check_entries(executor: ContainerExecutor, verifying: _Verifying, repair: bool) -> None:
    """Check the root in a container, or in this process where it can read all of it and nothing is repaired."""
    if repair:
        with cache_locks.held(executor):
            maintenance.run(executor, "verify", verifying.on_event, ContainerRequest(repair=True))
    elif executor.direct_root() is None:
        maintenance.run(executor, "verify", verifying.on_event)  # a copy would be as large as the cache
    else:
        with executor.cache.view() as root:
            for directory in claimable_directories(root):
                family, key = directory.family.name, directory.key
                entries, problems = bad_entries(directory, now=time.time())
                for name, problem in sorted(problems.items()):
                    verifying.on_event(events.BadEntry(family, key, name, problem))
                verifying.on_event(events.Checked(family, key, entries))
