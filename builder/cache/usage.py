"""When a marker, or an entry, was last of use to somebody.

Who warms writes a stamp beside nothing else: ``used/<marker's folder>/<marker's name>``, whose mtime is the moment. Who
only reads (`warm-cache check`, `env`) reads that stamp, so that the file system notes the access, where it is mounted
to do so; no other reader opens it, and no listing or copy of markers does. What test jobs do shows at the entries:
DeepGEMM's own hits touch ``.committed``, and a read is an access.

Access times are as the mount gives them: ``relatime`` is right to a day, ``noatime`` says nothing.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FOLDER = "used"


def stamp_path(root: Path, marker: str) -> Path:
    """Of the marker at this path below the root."""
    return root / FOLDER / Path(marker).relative_to("markers")


def stamp(root: Path, marker: str) -> None:
    """Notes a use, for whoever may write. What cannot be written is nothing that a warm-up fails for."""
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
    """Notes a use by reading alone."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(stamp_path(root, marker), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.read(descriptor, 1)
        finally:
            os.close(descriptor)


def last(root: Path, marker: str, written: float) -> float:
    """When the marker was last of use, in seconds since the epoch; not before it was written."""
    with contextlib.suppress(OSError, ValueError):
        status = os.lstat(stamp_path(root, marker))
        return max(written, status.st_mtime, status.st_atime)
    return written


def forget(root: Path, marker: str) -> None:
    """With the marker goes its stamp."""
    path = stamp_path(root, marker)
    with contextlib.suppress(OSError):
        path.unlink()
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def touched(status: os.stat_result, *, accessed: bool) -> float:
    """When a file was last of use. accessed: its access time says something. Giving it another name is no use."""
    return max(status.st_mtime, status.st_atime if accessed else 0.0)


def has_access_times(root: Path) -> bool:
    """Whether the mount that the root lies on notes accesses."""
    try:
        return not os.statvfs(root).f_flag & os.ST_NOATIME
    except OSError:
        return False
