"""Generations: immutable, complete copies of a cache root at one moment, as lower layers of views.

``<root>/generations/<id>/`` has the layout of the root: every valid entry of every family, family records, memos and
markers. It is built under a temporary name and published by one rename. The id is a digest of names, sizes and times of
its files, so that an unchanged root has one generation, however many views are made.

A generation shares no file with the root, where a job may write: what it holds is a copy, made once; the next
generation links to this copy. Where the file system can (XFS, Btrfs), a copy shares its blocks and costs nothing. A
file that may be written in place is not read while a process compiles into its family: the state in the newest
generation is used again, or the family is omitted and reported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from builder import flock
from builder.beneath import Tree
from builder.cache import inventory, layout
from builder.cache.families import FAMILIES, Family, is_key
from builder.files import UnreadableError, copy_content, flush, matches
from builder.openat import split

FOLDER = "generations"
ID = re.compile(r"[0-9a-f]{16}")
STAMP = ".committed"

_TRIES = 5
_CREATED = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Part of every id: raise it when what a generation holds changes, so that no old one is used again.
_VERSION = 2
#: ioctl of Linux: make one file share the blocks of another (linux/fs.h).
_FICLONE = 0x40049409
#: A link that cannot be made, where a copy can.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


class _ChangedError(Exception):
    """A file was moved or written while it was read."""


@dataclass(frozen=True)
class Omitted:
    """A family directory that is not in the generation, and why."""

    family: str
    key: str
    why: str


@dataclass(frozen=True)
class _File:
    """One file of a generation.

    name: below base, the root or an earlier generation. link: it is of an earlier one. dated: a new time is a sign of
    new content.
    """

    name: str
    base: Tree
    size: int
    time_ns: int
    link: bool
    dated: bool

    @property
    def source(self) -> str:
        return str(self.base.path / self.name)

    @property
    def stamp(self) -> bool:
        """Whether it is one of DeepGEMM's stamps, which a hit touches: empty, with a time that changes."""
        return self.name.endswith(f"/{STAMP}")

    def is_like(self, status: os.stat_result) -> bool:
        """Return whether a file of this status is probably the one that was listed."""
        return status.st_size == self.size and (self.stamp or status.st_mtime_ns == self.time_ns)


def home(root: Path) -> Path:
    """Return the directory of all generations."""
    return root / FOLDER


def tree(root: Path, generation: str) -> Path:
    """Return the directory of one generation."""
    return home(root) / generation


def known(root: Path) -> list[str]:
    """Return the ids of all generations, the newest last."""
    with Tree(root, FOLDER) as tree:
        found = [item for item in tree.listing() or () if ID.fullmatch(item.name) and item.is_dir]
        return [item.name for item in sorted(found, key=lambda item: (item.stat().st_mtime_ns, item.name))]


def publish(root: Path, *, check: Callable[[], None]) -> tuple[str, list[Omitted]]:
    """Return the id of a generation that equals the root now; make it where there is none yet. Raises OSError.

    The caller holds `layout.generations_lock`. check: called from time to time, may raise.
    """
    with Tree(root) as folders, Tree(root) as base, contextlib.ExitStack() as stack:
        layout.close(folders, FOLDER, make=True)
        newest = next(reversed(known(root)), None)
        before = stack.enter_context(Tree(root, f"{FOLDER}/{newest}")) if newest else None
        for attempt in range(_TRIES):
            omitted: list[Omitted] = []
            with contextlib.ExitStack() as locks:
                files = list(_wanted(root, base, before, locks, omitted, check))
                generation = _digest(files)
                if not folders.is_dir(f"{FOLDER}/{generation}"):
                    try:
                        _build(root, generation, files, before, check)
                    except _ChangedError:
                        if attempt == _TRIES - 1:
                            raise OSError(errno.EBUSY, "it is being written to all the time", str(root)) from None
                        continue
            # The newest is the one that was requested last.
            os.utime(generation, dir_fd=folders.descriptor(FOLDER), follow_symlinks=False)
            return generation, omitted
    raise AssertionError("unreachable")


def remove(root: Path, generation: str) -> None:
    """Delete one generation. Raises OSError."""
    with Tree(root, FOLDER) as tree:
        tree.remove(generation)


def remove_unfinished(root: Path, folder: str) -> None:
    """Remove what a killed process was making or removing in a folder. The caller holds `layout.generations_lock`."""
    with Tree(root, folder) as tree:
        for item in tree.listing() or ():
            if item.name.startswith(".") and item.name.endswith(".tmp"):
                tree.remove(item.name)


# What belongs into a generation


def _wanted(
    root: Path,
    base: Tree,
    before: Tree | None,
    locks: contextlib.ExitStack,
    omitted: list[Omitted],
    check: Callable[[], None],
) -> Iterator[_File]:
    yield from _plain(base, "layout.json")
    for folder in ("images", "markers"):
        yield from (file for name in _below(base, folder) if name.endswith(".json") for file in _plain(base, name))
    for family in FAMILIES:
        for item in base.listing(family.name) or ():
            if is_key(item.last.removesuffix(".json")):
                yield from _plain(base, item.name)
    for directory in layout.family_directories(root):
        check()
        yield from _family(root, base, directory.family, directory.key, before, locks, omitted)


