"""Files below a directory that any user of the machine may have written to, reached one component at a time.

A user that can write below a root can put a link, a device or a FIFO wherever a program expects a directory or a file,
also between two of its system calls. So nothing here resolves a path: each component is opened relative to the
directory before it (openat), and none of them may be a link. A file is opened for reading once it is known as regular.

The root itself is trusted and may be a link. Names below it are relative, with slashes; ``""`` is the root.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builder import files
from builder.files import matches
from builder.openat import (
    LISTED,
    is_absent,
    open_at,
    open_folder,
    open_regular_at,
    plain,
    readable,
    rename,
    some_names,
    split,
    unlock,
)

#: Levels of directories below a root. Caches have less than twenty; each level costs a descriptor.
DEPTH = 128
#: Names of one directory that are read where a caller sets no limit.
NAMES = 1_000_000
#: Names that a `ReadOnceTree` keeps, about 300 bytes each; directories beyond them are listed again.
REMEMBERED = 1_000_000

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: No name of a directory.
_NOWHERE = "\0"


class TreeItem:
    """One name in a directory. name: from the tree's root. is_dir, is_file: of itself, not of what a link leads to."""

    __slots__ = ("_tree", "is_dir", "is_file", "last", "name")

    def __init__(self, tree: Tree, above: str, entry: os.DirEntry[str]) -> None:
        self._tree = tree
        self.last = entry.name
        self.name = f"{above}/{entry.name}" if above else entry.name
        self.is_dir = entry.is_dir(follow_symlinks=False)
        self.is_file = entry.is_file(follow_symlinks=False)

    def stat(self) -> os.stat_result:
        """Return the status of the file itself. Raises OSError."""
        return self._tree.lstat(self.name)


