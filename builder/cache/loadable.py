"""Judge whether a family's entries can be loaded from their mount, and whether ninja would build them again.

A valid entry is not enough: the loader refuses shared objects of a mount with ``noexec``, compilers' caches take lock
files even for a hit, and ninja compares the times of what it made with those of its inputs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from builder.beneath import Tree
from builder.cache.families import COMPILERS, Family
from builder.cache.ninja import Ninja
from builder.cache.toolchain import Record
from builder.text import printable

#: Names of files that ninja makes.
_MADE = (".so", ".o")


def mount_problem(family: Family, path: str) -> str:
    """Return why nothing of this family can be used at this path, or "". Never raises OSError."""
    try:
        flags = os.statvfs(path).f_flag
    except OSError:
        return ""
    if family.executes and flags & os.ST_NOEXEC:
        return f"its mount is noexec, and shared objects of {family.name} cannot be loaded; mount it with exec"
    if family.locks and flags & os.ST_RDONLY:
        return f"its mount is read-only, and {family.name} takes lock files even for a hit; mount it writable"
    return ""


def stale(
    family: Family, tree: Tree, entries: Iterable[str], newest: Mapping[str, int], *, mounted: bool, inside: bool
) -> str:
    """Return why an entry of this family would be built again, or "".

    newest: time in ns of the newest source of each package, and of each compiler's headers, by factor, as a probe found
    them; ninja compares only with those that it noted, which are among these. mounted: the times of the entries are
    those that a job finds. inside: the files that ninja noted can be seen; what it noted of no entry, newest decides.
    """
    if not family.sources:
        return ""
    ninja = Ninja(tree)
    latest, name = max(((newest[each], each) for each in family.sources if each in newest), default=(0, ""))
    for entry in entries:
        if not entry.endswith(_MADE) or not (made := ninja.time(entry)):
            continue
        if mounted and (why := _restored(ninja, entry, made)):
            return why
        try:
            if not inside:
                raise LookupError(entry)
            found = ninja.newer_input(entry)
        except LookupError:
            found = (f"{name}'s {'headers' if name in COMPILERS else 'sources'}", latest) if made < latest else None
            if found is not None:
                return f"{found[0]} ({_day(latest)}) are newer than the cached build ({_day(made)})"
            continue
        if found is not None:
            path = printable(found[0])[-200:]
            if not found[1]:
                return f"{path} is gone, which the cached build was made of"
            return f"{path} ({_day(found[1])}) is newer than the cached build ({_day(made)})"
    return ""


def unjudged(family: Family, record: Record, noted: Mapping[str, int]) -> tuple[str, ...]:
    """Return compilers with headers that ninja compares, but without times on both sides.

    noted: times of the marker. An earlier version of this program recorded none.
    """
    here = record.get("newest", {})
    return tuple(
        name
        for name in family.sources
        if name in COMPILERS and record["factors"].get(name) and not (name in here and name in noted)
    )


def _restored(ninja: Ninja, entry: str, made: int) -> str:
    """Return whether this object was copied without its time, so that ninja would build it again, or "".

    ninja builds anew what is newer than it was when ninja made it (``stored deps info out of date``).
    """
    for _, name, notes in ninja.of(entry) if entry.endswith(".o") else ():
        if name in notes.times:
            late = made > notes.times[name]
            return (
                f"{entry.rpartition('/')[2]} was copied without its time, so that ninja builds it again" if late else ""
            )
    return ""


def _day(ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return "at no time"
