"""Kernel locks on files (flock): open a lock file without following links, lock it, and name its holders.

Lock files are never unlinked: a file that is removed while a process waits for it would let two holders in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from builder import openat
from builder.beneath import Tree
from builder.text import printable, shortened

LOCKS = Path("/proc/locks")


_SECRET = re.compile(r"(--webhook[ =])\S+")


class NotALockError(OSError):
    """The path is a link, a FIFO, a device or a directory: locking it would lock something else, or wait for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "is no regular file, so it cannot be a lock: remove it", str(path))


def open_lock(path: Path, *, create: bool = False, root: Path | None = None) -> int:
    """Return a descriptor of a lock file. Raises OSError, and NotALockError for anything but a regular file.

    create: make the file where it is missing, for all users as far as the umask allows. root: a directory above the
    file below which nothing is trusted; without it, the directories of the path are.
    """
    access = os.O_RDWR if create else os.O_RDONLY
    try:
        if root is None:
            return openat.open_at(None, str(path), access, create=create)
        with Tree(root) as tree:
            return tree.open_file(path.relative_to(root).as_posix(), access, create=create)
    except openat.NotRegularError:
        raise NotALockError(path) from None


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock unless another process has it; return whether it was taken. Raises OSError."""
    try:
        fcntl.flock(descriptor, _kind(shared) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Take the lock, waiting in the kernel's queue, so that no later process overtakes. Raises OSError."""
    fcntl.flock(descriptor, _kind(shared))


def _kind(shared: bool) -> int:
    return fcntl.LOCK_SH if shared else fcntl.LOCK_EX


def holder(descriptor: int, locks: Path = LOCKS) -> str:
    """Return which process holds a lock on this file, as far as this PID namespace shows."""
    return next(_holders(os.fstat(descriptor), locks), "another builder")


def holders(path: Path, locks: Path = LOCKS) -> list[str]:
    """Return all processes that hold a lock on this file, as far as this PID namespace shows. Takes no lock."""
    try:
        return list(dict.fromkeys(_holders(path.lstat(), locks)))
    except OSError:
        return []


def _holders(status: os.stat_result, locks: Path) -> Iterator[str]:
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in locks.read_text().splitlines():
            fields = line.split()
            if "->" not in fields and len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted:
                yield _process(int(fields[4]))


def _process(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
        # Any user's command line, such as a test job's hold: a URL given as an option is a secret here too.
        shown = _SECRET.sub(r"\1…", words.decode("utf-8", "replace"))
        return f"pid {pid} ({shortened(printable(shown), 80)})"
    return f"pid {pid}"
