"""Entries of family directories: list and check them, compare two inventories, quarantine leftovers.

An entry is valid when it is self-consistent: its files are all there, its JSON parses and its ELF files are as long as
their own tables say. It is never compared with a recorded size or digest, because recompiles are not byte-identical.

A cache root is written by programs that know nothing of this one, and may hold anything. Nothing found there raises:
symlinks are not followed, FIFOs are not waited for, and what cannot be read is an entry with a problem. Names keep
their undecodable bytes as Python's surrogate escapes; problems are always printable.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from builder.beneath import Tree
from builder.cache import families, leaves, usage
from builder.cache.entries import NAMES, NO_ENTRY, EntryProblem, ProblemKind, problem_of, size_and_times
from builder.cache.families import Family
from builder.cache.layout import FamilyDirectory, family_directories
from builder.files import UNREADABLE, matches, why
from builder.text import printable

#: Seconds without a write after which a file is no longer in progress.
IN_PROGRESS = 600.0


#: Names of temporary files, as compilers and this program make them.
TEMPORARY = ("*.tmp", "*.tmp-*", ".tmp*", ".*.tmp*", "tmp.*")

#: One component of a path that leads nowhere else.
_PART = r"(?!\.{1,2}(?:/|\Z))[^/\0]+"
#: Names that an entry can have, by layout.
_NAME = {
    "deep_gemm": re.compile(f"cache(?:/{_PART})?"),  # the folder itself where it is a link
    "triton": re.compile(_PART),
    "files": re.compile(f"{_PART}(?:/{_PART})*"),
}


@dataclass(frozen=True)
class Entry:
    """One compile result.

    name: posix, from the family's directory. bytes: of all its files. used_ns: mtime of the stamp that a hit touches, 0
    where the family has none. written_ns: newest mtime of its other files, 0 where a use changes it too. problem: why
    it is not valid.
    """

    name: str
    bytes: int
    used_ns: int
    written_ns: int
    problem: EntryProblem | None


@dataclass(frozen=True)
class Inventory:
    """What a family's directory held at one moment."""

    entries: Mapping[str, Entry]

    @functools.cached_property
    def valid(self) -> frozenset[str]:
        """Names of the entries without a problem."""
        return frozenset(name for name, entry in self.entries.items() if entry.problem is None)

    @functools.cached_property
    def invalid(self) -> dict[str, EntryProblem]:
        """The problem of each entry that has one."""
        return {name: entry.problem for name, entry in self.entries.items() if entry.problem is not None}

    @property
    def bytes(self) -> int:
        """Size of all entries, valid or not."""
        return sum(entry.bytes for entry in self.entries.values())


def scan(family: Family, directory: Path | Tree, *, mount: str | None = None) -> Inventory:
    """Return every entry in the family's directory; none where there is no such directory.

    mount: the cache root as its users see it. Where it is not given, an absolute path within an entry counts as right
    when it ends in this family, key and entry. directory: a path is trusted, with every directory above it.
    """
    tree = Tree.of(directory)
    entries = {}
    for name in NAMES[family.layout](family, tree):
        size, used_ns, written_ns = size_and_times(family, tree, name)
        problem = problem_of(family, tree, name, mount)
        if problem is None or problem.kind is not ProblemKind.MISSING:  # removed between listing and reading
            entries[name] = Entry(name, size, used_ns, written_ns, problem)
    return Inventory(entries)


def check(family: Family, directory: Path | Tree, name: str, *, mount: str | None = None) -> EntryProblem | None:
    """Return the problem of one named entry, or None when it is valid.

    Costs a few system calls and no more than headers and tables of ELF files: a marker lists hundreds of entries.
    """
    if not _NAME[family.layout].fullmatch(name):
        return NO_ENTRY
    return problem_of(family, Tree.of(directory), name, mount)


def weigh(family: Family, directory: Path | Tree, name: str) -> int:
    """Return the bytes of one entry's files; 0 where there is none."""
    return size_and_times(family, Tree.of(directory), name)[0]


def added(before: Inventory, after: Inventory) -> set[str]:
    """Return the names of entries that are valid now and were not before."""
    return set(after.valid - before.valid)


def used(before: Inventory, after: Inventory) -> set[str]:
    """Return the names of valid entries that are new or have a changed stamp.

    Families without stamps return every valid entry.
    """
    return {
        name
        for name in after.valid
        if name not in before.valid
        or after.entries[name].used_ns == 0
        or after.entries[name].used_ns != before.entries[name].used_ns
    }


def recompiled(before: Inventory, after: Inventory) -> set[str]:
    """Return the names of entries that are valid at both times and were written in between.

    Builders that work in place, and caches that never hit, make no new name.
    """
    return {
        name
        for name in before.valid & after.valid
        if before.entries[name].written_ns
        and after.entries[name].written_ns not in (0, before.entries[name].written_ns)
    }


class Leftover(NamedTuple):
    """Something unsafe in a family's directory. name: from there. stays: why it was not moved; "" where it was."""

    name: str
    why: str
    stays: str = ""


