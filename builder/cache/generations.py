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
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from builder import flock
from builder.beneath import Tree
from builder.cache import inventory, layout
from builder.cache.families import FAMILIES, Family, is_key
from builder.files import UnreadableError, copy_content, flush, is_dir, listing, matches, sync_directory, walk

ID = re.compile(r"[0-9a-f]{16}")
STAMP = ".committed"

_TRIES = 5
_BATCH = 4096
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
    base: Path
    size: int
    time_ns: int
    link: bool
    dated: bool

    @property
    def source(self) -> str:
        return str(self.base / self.name)

    @property
    def stamp(self) -> bool:
        """Whether it is one of DeepGEMM's stamps, which a hit touches: empty, with a time that changes."""
        return self.name.endswith(f"/{STAMP}")

    def is_like(self, status: os.stat_result) -> bool:
        """Return whether a file of this status is probably the one that was listed."""
        return status.st_size == self.size and (self.stamp or status.st_mtime_ns == self.time_ns)


def home(root: Path) -> Path:
    """Return the directory of all generations."""
    return root / "generations"


def tree(root: Path, generation: str) -> Path:
    """Return the directory of one generation."""
    return home(root) / generation


def known(root: Path) -> list[str]:
    """Return the ids of all generations, the newest last."""
    found = [item for item in listing(str(home(root))) or () if ID.fullmatch(item.name) and is_dir(item)]
    return [
        item.name for item in sorted(found, key=lambda item: (item.stat(follow_symlinks=False).st_mtime_ns, item.name))
    ]


def publish(root: Path, *, check: Callable[[], None]) -> tuple[str, list[Omitted]]:
    """Return the id of a generation that equals the root now; make it where there is none yet. Raises OSError.

    The caller holds `layout.generations_lock`. check: called from time to time, may raise.
    """
    with Tree(root) as folders:
        layout.close(folders, "generations", make=True)
    newest = next(reversed(known(root)), None)
    for attempt in range(_TRIES):
        omitted: list[Omitted] = []
        with contextlib.ExitStack() as locks:
            files = list(_wanted(root, newest, locks, omitted, check))
            generation = _digest(files)
            place = tree(root, generation)
            if not place.is_dir():
                try:
                    _build(root, place, files, newest, check)
                except _ChangedError:
                    if attempt == _TRIES - 1:
                        raise OSError(errno.EBUSY, "it is being written to all the time", str(root)) from None
                    continue
        os.utime(place)  # the newest is the one that was requested last
        return generation, omitted
    raise AssertionError("unreachable")


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was making or removing here. The caller holds `layout.generations_lock`."""
    for item in listing(str(folder)) or ():
        if item.name.startswith(".") and item.name.endswith(".tmp"):
            remove(Path(item.path), folder)


def remove(path: Path, folder: Path) -> None:
    """Delete a tree of any depth and size: never by a path longer than a few parts, never through a link.

    folder: for temporary names, on the same file system. Raises OSError.
    """
    flat = folder / f".{os.urandom(8).hex()}.tmp"
    flat.mkdir(mode=0o700)
    queue, number = [flat / "0"], 0
    path.rename(queue[0])
    while queue:
        directory = queue.pop()
        if not stat.S_ISDIR(directory.lstat().st_mode):
            directory.unlink()
            continue
        directory.chmod(0o700)
        while batch := _some(directory):
            for item in batch:
                if is_dir(item):
                    with contextlib.suppress(OSError):
                        Path(item.path).chmod(0o700)  # without it, its owner could not move it
                    number += 1
                    queue.append(flat / str(number))
                    Path(item.path).rename(queue[-1])
                else:
                    Path(item.path).unlink()
        directory.rmdir()
    flat.rmdir()


def _some(directory: Path) -> list[os.DirEntry[str]]:
    """Return a part of a directory's items; none when it is empty."""
    with os.scandir(directory) as items:
        return list(itertools.islice(items, _BATCH))


# What belongs into a generation


def _wanted(
    root: Path, newest: str | None, locks: contextlib.ExitStack, omitted: list[Omitted], check: Callable[[], None]
) -> Iterator[_File]:
    yield from _plain(root, "layout.json")
    for folder in ("images", "markers"):
        yield from (file for name in _below(root, folder) if name.endswith(".json") for file in _plain(root, name))
    for family in FAMILIES:
        for item in listing(str(root / family.name)) or ():
            if is_key(item.name.removesuffix(".json")):
                yield from _plain(root, f"{family.name}/{item.name}")
    for directory in layout.family_directories(root):
        check()
        yield from _family(root, directory.family, directory.key, newest, locks, omitted)