class Tree:
    """A directory and all below it. For one thread, and for one piece of work: it keeps the last directory open.

    root: trusted. below: of the directory, from the root: as little trusted as what is in it. Neither has to exist.
    """

    def __init__(self, root: str | os.PathLike[str], below: str = "") -> None:
        self._root = os.fspath(root)
        self._below = below
        self._parts: list[str] = []
        self._fds: list[int] = []
        self._current = _NOWHERE

    @classmethod
    def of(cls, place: str | Path | Tree) -> Tree:
        """Return the tree itself, or a new one of a trusted directory."""
        return place if isinstance(place, Tree) else cls(place)

    def below(self, name: str) -> Tree:
        """Return the tree of a directory in this one."""
        return Tree(self._root, f"{self._below}/{name}".strip("/"))

    def read_once(self) -> ReadOnceTree:
        """Return the same directory, for one look at all of it."""
        return ReadOnceTree(self._root, self._below)

    @property
    def path(self) -> Path:
        """For messages, and to hand on what is trusted; opening it follows links."""
        return Path(self._root, self._below)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open. The next use opens it again."""
        while self._fds:
            os.close(self._fds.pop())
        self._parts, self._current = [], _NOWHERE

    # Reading

    def lstat(self, name: str) -> os.stat_result:
        """Return the status of a file itself. Raises OSError, with ELOOP where a link would have been followed."""
        if not name:
            return os.fstat(self.descriptor(""))
        above, last = split(name)
        return os.stat(last, dir_fd=self.descriptor(above), follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Return whether there is anything of this name."""
        try:
            self.lstat(name)
        except (OSError, ValueError):
            return False
        return True

    def is_dir(self, name: str) -> bool:
        """Return whether this is a directory, reached through directories alone."""
        try:
            return stat.S_ISDIR(self.lstat(name).st_mode)
        except (OSError, ValueError):
            return False

    def open_regular(self, name: str) -> tuple[int, int]:
        """Return a descriptor for reading and the size of a regular file. Raises UnreadableError for anything else."""
        above, last = split(name)
        try:
            return open_regular_at(self.descriptor(above), last)
        except (OSError, ValueError) as error:
            raise files.unreadable(error) from None

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Return the whole file. Raises UnreadableError, also when it is larger than `limit` bytes."""
        return files.read_whole(*self.open_regular(name), limit)

    def read_json(self, name: str, limit: int) -> Any:
        """Return the document in the file. Raises UnreadableError, also for what is not JSON or nested too deeply."""
        return files.parsed(self.read_bytes(name, limit))

    def listing(self, name: str = "") -> list[TreeItem] | None:
        """Return the items of a directory by name; none where it does not exist; None where it cannot be read.

        A link to a directory, and a directory with more names than `NAMES`, cannot be read.
        """
        items = self.some(name, NAMES + 1)
        return None if items is None or len(items) > NAMES else sorted(items, key=lambda item: item.last)

    def some(self, name: str, most: int) -> list[TreeItem] | None:
        """Return at most so many items of a directory, in any order, otherwise like `listing`."""
        return self._listed(name, most)

    def _listed(self, name: str, most: int) -> list[TreeItem] | None:
        try:
            fd = os.open(".", LISTED, dir_fd=self.descriptor(name))
        except (OSError, ValueError) as error:
            return [] if is_absent(error) else None
        try:
            with os.scandir(fd) as entries:
                return [TreeItem(self, name, entry) for entry in itertools.islice(entries, most)]
        except OSError:
            return None
        finally:
            os.close(fd)

    def walk(self, name: str = "", skip: tuple[str, ...] = ()) -> Iterator[tuple[str, TreeItem | None]]:
        """Yield everything below a directory: (name, item), and (name, None) for a directory that cannot be read.

        Names are from the tree's root. A directory below the level `DEPTH` has its item only, and nothing in it.
        skip: patterns of names that are left out, with all below them.
        """
        stack = [name]
        while stack:
            above = stack.pop()
            items = self.listing(above)
            if items is None and above != name:
                yield above, None
            for item in items or ():
                if not matches(item.last, skip):
                    if item.is_dir and not self.is_too_deep(item.name):
                        stack.append(item.name)
                    yield item.name, item

    def is_too_deep(self, name: str) -> bool:
        """Return whether this is deeper than anything that a cache holds, so that nothing below is read."""
        return name.count("/") >= DEPTH

    # Writing

    def make(self) -> None:
        """Make the tree's own directory, and those above it up to the root, where they are missing. Raises OSError."""
        Path(self._root).mkdir(parents=True, exist_ok=True)
        if self._below:
            with Tree(self._root) as outer:
                outer.make_folder(self._below)

    def make_folder(self, name: str, *, mode: int = 0o777) -> None:
        """Make a directory, and those above it up to the tree's, where they are missing. Raises OSError."""
        parts = name.split("/")
        for end in range(1, len(parts) + 1):
            with contextlib.suppress(FileExistsError):
                os.mkdir(plain(parts[end - 1]), mode, dir_fd=self.descriptor("/".join(parts[: end - 1])))
        self.descriptor(name)

    def write_atomically(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        """Replace a file's content, whole or not at all, also across a crash of the machine. Raises OSError.

        Directories that lead to it are made. A kill may leave a file whose name ends in ``.tmp``, never read by anyone.
        """
        above, last = split(name)
        if above:
            self.make_folder(above)
        folder = self.descriptor(above)
        temporary = f".{last[:180]}.{os.urandom(16).hex()}.tmp"
        try:
            with os.fdopen(os.open(temporary, _NEW, mode, dir_fd=folder), "wb") as file:
                os.fchmod(file.fileno(), mode)  # whatever the umask: others read what one user wrote
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        self.sync(above)

    def sync(self, name: str) -> None:
        """Make the names in a directory survive a crash of the machine (fsync). Raises OSError."""
        with readable(self.descriptor(name)) as descriptor:
            os.fsync(descriptor)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet: of two writers the first wins, and both then read the same."""
        above, last = split(name)
        sibling = f".{last}.{os.urandom(16).hex()}.tmp"
        self.write_atomically(f"{above}/{sibling}".lstrip("/"), data)
        folder = self.descriptor(above)
        try:
            with contextlib.suppress(FileExistsError):
                os.link(sibling, last, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        finally:
            os.unlink(sibling, dir_fd=folder)

    def open_file(self, name: str, flags: int, *, create: bool = False, mode: int = 0o666) -> int:
        """Return a descriptor of a regular file, opened with these flags. Raises OSError, NotRegularError."""
        above, last = split(name)
        return open_at(self.descriptor(above), last, flags, create=create, mode=mode)

    def new_file(self, name: str, mode: int = 0o644) -> int:
        """Return a descriptor for writing a file that must not exist yet, with this mode. Raises OSError."""
        above, last = split(name)
        descriptor = os.open(last, _NEW, mode, dir_fd=self.descriptor(above))
        os.fchmod(descriptor, mode)  # whatever the umask
        return descriptor

    def set_time(self, name: str, ns: int) -> None:
        """Give a file or directory itself this time of its last change and use, in ns. Raises OSError."""
        above, last = split(name)
        os.utime(last, ns=(ns, ns), dir_fd=self.descriptor(above), follow_symlinks=False)

    def copy_mode(self, name: str, status: os.stat_result) -> None:
        """Give a directory the owner, where that is allowed, and the mode of another. Raises OSError."""
        with readable(self.descriptor(name)) as descriptor:
            with contextlib.suppress(OSError):
                os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode))

    def set_mode(self, name: str, mode: int) -> None:
        """Give a directory this mode, unless it has it. Raises OSError."""
        descriptor = self.descriptor(name)
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            with readable(descriptor) as opened:
                os.fchmod(opened, mode)

    def move(self, name: str, to: Tree, new: str) -> None:
        """Rename a file or directory, itself, into a tree of the same file system. Raises OSError."""
        source, last = split(name)
        target, goal = split(new)
        with to.below("") as other:  # with its own descriptors: it may be this tree
            rename(last, goal, self.descriptor(source), other.descriptor(target), DEPTH)
        self.close()

    def unlink(self, name: str) -> None:
        """Delete a file, itself. Raises OSError."""
        above, last = split(name)
        os.unlink(last, dir_fd=self.descriptor(above))

    def rmdir(self, name: str) -> None:
        """Delete an empty directory. Raises OSError."""
        above, last = split(name)
        os.rmdir(last, dir_fd=self.descriptor(above))
        self.close()

    def remove(self, name: str, *, scratch: str | None = None) -> None:
        """Delete a file, or a tree of any depth and size. Raises OSError; FileNotFoundError where there is none.

        scratch: a directory of this tree, on the same file system, for a temporary name; by default the one above it.
        """
        above = name.rpartition("/")[0] if scratch is None else scratch
        if not stat.S_ISDIR(self.lstat(name).st_mode):
            self.unlink(name)
            return
        outer, last = split(name)
        unlock(self.descriptor(outer), last)
        flat = self._temporary(above)
        self.move(name, self, f"{flat}/0")
        with self.below(flat) as inner:
            inner.flatten()
        self.rmdir(flat)

    def _temporary(self, above: str) -> str:
        """Return the name of a new private directory in this one."""
        flat = f"{above}/.{os.urandom(8).hex()}.tmp".lstrip("/")
        self.make_folder(flat, mode=0o700)
        return flat

    def flatten(self) -> None:
        """Delete the tree ``0`` in this directory: each directory moves up to here first, so that depth is no limit."""
        queue, number = ["0"], 0
        while queue:
            name = queue.pop()
            while batch := some_names(self.descriptor(name)):
                for last, is_dir in batch:
                    if is_dir:
                        unlock(self.descriptor(name), last)
                        number += 1
                        queue.append(str(number))
                        os.rename(last, queue[-1], src_dir_fd=self.descriptor(name), dst_dir_fd=self._fds[0])
                    else:
                        os.unlink(last, dir_fd=self.descriptor(name))
            self.rmdir(name)

    # Descriptors

    def descriptor(self, name: str) -> int:
        """Return a descriptor (O_PATH) of a directory, valid until the next use of the tree. Raises OSError."""
        if name == self._current:
            return self._fds[-1]
        if not self._fds:
            self._fds.append(self._opened())
        parts = name.split("/") if name else []
        if len(parts) > DEPTH + 1:
            raise OSError(errno.ENAMETOOLONG, "it is nested too deeply", name[:200])
        same = 0
        for mine, theirs in zip(self._parts, parts, strict=False):
            if mine != theirs:
                break
            same += 1
        self._current = _NOWHERE  # until all of it is open
        while len(self._parts) > same:
            os.close(self._fds.pop())
            self._parts.pop()
        for part in parts[same:]:
            self._fds.append(open_folder(self._fds[-1], part))
            self._parts.append(part)
        self._current = name
        return self._fds[-1]

    def _opened(self) -> int:
        """Return a descriptor of the tree's own directory."""
        fd = os.open(self._root or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in self._below.split("/") if self._below else ():
            try:
                inner = open_folder(fd, part)
            finally:
                os.close(fd)
            fd = inner
        return fd


class ReadOnceTree(Tree):
    """A tree whose directories are listed once, for one look at all of it: what changes meanwhile is not seen."""

    def __init__(self, root: str | os.PathLike[str], below: str = "") -> None:
        super().__init__(root, below)
        self._known: dict[str, list[TreeItem] | None] = {}
        self._room = REMEMBERED

    def some(self, name: str, most: int) -> list[TreeItem] | None:
        """Return what the first listing of this directory returned, if that was all of it."""
        if name in self._known:
            return (known := self._known[name]) and known[:most]
        found = self._listed(name, most)
        number = len(found or ()) + 1
        if number <= min(most, self._room):
            self._room -= number
            self._known[name] = found
        return found
