"""Reading, listing and writing below a cache root that any user of the machine may have written to.

Reading never blocks on a FIFO, never follows a symlink and never takes in more than a limit. Writing is all or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

UNREADABLE = "is unreadable"

#: Longest number in a document.
_DIGITS = 400
_CHUNK = 1 << 20


class UnreadableError(Exception):
    """A file that cannot be used. The message is the reason, without the path.

    missing: it does not exist. refused: the system did not let this process read it, so that it may be good.
    """

    def __init__(self, why: str, *, missing: bool = False, refused: bool = False) -> None:
        super().__init__(why)
        self.missing = missing
        self.refused = refused


def why(error: BaseException) -> str:
    """Return the operating system's message of an error, without the path."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def open_regular(path: str) -> tuple[int, int]:
    """Return a descriptor for reading and the size of a regular file. Raises UnreadableError for anything else.

    The path itself may be no link; its directories may be: see `beneath` for what lies below an untrusted one.
    """
    try:
        return reopened(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
    except (OSError, ValueError) as error:
        raise unreadable(error) from None


def reopened(known: int) -> tuple[int, int]:
    """Return a descriptor for reading, and the size, of the file of this O_PATH descriptor, which is closed.

    The type is known before the file is opened: opening a device may do harm, and opening a FIFO would wait.
    Checking a file is no use of it: its access time stays as it was, where this process owns it.
    Raises UnreadableError for anything but a regular file, OSError where it cannot be opened.
    """
    try:
        status = os.fstat(known)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError("is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is not a regular file")
        path, flags = f"/proc/self/fd/{known}", os.O_RDONLY | os.O_CLOEXEC
        try:
            return os.open(path, flags | os.O_NOATIME), status.st_size
        except PermissionError:
            return os.open(path, flags), status.st_size
    finally:
        os.close(known)


def unreadable(error: OSError | ValueError) -> UnreadableError:
    """Return the reason for this error of the operating system, or of a path that can be none."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return UnreadableError("is missing", missing=True)
    if getattr(error, "errno", None) == errno.ELOOP:
        return UnreadableError("lies behind a symbolic link, which is not followed")
    return UnreadableError(f"{UNREADABLE}: {why(error)}", refused=True)


def read_bytes(path: str, limit: int) -> bytes:
    """Return the whole file. Raises UnreadableError, also when it is larger than `limit` bytes."""
    return read_whole(*open_regular(path), limit)


def read_whole(fd: int, size: int, limit: int) -> bytes:
    """Return the content of this descriptor, which is closed. Raises UnreadableError, see `read_bytes`."""
    try:
        if size > limit:
            raise UnreadableError(f"is too large: {size} bytes")
        data = os.read(fd, size)
        while len(data) < size and (more := os.read(fd, size - len(data))):
            data += more
        return data
    except OSError as error:
        raise UnreadableError(f"{UNREADABLE}: {why(error)}", refused=True) from None
    finally:
        os.close(fd)


def copy_content(source: int, target: int) -> None:
    """Copy the whole of one descriptor's file into another's, holes as holes. Raises OSError.

    So a sparse file of a terabyte costs what it has on disk.
    """
    at, size = 0, os.fstat(source).st_size
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
            at = os.lseek(source, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            if error.errno != errno.EINVAL:
                raise
            begin, at = at, size  # this file system does not tell
        os.lseek(source, begin, os.SEEK_SET)
        os.lseek(target, begin, os.SEEK_SET)
        left = at - begin
        while left > 0 and (data := os.read(source, min(left, _CHUNK))):
            left -= len(data)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(target, rest) :]
    os.ftruncate(target, size)


def read_proc(path: str) -> str:
    """Return the text of a file of /proc, which has no size. Raises UnreadableError."""
    fd, _ = open_regular(path)
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        try:
            return file.read(1 << 20)
        except OSError as error:
            raise UnreadableError(f"{UNREADABLE}: {why(error)}") from None


def read_json(path: str, limit: int) -> Any:
    """Return the document in the file. Raises UnreadableError, also for what is not JSON or nested too deeply."""
    return parsed(read_bytes(path, limit))


def parsed(data: bytes) -> Any:
    """Return the document in a file's content. Raises UnreadableError."""
    if not data:
        raise UnreadableError("is empty")
    try:
        return _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise UnreadableError(f"is not JSON: {type(error).__name__}") from None


def _number(digits: str) -> int:
    """Return a whole number. The time for one with many digits grows with their square."""
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_number)


def listing(path: str) -> list[os.DirEntry[str]] | None:
    """Return the items of a directory by name; none where it does not exist; None where it cannot be read."""
    try:
        with os.scandir(path) as items:
            return sorted(items, key=lambda item: item.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError):
        return None


def walk(base: str, skip: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
    """Yield everything below: (name, item), or (name, None) for a directory that cannot be read.

    Follows no symlinks. skip: patterns of names that are left out, with all below them.
    """
    stack = [""]
    while stack:
        above = stack.pop()
        items = listing(f"{base}/{above}" if above else base)
        if items is None and above:
            yield above, None
        for item in items or ():
            if not matches(item.name, skip):
                name = f"{above}/{item.name}" if above else item.name
                if is_dir(item):
                    stack.append(name)
                yield name, item


def is_dir(item: os.DirEntry[str]) -> bool:
    """Return whether this is a directory itself, not a link to one."""
    try:
        return item.is_dir(follow_symlinks=False)
    except OSError:
        return False


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether one path component matches any of these shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace the file's content, whole or not at all, also across a crash of the machine. Raises OSError.

    The parent directory is made when it is missing. A failure leaves no temporary file behind; a kill may leave one,
    whose name ends in ``.tmp`` and which nothing ever reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.urandom(16).hex()}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask: others read what one user wrote
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in this directory survive a crash of the machine (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until everything that was written to this directory's file system is on the disk (syncfs)."""
    import ctypes  # once per restore or generation

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ctypes.CDLL(None, use_errno=True).syncfs(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Call `write_atomically` for a path from the command line, which may be anything. Raises OSError.

    A link leads to its file, a missing directory is not made, and anything but a regular file stays as it is.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", str(path.parent))
    if os.path.lexists(path) and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file, and would be replaced by one", str(path))
    write_atomically(path, data)


def temporary_directory() -> str:
    """Return `tempfile`'s directory: the first that can be written to. Without its import, and without a file in it."""
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    places = (*filter(None, named), "/tmp", "/var/tmp", "/usr/tmp")  # noqa: S108 - those that it tries
    usable = (place for place in places if Path(place).is_dir() and os.access(place, os.W_OK | os.X_OK))
    return os.path.abspath(next(usable, "."))


def remove_unused(prefix: str, seconds: float) -> None:
    """Remove this user's temporary directories of that prefix in which nothing was made for so long.

    Killed processes leave them. One that cannot be looked at or removed stays, without an error.
    """
    import shutil  # few verbs make such directories
    import tempfile

    now = time.time()
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as items:
        for item in items:
            if item.name.startswith(prefix) and item.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    mine = item.stat(follow_symlinks=False).st_uid == os.geteuid()
                    if mine and now - _last_made(item.path) > seconds:
                        shutil.rmtree(item.path, ignore_errors=True)  # follows no link


def _last_made(folder: str) -> float:
    """Return when something was last made in a folder or below it. Raises OSError."""
    return max(os.lstat(place).st_mtime for place, _, _ in os.walk(folder))