def _family(
    root: Path,
    family: Family,
    key: str,
    newest: str | None,
    locks: contextlib.ExitStack,
    omitted: list[Omitted],
) -> Iterator[_File]:
    base = root
    if not _locked(layout.family_lock(root, family.name, key), family.renamed, locks):
        # Another process compiles or removes here. What the newest generation has of it is whole.
        before = tree(root, newest) if newest else None
        if before is None or not (before / family.name / key).is_dir():
            omitted.append(Omitted(family.name, key, "another process works in it, and no earlier generation has it"))
            return
        base = before
    place = base / family.name / key
    for entry in sorted(inventory.scan(family, place).valid):
        for name in _below(base, f"{family.name}/{key}/{entry}"):
            file = name.rpartition("/")[2]
            if matches(file, family.transient):
                continue
            status = _status(base / name)
            if status is not None:
                stamp = file == STAMP
                yield _File(
                    name=name,
                    base=base,
                    size=status.st_size,
                    time_ns=status.st_mtime_ns,
                    link=base != root and not stamp,
                    dated=not stamp and not matches(file, family.rewritten),
                )


def _below(base: Path, name: str) -> list[str]:
    """Return the name of a file, or the names of all files below a directory."""
    status = _status(base / name)
    if status is not None:
        return [name]
    return [f"{name}/{below}" for below, item in walk(f"{base}/{name}", ()) if item is not None and not is_dir(item)]


def _plain(root: Path, name: str) -> Iterator[_File]:
    """Yield a file of this program, which always publishes by rename."""
    status = _status(root / name)
    if status is not None:
        yield _File(name, root, status.st_size, status.st_mtime_ns, link=False, dated=True)


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else."""
    try:
        status = path.lstat()
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


def _build(root: Path, place: Path, files: list[_File], newest: str | None, check: Callable[[], None]) -> None:
    before = tree(root, newest) if newest else None
    new = place.with_name(f".{place.name}.{os.urandom(8).hex()}.tmp")
    new.mkdir()
    try:
        made = {""}
        for number, file in enumerate(files):
            if number % 64 == 0:
                check()
            _directories(root, new, file.name.rpartition("/")[0], made)
            _put(file, new / file.name, before)
        _date_directories(root, new, made)
        layout.prepare(new)
        shutil.copystat(root, new)
        flush(new)
        new.rename(place)
    except BaseException:
        remove(new, place.parent)
        raise
    sync_directory(place.parent)


def _directories(root: Path, new: Path, name: str, made: set[str]) -> None:
    """Make the directories that lead to a file, with the modes and owners that they have in the root."""
    if name in made:
        return
    _directories(root, new, name.rpartition("/")[0], made)
    (new / name).mkdir()
    with contextlib.suppress(OSError):
        _like(new / name, (root / name).stat())
    made.add(name)


def _date_directories(root: Path, new: Path, made: set[str]) -> None:
    """Give directories the times that they have in the root: sglang looks at its 100 newest leaves alone."""
    for name in sorted(made - {""}, reverse=True):  # before the directory above, whose time stays
        with contextlib.suppress(OSError):
            status = (root / name).stat()
            os.utime(new / name, ns=(status.st_atime_ns, status.st_mtime_ns))


def _put(file: _File, target: Path, before: Path | None) -> None:
    earlier = _status(before / file.name) if before is not None and (file.dated or file.stamp) else None
    same = earlier is not None and file.is_like(earlier) and not _is_same(earlier, file.source)
    sources = [file.source] if file.link else []
    sources += [f"{before}/{file.name}"] if same else []
    for source in sources:
        try:
            os.link(source, target, follow_symlinks=False)
        except FileNotFoundError:
            raise _ChangedError from None
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        else:
            if not file.is_like(target.lstat()):
                raise _ChangedError
            return
    _copy(file, target)


def _is_same(status: os.stat_result, path: str) -> bool:
    """Return whether the path is another name of this file: generations of earlier versions linked to the root."""
    now = _status(Path(path))
    return now is not None and os.path.samestat(status, now)


def _copy(file: _File, target: Path) -> None:
    try:
        with Tree(file.base) as folders:
            source, _ = folders.open_regular(file.name)
    except UnreadableError as error:
        if error.refused:
            raise OSError(errno.EACCES, str(error), file.source) from None
        raise _ChangedError from None
    with os.fdopen(source, "rb"), target.open("xb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, source)
        except OSError:
            copy_content(source, writer.fileno())
        status = os.fstat(source)
    if file.dated and not file.is_like(status):
        raise _ChangedError
    _like(target, status)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _like(path: Path, status: os.stat_result) -> None:
    with contextlib.suppress(OSError):
        os.chown(path, status.st_uid, status.st_gid)
    # A directory passes its group on; a program with the rights of its owner is no kernel.
    path.chmod(stat.S_IMODE(status.st_mode) & (0o7777 if stat.S_ISDIR(status.st_mode) else 0o777))
