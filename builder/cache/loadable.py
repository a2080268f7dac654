"""Judge whether a family's entries can be loaded from their mount, and whether ninja would build them again.

A valid entry is not enough: the loader refuses shared objects of a mount with ``noexec``, compilers' caches take lock
files even for a hit, and ninja compares the times of what it made with those of its inputs.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping

from builder import files
from builder.beneath import Tree
from builder.cache.families import Family

#: Names of files that ninja makes.
_MADE = (".so", ".o")
#: ninja's record of what it made (ninja 1.13 deps_log.cc, version 4), and the bytes of it that are read.
_DEPS, _SIGNATURE, _LARGEST = ".ninja_deps", b"# ninjadeps\n\4\0\0\0", 64 << 20


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
            made = _time(tree, entry)
            if 0 < made < latest:
                return f"{package}'s sources ({_day(latest)}) are newer than the cached build ({_day(made)})"
    return ""


def restored(family: Family, tree: Tree, entries: Iterable[str]) -> str:
    """Return which object of this family was copied without its time, so that ninja would build it again, or "".

    ninja builds anew what is newer than it was when ninja made it (``stored deps info out of date``).
    """
    logs: dict[str, Mapping[str, int]] = {}
    for entry in entries if family.sources else ():
        parts = entry.split("/") if entry.endswith(".o") else []
        # ninja names it from the folder that it was started in, where its record is.
        for at in range(len(parts) - 1, -1, -1):
            folder = "/".join(parts[:at])
            if folder not in logs:
                logs[folder] = dict(_made(tree, f"{folder}/{_DEPS}" if folder else _DEPS))
            if (made := logs[folder].get("/".join(parts[at:]))) is None:
                continue
            if _time(tree, entry) > made:
                return f"{parts[-1]} was copied without its time, so that ninja builds it again"
            break
    return ""


def _time(tree: Tree, name: str) -> int:
    try:
        return tree.lstat(name).st_mtime_ns
    except (OSError, ValueError):
        return 0


def _made(tree: Tree, name: str) -> Iterator[tuple[str, int]]:
    """Yield what ninja made, by this record of it, and the time (ns) that it then had."""
    try:
        data = tree.read_bytes(name, _LARGEST)
    except (OSError, ValueError, files.UnreadableError):
        return
    if not data.startswith(_SIGNATURE):
        return
    paths, at = [], len(_SIGNATURE)
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        is_deps, size, at = size >> 31, size & 0x7FFFFFFF, at + 4
        if not is_deps:
            paths.append(data[at : max(at, at + size - 4)].rstrip(b"\0"))
        elif size >= 12 and at + 12 <= len(data):
            number, made = struct.unpack_from("<IQ", data, at)
            if number < len(paths) and made:
                yield os.fsdecode(paths[number]), made
        at += size


def _day(ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return "at no time"
