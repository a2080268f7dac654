"""Archives of an untrusted root, as an engine sends them, unpacked within bounds below a private directory.

Regular files and directories only: no link, no device, nothing outside. What is left out is named, and never a reason
to stop: a reader of the copy finds it missing. Only an archive whose rest would cost too much is broken off.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, cast

from builder.text import printable, size

if TYPE_CHECKING:
    import tarfile

#: Errors of one name, where the next file may do well.
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
#: Directories above a file.
_DEPTH = 128
#: What is left out that is named.
_MOST_NAMED = 20


@dataclass
class UnpackBudget:
    """What is left of the bytes and files that may be unpacked. file: bytes of one file.

    skipped: what was left out, with the reason. Bytes that are only read to get past a file count as well.
    """

    file: int
    total: int
    files: int = 200_000
    skipped: list[str] = field(default_factory=list)

    def skip(self, name: str, why: str) -> None:
        """Name what is left out."""
        if len(self.skipped) < _MOST_NAMED:
            self.skipped.append(f"{printable(name)[:200]} {why}")

    def take(self, member: tarfile.TarInfo, source: str) -> bool:
        """Count a member; return whether it may be unpacked. Raises _BrokenOff where the rest costs too much."""
        name = f"{source}/{member.name.partition('/')[2]}".rstrip("/")
        self.files -= 1
        self.total -= max(0, member.size)
        if self.files < 0:
            self.skip(source, "has too many files: the rest was not read")
            raise _BrokenOff
        if self.total < 0:
            self.total += member.size  # of the next archive there is something left
            self.skip(name, f"has {size(member.size)}, more than may be copied: what follows it was not read")
            raise _BrokenOff
        if member.size > self.file:
            self.skip(name, f"has {size(member.size)}, more than such a file ever has: it was not read")
            return False
        if member.name.count("/") > _DEPTH:
            self.skip(name, "is nested too deeply: it was not read")
            return False
        return True


class _BrokenOff(Exception):
    """The rest of this archive is not read."""


def unpack(chunks: Iterator[bytes], source: str, target: Path, bounds: UnpackBudget) -> None:
    """Unpack an archive of `source` below `target`. Raises tarfile.TarError, and OSError for the target's disk."""
    import tarfile  # of no use where the root can be read

    try:
        with tarfile.open(fileobj=cast(IO[bytes], _Reader(chunks)), mode="r|") as tar:
            for member in tar:
                if not bounds.take(member, source):
                    continue
                try:
                    _extract(tar, member, target)
                except OSError as error:
                    if error.errno not in _IMPOSSIBLE:
                        raise
                    bounds.skip(f"{source}/{member.name.partition('/')[2]}", "cannot be copied: it was not read")
    except _BrokenOff:
        pass


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Unpack one member below target."""
    path = _inside(target, member.name)
    if path is None:
        return
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.islnk():
        # Another name of an earlier file.
        original = _inside(target, member.linkname)
        if original is not None and original.is_file():
            shutil.copy2(original, path)
    elif member.isreg() and (content := tar.extractfile(member)) is not None:
        with path.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        os.utime(path, (member.mtime, member.mtime))


def _inside(target: Path, name: str) -> Path | None:
    """Return the path of a member of this name below target; None where it would be outside."""
    place = PurePosixPath(name)
    return None if place.is_absolute() or ".." in place.parts else target / place


class _Reader:
    """An iterator of chunks as the file that tarfile reads."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        parts, have = [self._rest], len(self._rest)
        while size < 0 or have < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        if size < 0:
            size = len(data)
        self._rest = data[size:]
        return data[:size]
