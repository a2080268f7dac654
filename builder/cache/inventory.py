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
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from builder.cache.entries import NAMES, EntryProblem, ProblemKind, problem_of, size_and_times
from builder.cache.families import Family
from builder.cache.layout import FamilyDirectory, family_directories
from builder.files import UNREADABLE, is_dir, listing, matches, walk, why
from builder.text import printable

#: Seconds without a write after which a file is no longer in progress.
IN_PROGRESS = 600.0


#: One component of a path that leads nowhere else.
_PART = r"(?!\.{1,2}(?:/|\Z))[^/\0]+"
#: Names that an entry can have, by layout.
_NAME = {
    "deep_gemm": re.compile(f"cache/{_PART}"),
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


def scan(family: Family, directory: Path, *, mount: str | None = None) -> Inventory:
    """Return every entry in the family's directory; none where there is no such directory.

    mount: the cache root as its users see it. Where it is not given, an absolute path within an entry counts as right
    when it ends in this family, key and entry.
    """
    base = str(directory)
    entries = {}
    for name in NAMES[family.layout](family, base):
        size, used_ns, written_ns = size_and_times(family, base, name)
        problem = problem_of(family, base, name, mount)
        if problem is None or problem.kind is not ProblemKind.MISSING:  # removed between listing and reading
            entries[name] = Entry(name, size, used_ns, written_ns, problem)
    return Inventory(entries)


def check(family: Family, directory: Path, name: str, *, mount: str | None = None) -> EntryProblem | None:
    """Return the problem of one named entry, or None when it is valid.

    Costs a few system calls and no more than headers and tables of ELF files: a marker lists hundreds of entries.
    """
    if not _NAME[family.layout].fullmatch(name):
        return EntryProblem(ProblemKind.INVALID, "not a name of an entry")
    return problem_of(family, str(directory), name, mount)


def weigh(family: Family, directory: Path, name: str) -> int:
    """Return the bytes of one entry's files; 0 where there is none."""
    return size_and_times(family, str(directory), name)[0]


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


def sweep(
    family: Family, directory: Path, quarantine: Path, *, now: float, older_than: float, mount: str | None = None
) -> list[tuple[str, str]]:
    """Rename leftovers and invalid entries into `quarantine`, so that they are compiled anew. Deletes nothing.

    What may be a build in progress (leftovers, files written in place) is moved only when it was not written to, at any
    depth, for `older_than` seconds before `now` (seconds since the epoch, as file times are). An entry that its program
    publishes by one rename was never visible half-made: invalid, it is damaged, and is moved at once; its age has no
    meaning, because hits touch it. Each move is one rename within a file system: readers see the whole or nothing.
    Returns (path from the family's directory, why, with the error of a failed move). mount: as in `scan`.
    """
    if not family.claimable:
        return []
    base = str(directory)
    doomed = {name: (reason, True) for name, reason in _leftovers(family, base)}
    for name, problem in scan(family, directory, mount=mount).invalid.items():
        if problem.kind is ProblemKind.UNREADABLE:
            continue  # another user's file may be good
        whole = _whole(family, name)
        reason = problem.text if whole == name else f"{printable(name[len(whole) + 1 :])}: {problem}"
        doomed.setdefault(whole, (reason, whole == name and _may_be_in_progress(family, problem)))
    moved = []
    for name, (reason, by_age) in sorted(doomed.items()):
        newest = _newest(f"{base}/{name}") if by_age else now - older_than
        if newest is None or newest > now - older_than:
            continue
        try:
            quarantine.mkdir(parents=True, exist_ok=True)
            # A new name each time: renaming onto an existing one would delete it.
            tag = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
            (directory / name).rename(quarantine / f"{family.name}-{directory.name}-{tag}-{os.urandom(16).hex()}")
        except FileNotFoundError:
            continue
        except OSError as error:
            moved.append((name, f"{reason} (not moved: {why(error)})"))
        else:
            moved.append((name, reason))
    return moved


def may_be_in_progress(family: Family, directory: Path, name: str, problem: EntryProblem, *, now: float) -> bool:
    """Return whether this invalid entry may be in progress, so that `sweep` leaves it for now."""
    unreadable = problem.kind is ProblemKind.UNREADABLE
    if unreadable or _whole(family, name) != name or not _may_be_in_progress(family, problem):
        return False
    newest = _newest(f"{directory}/{name}")
    return newest is None or newest > now - IN_PROGRESS


def remove_host_specific(family: Family, directory: Path) -> list[str]:
    """Delete the files that are true on this host alone, which no other host may read; return their names."""
    removed = []
    for item in listing(str(directory)) or ():
        if matches(item.name, family.host_specific) and not item.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                (directory / item.name).unlink()
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
        found = scan(directory.family, directory.path)
        yield Content(*directory.name, len(found.valid), len(found.invalid), found.bytes)


def bad_entries(directory: FamilyDirectory, *, now: float) -> tuple[int, dict[str, str]]:
    """Return the number of entries, and the problem of each that is not valid. now: seconds since the epoch."""
    family, path = directory.family, directory.path
    found = scan(family, path, mount=directory.mount())
    bad = {name: problem.text for name, problem in found.invalid.items()}
    for name, problem in found.invalid.items():
        if may_be_in_progress(family, path, name, problem, now=now):
            bad[name] = f"{problem} (it was written to just now, and may be in progress)"
    for name in (".", "cache") if family.layout == "deep_gemm" else (".",):
        if listing(str(path / name)) is None:
            bad[name] = f"{UNREADABLE}: a directory that cannot be listed"
    return len(found.entries), bad


# What a killed process leaves


def _leftovers(family: Family, base: str) -> Iterator[tuple[str, str]]:
    anywhere = []
    for pattern, reason in family.leftovers:
        if "/" in pattern:
            yield from ((name, reason) for name in _glob(base, "", pattern.split("/")))
        else:
            anywhere.append((pattern, reason))
    if anywhere:
        for name, item in walk(base, ()):
            for pattern, reason in anywhere if item and name.partition("/")[0] not in family.apart else ():
                if fnmatchcase(name.rpartition("/")[2], pattern):
                    yield name, reason


def _glob(base: str, above: str, patterns: list[str]) -> Iterator[str]:
    for item in listing(f"{base}/{above}") or ():
        if fnmatchcase(item.name, patterns[0]):
            name = f"{above}/{item.name}" if above else item.name
            if len(patterns) == 1:
                yield name
            elif is_dir(item):
                yield from _glob(base, name, patterns[1:])


def _whole(family: Family, name: str) -> str:
    """Return the directory that must move as a whole with this entry, or the entry itself."""
    parts = name.split("/")
    for depth, part in enumerate(parts, 1):
        if matches(part, family.whole):
            return "/".join(parts[:depth])
    return name


def _may_be_in_progress(family: Family, problem: EntryProblem) -> bool:
    """Return whether an invalid entry of this family can be in progress."""
    return {"deep_gemm": False, "triton": problem.kind is ProblemKind.UNFINISHED, "files": True}[family.layout]


def _newest(path: str) -> float | None:
    """Return the latest mtime of a file or of anything in a directory; None where it is unknown."""
    try:
        status = os.lstat(path)
        newest = status.st_mtime
        if stat.S_ISDIR(status.st_mode):
            if listing(path) is None:
                return None
            for _, item in walk(path, ()):
                if item is None:
                    return None
                newest = max(newest, item.stat(follow_symlinks=False).st_mtime)
    except OSError:
        return None
    return newest
