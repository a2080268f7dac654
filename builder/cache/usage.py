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
from pathlib import Path

FOLDER = "used"


def stamp_path(root: Path, marker: str) -> Path:
    """Return the stamp of the marker at this path below the root."""
    return root / FOLDER / Path(marker).relative_to("markers")


def stamp(root: Path, marker: str) -> None:
    """Record a use by writing. Never raises OSError: no warm-up fails for a stamp."""
    path = stamp_path(root, marker)
    with contextlib.suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, b"\n")  # a file without a byte is never read
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def note(root: Path, marker: str) -> None:
    """Record a use by reading alone. Never raises OSError."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(stamp_path(root, marker), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.read(descriptor, 1)
        finally:
            os.close(descriptor)


def last(root: Path, marker: str, written: float) -> float:
    """Return the time of the marker's last use, in seconds since the epoch; at least `written`."""
    with contextlib.suppress(OSError, ValueError):
        status = os.lstat(stamp_path(root, marker))
        return max(written, status.st_mtime, status.st_atime)
    return written


def forget(root: Path, marker: str) -> None:
    """Remove the stamp of a marker that is removed."""
    path = stamp_path(root, marker)
    with contextlib.suppress(OSError):
        path.unlink()
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def touched(status: os.stat_result, *, accessed: bool) -> float:
    """Return the time of a file's last use. accessed: count its access time. A new hard link is no use."""
    return max(status.st_mtime, status.st_atime if accessed else 0.0)


def has_access_times(root: Path) -> bool:
    """Return whether the mount of the root records access times."""
    try:
        return not os.statvfs(root).f_flag & os.ST_NOATIME
    except OSError:
        return False