def _family(
    root: Path,
    base: Tree,
    family: Family,
    key: str,
    before: Tree | None,
    locks: contextlib.ExitStack,
    omitted: list[Omitted],
) -> Iterator[_File]:
    own, name = True, f"{family.name}/{key}"
    if not _locked(layout.family_lock(root, family.name, key), family.renamed, locks):
        # Another process compiles or removes here. What the newest generation has of it is whole.
        if before is None or not before.is_dir(name):
            omitted.append(Omitted(family.name, key, "another process works in it, and no earlier generation has it"))
            return
        own, base = False, before
    for entry in sorted(inventory.scan(family, base.below(name)).valid):
        for path in _below(base, f"{name}/{entry}"):
            file = path.rpartition("/")[2]
            if matches(file, family.transient):
                continue
            status = _status(base, path)
            if status is not None:
                stamp = file == STAMP
                yield _File(
                    name=path,
                    base=base,
                    size=status.st_size,
                    time_ns=status.st_mtime_ns,
                    link=not own and not stamp,
                    dated=not stamp and not matches(file, family.rewritten),
                )


def _below(base: Tree, name: str) -> list[str]:
    """Return the name of a file, or the names of all files below a directory."""
    if _status(base, name) is not None:
        return [name]
    return [below for below, item in base.walk(name) if item is not None and not item.is_dir]


def _plain(base: Tree, name: str) -> Iterator[_File]:
    """Yield a file of this program, which always publishes by rename."""
    status = _status(base, name)
    if status is not None:
        yield _File(name, base, status.st_size, status.st_mtime_ns, link=False, dated=True)


def _status(base: Tree, name: str) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else."""
    try:
        status = base.lstat(name)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _locked(path: Path, shared: bool, locks: contextlib.ExitStack) -> bool:
    """Try the family's lock: shared keeps removers away, exclusive compilers as well."""
    descriptor = flock.open_lock(path, create=True, root=path.parent.parent)
    locks.callback(os.close, descriptor)
    return flock.try_lock(descriptor, shared=shared)


def _digest(files: list[_File]) -> str:
    total = hashlib.sha256(f"{_VERSION}\n".encode())
    for file in sorted(files, key=lambda file: file.name):
        state = f"{file.size} {file.time_ns}" if file.dated else "-"
        total.update(f"{file.name}\0{state}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()[:16]


# Building one


def _build(root: Path, generation: str, files: list[_File], before: Tree | None, check: Callable[[], None]) -> None:
    name = f".{generation}.{os.urandom(8).hex()}.tmp"
    with Tree(root, FOLDER) as home, Tree(root) as base, Tree(root, f"{FOLDER}/{name}") as new:
        home.make_folder(name)
        try:
            made = {""}
            for number, file in enumerate(files):
                if number % 64 == 0:
                    check()
                _directories(base, new, file.name.rpartition("/")[0], made)
                _put(file, new, before)
            _date_directories(base, new, made)
            layout.prepare(new.path)
            new.copy_mode("", root.stat())
            flush(new.path)
            home.move(name, home, generation)
        except BaseException:
            home.remove(name)
            raise
        home.sync("")


def _directories(base: Tree, new: Tree, name: str, made: set[str]) -> None:
    """Make the directories that lead to a file, with the modes and owners that they have in the root."""
    if name in made:
        return
    _directories(base, new, name.rpartition("/")[0], made)
    new.make_folder(name)
    with contextlib.suppress(OSError):
        new.copy_mode(name, base.lstat(name))
    made.add(name)


def _date_directories(base: Tree, new: Tree, made: set[str]) -> None:
    """Give directories the times that they have in the root: sglang looks at its 100 newest leaves alone."""
    for name in sorted(made - {""}, reverse=True):  # before the directory above, whose time stays
        with contextlib.suppress(OSError):
            status = base.lstat(name)
            above, last = split(name)
            times = status.st_atime_ns, status.st_mtime_ns
            os.utime(last, ns=times, dir_fd=new.descriptor(above), follow_symlinks=False)


def _put(file: _File, new: Tree, before: Tree | None) -> None:
    earlier = _status(before, file.name) if before is not None and (file.dated or file.stamp) else None
    same = earlier is not None and file.is_like(earlier) and not _is_same(earlier, file)
    sources = [file.base] if file.link else []
    sources += [before] if before is not None and same else []
    above, last = split(file.name)
    for source in sources:
        try:
            folders = source.descriptor(above), new.descriptor(above)
            os.link(last, last, src_dir_fd=folders[0], dst_dir_fd=folders[1], follow_symlinks=False)
        except FileNotFoundError:
            raise _ChangedError from None
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        else:
            if not file.is_like(new.lstat(file.name)):
                raise _ChangedError
            return
    _copy(file, new)


def _is_same(status: os.stat_result, file: _File) -> bool:
    """Return whether the file is another name of this one: generations of earlier versions linked to the root."""
    now = _status(file.base, file.name)
    return now is not None and os.path.samestat(status, now)


def _copy(file: _File, new: Tree) -> None:
    try:
        source, _ = file.base.open_regular(file.name)
    except UnreadableError as error:
        if error.refused:
            raise OSError(errno.EACCES, str(error), file.source) from None
        raise _ChangedError from None
    above, last = split(file.name)
    with os.fdopen(source, "rb"), os.fdopen(os.open(last, _CREATED, dir_fd=new.descriptor(above)), "wb") as writer:
        target = writer.fileno()
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError:
            copy_content(source, target)
        status = os.fstat(source)
        if file.dated and not file.is_like(status):
            raise _ChangedError
        with contextlib.suppress(OSError):
            os.fchown(target, status.st_uid, status.st_gid)
        os.fchmod(target, stat.S_IMODE(status.st_mode) & 0o777)  # a program with the rights of its owner is no kernel
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