def sweep(
    family: Family,
    directory: Path | Tree,
    quarantine: Path | Tree,
    *,
    now: float,
    older_than: float,
    job_max: float | None = None,
    mount: str | None = None,
) -> list[Leftover]:
    """Rename leftovers and invalid entries into `quarantine`, so that they are compiled anew. Deletes nothing.

    What may be a build in progress (leftovers, files written in place) is moved only when it was not written to, at any
    depth, for `older_than` seconds before `now` (seconds since the epoch, as file times are). An entry that its program
    publishes by one rename was never visible half-made: invalid, it is damaged, and is moved at once; its age has no
    meaning, because hits touch it. Each move is one rename within a file system: readers see the whole or nothing.
    Returns what was moved, and what could not be. mount: as in `scan`. job_max: seconds that a job may last: after
    them a temporary file is a leftover in every family, also where nothing is known of how its program makes it.
    """
    if not family.claimable:
        return []
    tree, aside = Tree.of(directory), Tree.of(quarantine)
    seen = tree.read_once()
    doomed: dict[str, tuple[str, float | None]] = {}
    for name, reason, known in _leftovers(family, seen, temporary=job_max is not None):
        doomed.setdefault(name, (reason, older_than if known else job_max))
    for name, problem in scan(family, seen, mount=mount).invalid.items():
        if problem.kind is ProblemKind.UNREADABLE:
            continue  # another user's file may be good
        whole = families.whole(family, name)
        reason = problem.text if whole == name else f"{printable(name[len(whole) + 1 :])}: {problem}"
        in_progress = whole == name and _may_be_in_progress(family, problem)
        doomed.setdefault(whole, (reason, older_than if in_progress else None))
    moved = []
    for name, (reason, least) in sorted(doomed.items()):
        if least is not None and ((newest := usage.newest(tree, name)) is None or newest > now - least):
            continue
        try:
            set_aside(family, tree, name, aside)
        except FileNotFoundError:
            continue
        except OSError as error:
            moved.append(Leftover(name, reason, f"it cannot be moved: {why(error)}"))
        else:
            moved.append(Leftover(name, reason))
    return moved


def set_aside(family: Family, tree: Tree, name: str, quarantine: Tree) -> None:
    """Rename something of a family directory into its quarantine. Raises OSError."""
    quarantine.make()
    # A new name each time: renaming onto an existing one would delete it.
    tag = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    tree.move(name, quarantine, f"{family.name}-{tree.path.name}-{tag}-{os.urandom(16).hex()}")


def may_be_in_progress(family: Family, directory: Path | Tree, name: str, problem: EntryProblem, *, now: float) -> bool:
    """Return whether this invalid entry may be in progress, so that `sweep` leaves it for now."""
    unreadable = problem.kind is ProblemKind.UNREADABLE
    if unreadable or families.whole(family, name) != name or not _may_be_in_progress(family, problem):
        return False
    newest = usage.newest(Tree.of(directory), name)
    return newest is None or newest > now - IN_PROGRESS


def remove_host_specific(family: Family, directory: Path | Tree) -> list[str]:
    """Delete the files that are true on this host alone, which no other host may read; return their names."""
    removed = []
    tree = Tree.of(directory)
    for item in tree.listing() or ():
        if matches(item.name, family.host_specific) and not item.is_dir:
            with contextlib.suppress(OSError):
                tree.unlink(item.name)
                removed.append(item.name)
    return sorted(removed)


# Every family directory of a root


@dataclass(frozen=True)
class Content:
    """How much one family directory holds. bytes: of its entries' files."""

    family: str
    key: str
    entries: int
    invalid: int
    bytes: int


def contents(root: Path) -> Iterator[Content]:
    """Yield how much each family directory holds."""
    for directory in family_directories(root):
        found = scan(directory.family, directory.tree())
        yield Content(*directory.name, len(found.valid), len(found.invalid), found.bytes)


def bad_entries(directory: FamilyDirectory, *, now: float) -> tuple[int, dict[str, str]]:
    """Return the number of entries, and the problem of each that is not valid. now: seconds since the epoch."""
    family, tree = directory.family, directory.tree()
    found = scan(family, tree, mount=directory.mount())
    bad = {name: problem.text for name, problem in found.invalid.items()}
    for name, problem in found.invalid.items():
        if may_be_in_progress(family, tree, name, problem, now=now):
            bad[name] = f"{problem} (it was written to just now, and may be in progress)"
    for name in ("", "cache") if family.layout == "deep_gemm" else ("",):
        if tree.listing(name) is None and name not in bad:
            bad[name or "."] = f"{UNREADABLE}: a directory that cannot be listed"
    return len(found.entries), bad


# What a killed process leaves


def _leftovers(family: Family, tree: Tree, *, temporary: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield names, why each is a leftover, and whether its program is known to leave it.

    temporary: also files that are temporary by their names alone.
    """
    anywhere = []
    for pattern, reason in family.leftovers:
        if "/" in pattern:
            yield from ((name, reason, True) for name in _glob(tree, "", pattern.split("/")))
        else:
            anywhere.append((pattern, reason))
    for name in leaves.beyond(family, tree):
        yield (
            name,
            f"never looked at: its module has {family.looked_at} newer builds",
            True,
        )
    for name, item in tree.walk() if anywhere or temporary else ():
        if item is None or name.partition("/")[0] in family.apart:
            continue
        yield from ((name, reason, True) for pattern, reason in anywhere if fnmatchcase(item.last, pattern))
        if temporary and item.is_file and matches(item.last, TEMPORARY):
            yield name, "temporary file that no job can still be writing", False


def _glob(tree: Tree, above: str, patterns: list[str]) -> Iterator[str]:
    for item in tree.listing(above) or ():
        if fnmatchcase(item.last, patterns[0]):
            if len(patterns) == 1:
                yield item.name
            elif item.is_dir:
                yield from _glob(tree, item.name, patterns[1:])


def _may_be_in_progress(family: Family, problem: EntryProblem) -> bool:
    """Return whether an invalid entry of this family can be in progress."""
    return {"deep_gemm": False, "triton": problem.kind is ProblemKind.UNFINISHED, "files": True}[family.layout]
