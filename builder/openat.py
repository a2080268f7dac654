"""One name in a directory that any user may have written to, opened without following a link (openat).

A file is opened for reading only once it is known to be regular: opening a device can already do harm, and opening a
FIFO waits.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from builder import files

_ANY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = _ANY | os.O_DIRECTORY
LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BATCH = 4096
#: What names no file of its directory.
_NO_NAMES = frozenset(("", ".", ".."))


class NotRegularError(OSError):
    """A link, a directory, a device, a FIFO or a socket is where a file should be."""

    def __init__(self, name: str) -> None:
        super().__init__(errno.EINVAL, "is not a regular file", name)


def open_regular_at(folder: int, last: str) -> tuple[int, int]:
    """Return a descriptor for reading and the size of a regular file in a directory of `Tree.descriptor`.

    last: one component. Raises UnreadableError for anything else.
    """
    try:
        return files.reopened(os.open(last, _ANY, dir_fd=folder))
    except (OSError, ValueError) as error:
        raise files.unreadable(error) from None


def open_at(folder: int | None, name: str, flags: int, *, create: bool = False, mode: int = 0o666) -> int:
    """Return a descriptor of a regular file: its type is known before it is opened. Raises OSError, NotRegularError.

    folder: a descriptor of its directory; None: `name` is the whole path. create: make it where it is missing.
    """
    while True:
        try:
            known = os.open(name, _ANY, dir_fd=folder)
        except FileNotFoundError:
            if not create:
                raise
            try:
                return os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
            except FileExistsError:
                continue
        try:
            if not stat.S_ISREG(os.fstat(known).st_mode):
                raise NotRegularError(name)
            return os.open(f"/proc/self/fd/{known}", flags | os.O_CLOEXEC)
        finally:
            os.close(known)


def is_absent(error: BaseException) -> bool:
    """Return whether an error says that there is nothing of this name."""
    return isinstance(error, (FileNotFoundError, NotADirectoryError))


def some_names(folder: int) -> list[tuple[str, bool]]:
    """Return names of a part of a directory's items, and whether each is a directory; none when it is empty."""
    with readable(folder) as fd, os.scandir(fd) as entries:
        return [(each.name, each.is_dir(follow_symlinks=False)) for each in itertools.islice(entries, _BATCH)]


@contextlib.contextmanager
def readable(folder: int) -> Iterator[int]:
    """Yield the directory of an O_PATH descriptor, opened for listing and fsync."""
    fd = os.open(".", LISTED, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def open_folder(above: int, part: str) -> int:
    try:
        return os.open(plain(part), _FOLDER, dir_fd=above)
    except NotADirectoryError:
        # A link, to a directory or not, is refused as what it is.
        if stat.S_ISLNK(os.stat(part, dir_fd=above, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed", part) from None
        raise


def unlock(above: int, last: str) -> None:
    """Let the owner of a directory into it, and move it: a process of this user could have forbidden both."""
    with contextlib.suppress(OSError):
        descriptor = os.open(last, _FOLDER, dir_fd=above)
        try:
            if os.fstat(descriptor).st_mode & 0o700 != 0o700:
                Path(f"/proc/self/fd/{descriptor}").chmod(0o700)
        finally:
            os.close(descriptor)


def split(name: str) -> tuple[str, str]:
    """Return the directory's name and the last component of a name. Raises OSError for what is none."""
    above, slash, last = name.rpartition("/")
    if slash and not above:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return above, plain(last)


def plain(part: str) -> str:
    """Return one component of a path that leads to nothing but itself. Raises OSError."""
    if part in _NO_NAMES or "/" in part:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), part)
    return part


def rename(name: str, new: str, source: int, target: int, depth: int) -> None:
    """Rename something of one directory into another; where overlayfs refuses, move its files. Raises OSError.

    overlayfs renames no directory of a lower layer. source, target: descriptors; depth: most levels of directories.
    After a kill the rest is where it was.
    """
    try:
        os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)
        return
    except OSError as error:
        is_dir = stat.S_ISDIR(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode)
        if error.errno != errno.EXDEV or not is_dir or not depth:
            raise
    os.mkdir(new, dir_fd=target)
    inner, outer = open_folder(source, name), -1
    try:
        outer = open_folder(target, new)
        with readable(inner) as folder, os.scandir(folder) as found:
            items = list(found)
        for item in items:
            rename(item.name, item.name, inner, outer, depth - 1)
    finally:
        os.close(inner)
        if outer >= 0:
            os.close(outer)
    os.rmdir(name, dir_fd=source)
