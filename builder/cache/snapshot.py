"""The audit without an engine: family directories before and after a job, compared by inventory alone.

For runner containers, with jobs that work on the mounted cache itself. It finds less than the audit of a view: a
rewritten entry shows only by its time, and other files count only where they look like a broken entry.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder import files
from builder.cache import inventory
from builder.cache.entries import EntryProblem, ProblemKind
from builder.cache.families import FAMILIES, FAMILY
from builder.cache.findings import Audit, shape_of_lock, short, span, with_shapes
from builder.cache.inventory import Entry, Inventory
from builder.cache.layout import FamilyDirectory
from builder.events import Finding
from builder.text import printable

SCHEMA = 1
_LIMIT = 256 << 20


class SnapshotError(Exception):
    """The snapshot cannot be used. The message is the reason."""


def in_environment(environ: Mapping[str, str]) -> list[FamilyDirectory]:
    """Return the directories that a process with this environment uses, of the families with a variable that is set."""
    found = []
    for family in FAMILIES:
        value = environ.get(family.env[0][0], "")
        if family.claimable and value.startswith("/"):
            found.append(FamilyDirectory(family, Path(value).name, Path(value)))
    return found


def take(wanted: list[FamilyDirectory]) -> dict[str, Any]:
    """Return what these directories hold now: a JSON document for `compare`."""
    return {"schema": SCHEMA, "taken": time.time(), "places": [_taken(place) for place in wanted]}


def read(path: Path) -> dict[str, Any]:
    """Return a document that `take` made. Raises SnapshotError."""
    try:
        document = files.read_json(str(path), _LIMIT)
    except files.UnreadableError as error:
        raise SnapshotError(f"{path} {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise SnapshotError(f"{path} is no snapshot of this version: audit --here --before FILE makes one")
    try:
        dict(_places(document))
        if not math.isfinite(document["taken"]):
            raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SnapshotError(f"{path} is no snapshot: {type(error).__name__}") from None
    return document


def compare(before: Mapping[str, Any], wanted: list[FamilyDirectory]) -> Audit:
    """Return what has changed since, in the directories of the snapshot and in these."""
    found, locks = Audit(), []
    then, began = dict(_places(before)), float(before["taken"])
    for place in dict.fromkeys([*wanted, *then]):  # of the same one, that with a root
        stamps, old = then.get(place, ({}, Inventory({})))
        now = _taken(place)
        found.findings += _compared(place, old, _inventory(now["entries"]), began, found)
        for name, taken in now["locks"].items():
            shape = shape_of_lock(name)
            if shape is not None and stamps.get(name) != taken:
                locks.append((taken / 1e9, shape))
    found.asked = sorted({shape for _, shape in locks})
    found.findings = sorted(with_shapes(found.findings, locks))
    return found


def _compared(place: FamilyDirectory, old: Inventory, new: Inventory, began: float, found: Audit) -> Iterator[Finding]:
    compiled = inventory.added(old, new)
    again = inventory.recompiled(old, new)
    for kind, names in (("compiled", compiled), ("rewritten", again)):
        for name in names:
            size, first, last = span(place.family, place.tree(), name, earliest=began, latest=time.time())
            yield Finding(place.family.name, short(place.key), kind, short(name), "", size, first, last)
    for name, problem in new.invalid.items():
        if name in old.valid:
            yield Finding(place.family.name, short(place.key), "damaged", short(name), problem.text)
        elif name not in old.entries:
            yield Finding(place.family.name, short(place.key), "foreign", short(name), problem.text)
    for name in old.valid - new.entries.keys():
        yield Finding(place.family.name, short(place.key), "deleted", short(name))
    stamped = {name for name in old.valid & new.valid if new.entries[name].used_ns}
    found.used += len((inventory.used(old, new) & stamped) - again)


def _taken(place: FamilyDirectory) -> dict[str, Any]:
    entries = inventory.scan(place.family, place.tree()).entries.values()
    locks = {}
    tree = place.tree()
    for item in tree.listing("locks") or () if place.family.name == "deep_gemm" else ():
        if shape_of_lock(item.name) is not None:
            with contextlib.suppress(OSError):
                locks[item.name] = item.stat().st_mtime_ns
    return {
        "family": place.family.name,
        "key": place.key,
        "path": str(place.path),
        "entries": [
            [each.name, each.bytes, each.used_ns, each.written_ns, each.problem and each.problem.text]
            for each in entries
        ],
        "locks": locks,
    }


def _inventory(rows: list[Any]) -> Inventory:
    """Return the entries as they were recorded. Of a problem the text is kept: that there is one is what counts."""
    return Inventory(
        {
            str(name): Entry(str(name), int(size), int(used), int(written), _problem(text))
            for name, size, used, written, text in rows
        }
    )


def _problem(text: Any) -> EntryProblem | None:
    return None if text is None else EntryProblem(ProblemKind.INVALID, printable(str(text)))


def _places(document: Mapping[str, Any]) -> Iterator[tuple[FamilyDirectory, tuple[dict[str, int], Inventory]]]:
    for row in document["places"]:
        place = FamilyDirectory(FAMILY[row["family"]], str(row["key"]), Path(row["path"]))
        yield place, ({str(name): int(taken) for name, taken in row["locks"].items()}, _inventory(row["entries"]))
