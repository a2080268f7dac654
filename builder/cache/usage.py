"""When a marker, or an entry, was last used.

A warm-up writes a stamp for its marker: ``used/<marker's folder>/<marker's name>``, with the time of use as its mtime.
Readers without write access (`warm-cache check`, `env`) read that stamp, so that its access time shows the use where
the mount records access times; listings and copies of markers never open it. Use by test jobs shows in the entries:
DeepGEMM's own hits touch ``.committed``, and a read is an access.

Access times are as exact as the mount has them: to a day with ``relatime``, absent with ``noatime``.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from builder.beneath import Tree

FOLDER = "used"


def stamp_name(marker: str) -> str:
    """Return the path, below the root, of the stamp of the marker at this path below the root."""
    return f"{FOLDER}/{Path(marker).relative_to('markers').as_posix()}"


def stamp(root: Path, marker: str) -> None:
    """Record a use by writing. Never raises OSError: no warm-up fails for a stamp."""
    name = stamp_name(marker)
    with contextlib.suppress(OSError, ValueError), Tree(root) as tree:
        tree.make_folder(name.rpartition("/")[0])
        descriptor = tree.open_file(name, os.O_WRONLY, create=True, mode=0o644)
        try:
            os.write(descriptor, b"\n")  # a file without a byte is never read
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def note(root: Path, marker: str) -> None:
    """Record a use by reading alone. Never raises OSError."""
    with contextlib.suppress(OSError, ValueError), Tree(root) as tree:
        descriptor = tree.open_file(stamp_name(marker), os.O_RDONLY)
        try:
            os.read(descriptor, 1)
        finally:
            os.close(descriptor)


def last(root: Path, marker: str, written: float) -> float:
    """Return the time of the marker's last use, in seconds since the epoch; at least `written`."""
    with contextlib.suppress(OSError, ValueError), Tree(root) as tree:
        status = tree.lstat(stamp_name(marker))
        return max(written, status.st_mtime, status.st_atime)
    return written


def forget(root: Path, marker: str) -> None:
    """Remove the stamp of a marker that is removed."""
    name = stamp_name(marker)
    with Tree(root) as tree:
        with contextlib.suppress(OSError):
            tree.unlink(name)
        with contextlib.suppress(OSError):
            tree.rmdir(name.rpartition("/")[0])


def touched(status: os.stat_result, *, accessed: bool) -> float:
    """Return the time of a file's last use. accessed: count its access time. A new hard link is no use.

    Whoever owns a file can give it any time of access or modification, but not of change.
    """
    read = status.st_atime if accessed and status.st_atime <= time.time() else 0.0
    return max(written(status), read)


def written(status: os.stat_result) -> float:
    """Return when a file was written to: never after its last change, which no program can choose."""
    return min(status.st_mtime, status.st_ctime)


def newest(
    tree: Tree,
    name: str,
    own: Callable[[os.stat_result], float] = written,
    below: Callable[[os.stat_result], float] = written,
) -> float | None:
    """Return the latest time of a file, or of a directory and anything in it; None where one is unknown.

    own: the time of the file or directory itself; below: that of what is in it.
    """
    try:
        status = tree.lstat(name)
        latest = own(status)
        if stat.S_ISDIR(status.st_mode):
            if tree.some(name, 1) is None:
                return None
            for _, item in tree.walk(name):
                if item is None:
                    return None
                latest = max(latest, below(item.stat()))
    except OSError:
        return None
    return latest


def has_access_times(root: Path) -> bool:
    """Return whether the mount of the root records access times."""
    try:
        return not os.statvfs(root).f_flag & os.ST_NOATIME
    except OSError:
        return False
