"""Puts a staged family directory into its place in a cache root, by renames alone.

What is valid there stays, and is never mixed with what was staged: an entry that is a directory, and a directory that
ninja or sglang takes as a whole, is taken whole or not at all. What is not valid there is quarantined first, unless a
process may be writing it now.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builder import files
from builder.beneath import Tree
from builder.cache import inventory, layout
from builder.cache.families import Family
from builder.files import matches
from builder.text import printable

#: ninja's file of what it builds in a directory: what lies next to it belongs together.
_NINJA = "build.ninja"
_CHUNK = 1 << 20


@dataclass
class Placed:
    """What became of a staged family directory, in entries. left: what was not placed, one sentence each."""

    added: int = 0
    kept: int = 0
    quarantined: int = 0
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sides:
    """Both sides of one family directory. times: exact times of what was staged, in ns."""

    root: Path
    family: Family
    key: str
    mount: str
    staged: Tree
    target: Tree
    times: Mapping[str, int]


def place(root: Path, staged: Tree, family: Family, key: str, times: Mapping[str, int], *, mount: str) -> Placed:
    """Move what is staged into the family's directory, which exists. Raises OSError.

    mount: the root as its users see it.
    """
    with staged, Tree(root, f"{family.name}/{key}") as target:
        _date(staged, times)
        sides, placed, stack = _Sides(root, family, key, mount, staged, target, times), Placed(), [""]
        while stack:
            for item in staged.listing(stack.pop()) or ():
                inside = item.is_dir and target.is_dir(item.name)
                if inside and not _is_unit(family, staged, item.name):
                    stack.append(item.name)
                else:
                    _put(sides, placed, item.name, is_dir=item.is_dir)
    return placed


def _date(staged: Tree, times: Mapping[str, int]) -> None:
    """Give everything its exact time: directories after what is in them."""
    for name in sorted(times, reverse=True):
        staged.set_time(name, times[name])


def _is_unit(family: Family, tree: Tree, name: str) -> bool:
    """Return whether a directory is taken whole or not at all."""
    depth = name.count("/")
    if family.layout != "files":
        return depth == (1 if family.layout == "deep_gemm" else 0)
    ninja = bool(family.sources) and tree.exists(f"{name}/{_NINJA}")
    return ninja or matches(name.rpartition("/")[2], family.whole)


def _put(sides: _Sides, placed: Placed, name: str, *, is_dir: bool) -> None:
    """Move one file or directory, unless what is there may stay."""
    family, target = sides.family, sides.target
    entries = _entries(sides, name, is_dir)
    for _ in range(2):
        if not target.exists(name):
            try:
                sides.staged.move(name, target, name)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
                    raise
                continue  # a job was faster: what it made is looked at
            if name in sides.times:
                target.set_time(name, sides.times[name])
            placed.added += entries
            return
        problem = _problem(sides, name, is_dir)
        if problem is None:
            _agree(sides, name)
            placed.kept += entries
            return
        if problem:
            placed.left.append(f"{family.name}/{sides.key}/{printable(name)[:200]} stays as it is: {problem}")
            return
        inventory.set_aside(family, target, name, layout.quarantine(sides.root, family.name, sides.key))
        placed.quarantined += 1
    placed.left.append(f"{family.name}/{sides.key}/{printable(name)[:200]} is being written to by another process")


def _entries(sides: _Sides, name: str, is_dir: bool) -> int:
    if sides.family.layout != "files":
        return 1 if _is_unit(sides.family, sides.staged, name) else len(sides.staged.listing(name) or ())
    if not is_dir:
        return 1
    return sum(item is not None and item.is_file for _, item in sides.staged.walk(name))


def _problem(sides: _Sides, name: str, is_dir: bool) -> str | None:
    """Return None where what is in the target may stay, "" where it has to go, else why neither."""
    family, target = sides.family, sides.target
    if target.is_dir(name) != is_dir:
        return ""
    if family.layout != "files" and is_dir:
        problem = inventory.check(family, target, name, mount=sides.mount)
        return None if problem is None else ""
    names = list(_files(sides.staged, name)) if is_dir else [name]
    found = {each: inventory.check(family, target, each, mount=sides.mount) for each in names}
    bad = {each: problem for each, problem in found.items() if problem is not None}
    if not bad:
        return None
    if is_dir and matches(name.rpartition("/")[2], family.whole):
        return ""
    present = {each: problem for each, problem in bad.items() if target.exists(each)}
    if not present:
        return f"it lacks {printable(min(bad))[:200]}, and is not mixed with what another machine built"
    now = time.time()
    if any(inventory.may_be_in_progress(family, target, each, found, now=now) for each, found in present.items()):
        return "another process may be writing it now"
    return ""


def _files(tree: Tree, name: str) -> Iterator[str]:
    return (each for each, item in tree.walk(name) if item is not None and item.is_file)


def _agree(sides: _Sides, name: str) -> None:
    """Give a file that is on both sides, byte by byte, the older time: ninja builds what is older than its sources."""
    staged = sides.times.get(name)
    if staged is None or not sides.family.sources or sides.staged.is_dir(name):
        return
    if sides.target.lstat(name).st_mtime_ns > staged and _is_equal(sides, name):
        sides.target.set_time(name, staged)


def _is_equal(sides: _Sides, name: str) -> bool:
    try:
        mine, _ = sides.target.open_regular(name)
    except files.UnreadableError:
        return False
    with os.fdopen(mine, "rb") as ours, os.fdopen(sides.staged.open_regular(name)[0], "rb") as theirs:
        while data := ours.read(_CHUNK):
            if data != theirs.read(_CHUNK):
                return False
        return not theirs.read(1)
