"""Kernel locks on files (flock): open one without following links, try it, and name its holders from /proc/locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from builder.errors import PreflightError
from builder.text import printable

LOCKS = Path("/proc/locks")


_SECRET = re.compile(r"(--webhook[ =])\S+")


def open_lock(path: Path) -> int:
    """A descriptor of a lock file that is there. Raises OSError, and PreflightError for what cannot be one: a link
    would lock something else, and a FIFO would be waited for.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise PreflightError(f"{path} is no regular file, so it cannot be a lock. Something else made it: remove it")
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)


def try_lock(descriptor: int) -> bool:
    """Takes the lock if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(descriptor: int, locks: Path = LOCKS) -> str:
    """Who holds a flock on this file, as far as this PID namespace can tell."""
    return next(_holders(os.fstat(descriptor), locks), "another builder")


def holders(path: Path, locks: Path = LOCKS) -> list[str]:
    """All who hold a flock on this file, as far as this PID namespace can tell. Nobody is kept off by the question."""
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
        # Anybody's words: a test job's hold is one of these, and a URL given as an option is a secret here too.
        shown = _SECRET.sub(r"\1…", words.decode("utf-8", "replace"))
        return f"pid {pid} ({printable(shown)[:80]})"
    return f"pid {pid}"
