"""Judge whether a family's entries can be loaded from their mount, and whether ninja would build them again.

A valid entry is not enough: the loader refuses shared objects of a mount with ``noexec``, compilers' caches take lock
files even for a hit, and ninja compares the times of what it made with those of its inputs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from builder.beneath import Tree
from builder.cache.families import Family

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


def stale(family: Family, tree: Tree, entries: Iterable[str], newest: Mapping[str, int]) -> str:
    """Return why an entry of this family would be built again, or "".

    newest: time in ns of the newest source of each package, by factor, as a probe found them; ninja compares only with
    those that it noted, which are among these.
    """
    sources = [(newest[name], name) for name in family.sources if name in newest]
    if not sources:
        return ""
    latest, package = max(sources)
    for entry in entries:
        if entry.endswith(_MADE):
            try:
                made = tree.lstat(entry).st_mtime_ns
            except (OSError, ValueError):
                continue
            if made < latest:
                return f"{package}'s sources ({_day(latest)}) are newer than the cached build ({_day(made)})"
    return ""


def _day(ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return "at no time"
