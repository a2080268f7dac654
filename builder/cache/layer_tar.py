"""Layers of cache images: tars that have the same bytes wherever they are made, and a reader that trusts none.

The writer uses the least of the format: regular files and directories, names longer than a header holds in GNU's way,
owner 0, no names of users, whole seconds. The reader takes exactly this, and refuses everything else before it is
written: links, devices, sparse files, headers of PAX, bits beyond the permissions, names that lead elsewhere, more
bytes or files than the layer was said to have. Python's tarfile reads names of any length into memory.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Protocol

from builder.cache.cache_image import PREFIX, Layer
from builder.text import printable

#: Files of families in which no build compares times all have this one (1980-01-01): their layer is then the same
#: after every use.
CONSTANT = 315532800
_LEVEL = 6
_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
#: Bytes of a name; levels of directories.
_LONGEST, _DEEPEST = 4096, 128
#: deflate packs 1032 bytes into one at best. Kernels and their sources reach about 12: more than this many for one, and
#: more than so many bytes altogether, are none.
_RATIO, _ANYWAY = 100, 1 << 30
_FILE, _FOLDER, _LONG_NAME = b"0", b"5", b"L"


class HostileLayerError(Exception):
    """A layer is not what the manifest says, or holds what no layer of ours does. The message is the reason."""


class ChangedError(Exception):
    """A file was written to while it was packed. The message names it."""


class _Target(Protocol):
    def write(self, data: bytes, /) -> object: ...


class LayerWriter:
    """Writes one layer. Names are given in sorted order, directories before what is in them."""

    def __init__(self, target: _Target) -> None:
        self._packed = _Packed(target)
        self.bytes = self.files = 0

    def folder(self, name: str, mtime: int = CONSTANT) -> None:
        """Add a directory below the prefix; "" is the prefix itself. mtime: whole seconds."""
        self._header(name, _FOLDER, 0o755, 0, mtime)

    def data(self, name: str, content: bytes, mtime: int = CONSTANT) -> None:
        """Add a file of this content."""
        self._header(name, _FILE, 0o644, len(content), mtime)
        self._packed.write(content + bytes(-len(content) % _BLOCK))
        self._count(len(content))

    def file(self, name: str, descriptor: int, mtime: int) -> None:
        """Add the file of this descriptor, from its beginning. Raises ChangedError where it is written to meanwhile."""
        before = os.fstat(descriptor)
        self._header(name, _FILE, 0o755 if before.st_mode & 0o111 else 0o644, before.st_size, mtime)
        left = before.st_size
        while left:
            data = os.read(descriptor, min(left, _CHUNK))
            if not data:
                raise ChangedError(f"{printable(name)} was cut while it was packed")
            self._packed.write(data)
            left -= len(data)
        self._packed.write(bytes(-before.st_size % _BLOCK))
        after = os.fstat(descriptor)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ChangedError(f"{printable(name)} was written to while it was packed")
        self._count(before.st_size)

    def finish(self, **which: str) -> Layer:
        """End the layer and describe it. which: its family, key and part."""
        self._packed.write(bytes(2 * _BLOCK))
        digest, size, diff_id = self._packed.finish()
        return Layer(digest=digest, size=size, diff_id=diff_id, bytes=self.bytes, files=self.files, **which)

    def _header(self, name: str, kind: bytes, mode: int, size: int, mtime: int) -> None:
        info = tarfile.TarInfo(f"{PREFIX}/{name}".rstrip("/"))
        info.type, info.mode, info.size, info.mtime = kind, mode, size, mtime
        self._packed.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _count(self, size: int) -> None:
        self.bytes += size
        self.files += 1


class _Packed:
    """Compresses what is written to it, and keeps both digests."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        # 31: with the header of gzip, which zlib writes without a time and a name.
        self._deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
        self._plain, self._packed, self._size = hashlib.sha256(), hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._plain.update(data)
        self._out(self._deflate.compress(data))
        return len(data)

    def _out(self, data: bytes) -> None:
        if data:
            self._packed.update(data)
            self._size += len(data)
            self._target.write(data)

    def finish(self) -> tuple[str, int, str]:
        self._out(self._deflate.flush())
        return f"sha256:{self._packed.hexdigest()}", self._size, f"sha256:{self._plain.hexdigest()}"


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One member of a layer. name: below the prefix; "" is the prefix. size: of a file. mtime: whole seconds."""

    name: str
    is_dir: bool
    size: int
    executable: bool
    mtime: int


def members(
    source: IO[bytes], layer: Layer, check: Callable[[], None] = lambda: None
) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """Yield the members of a layer with their content, which has to be read before the next one. Verifies all of it.

    Raises HostileLayerError, at the latest at the end: until then nothing that was yielded is to be believed.
    """
    stream = _Unpacked(source, layer, check)
    seen: set[str] = set()
    files = total = 0
    name: str | None = None
    while (header := stream.read(_BLOCK)) != bytes(_BLOCK):
        info = _parsed(header)
        if info.type == _LONG_NAME:
            if name is not None or not 0 < info.size <= _LONGEST + 1:
                raise HostileLayerError("it has a name of more than 4096 bytes")
            name = stream.padded(info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            continue
        member = _member(info, name)
        name = None
        if member.name in seen:
            raise HostileLayerError(f"it holds {member.name[:200]!r} twice")
        seen.add(member.name)
        files, total = files + (not member.is_dir), total + member.size
        if files > layer.files or len(seen) > 2 * layer.files + 64 * _DEEPEST:
            raise HostileLayerError(f"it holds more than the {layer.files} files that its manifest says")
        if total > layer.bytes:
            raise HostileLayerError(f"its files have more than the {layer.bytes} bytes that its manifest says")
        content = stream.content(member.size)
        yield member, content
        for _ in content:  # what its reader left
            pass
    stream.finish()
    if (files, total) != (layer.files, layer.bytes):
        raise HostileLayerError(f"it holds {files} files of {total} bytes, and its manifest says otherwise")


def _parsed(header: bytes) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise HostileLayerError(f"it is no tar: {error}") from None
    if info.type not in (_FILE, _FOLDER, _LONG_NAME):
        kinds = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}
        raise HostileLayerError(f"it holds {kinds.get(info.type, 'something that is neither file nor directory')}")
    if info.size < 0:
        raise HostileLayerError("it has a file of less than no bytes")
    return info


def _member(info: tarfile.TarInfo, long_name: str | None) -> Member:
    name = long_name if long_name is not None else info.name
    shown = repr(name[:200])
    if name != PREFIX and not name.startswith(f"{PREFIX}/"):
        raise HostileLayerError(f"it holds {shown}, which is not below {PREFIX}/")
    below = name[len(PREFIX) + 1 :].rstrip("/")
    parts = below.split("/") if below else []
    if any(part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > 255 for part in parts):
        raise HostileLayerError(f"it holds {shown}, a name that leads elsewhere")
    if len(parts) > _DEEPEST:
        raise HostileLayerError(f"it holds {shown}, which is nested too deeply")
    if info.mode & ~0o755:
        raise HostileLayerError(f"it holds {shown} with mode {info.mode:o}")
    if info.type == _FOLDER and info.size:
        raise HostileLayerError(f"it holds {shown}, a directory with content")
    return Member(below, info.type == _FOLDER, info.size, bool(info.mode & 0o100), int(info.mtime))


class _Unpacked:
    """The tar in a compressed blob: never more of it than its manifest says, and with both digests at the end."""

    def __init__(self, source: IO[bytes], layer: Layer, check: Callable[[], None]) -> None:
        self._source, self._layer, self._check = source, layer, check
        self._inflate = zlib.decompressobj(31)
        self._packed, self._plain, self._size, self._made = hashlib.sha256(), hashlib.sha256(), 0, 0
        self._rest = b""
        # Each file has a header, perhaps two for its name, and padding; so has each directory.
        self._most = layer.bytes + (layer.files * 2 + 64 * _DEEPEST) * 4 * _BLOCK + (1 << 20)

    def read(self, size: int) -> bytes:
        """Return exactly so many bytes of the tar."""
        parts, have = [self._rest], len(self._rest)
        while have < size:
            if not (data := self._next()):
                raise HostileLayerError("it is cut")
            parts.append(data)
            have += len(data)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]

    def padded(self, size: int) -> bytes:
        """Return so many bytes, without the padding that follows them."""
        return self.read(size + -size % _BLOCK)[:size]

    def content(self, size: int) -> Iterator[bytes]:
        """Yield the content of a file, and read its padding."""
        left = size
        while left:
            piece = self.read(min(left, _CHUNK))
            left -= len(piece)
            yield piece
        self.read(-size % _BLOCK)

    def finish(self) -> None:
        """Read the rest, which has to be blank, and compare both digests."""
        while True:
            if self._rest.strip(b"\0"):
                raise HostileLayerError("it has bytes after its end")
            if not (data := self._next()):
                break
            self._rest = data
        if self._inflate.unused_data or self._source.read(1):
            raise HostileLayerError("it has bytes after its end")
        digest, diff_id = f"sha256:{self._packed.hexdigest()}", f"sha256:{self._plain.hexdigest()}"
        if (digest, self._size) != (self._layer.digest, self._layer.size):
            raise HostileLayerError("its bytes are not those of its digest")
        if diff_id != self._layer.diff_id:
            raise HostileLayerError("its content is not that of its diff_id")

    def _next(self) -> bytes:
        """Return some more bytes of the tar, b"" at its end. Raises HostileLayerError where it breaks off."""
        self._check()
        while not self._inflate.eof:
            packed = self._inflate.unconsumed_tail
            if not packed:
                packed = self._source.read(1 << 16)
                self._packed.update(packed)
                self._size += len(packed)
            try:
                data = self._inflate.decompress(packed, _CHUNK)
            except zlib.error:
                raise HostileLayerError("it is not packed by gzip, or is damaged") from None
            if data:
                break
            if not (packed or self._inflate.eof):
                raise HostileLayerError("it is cut")
        else:
            return b""
        self._plain.update(data)
        self._made += len(data)
        if self._made > self._most or self._made > self._size * _RATIO + _ANYWAY:
            raise HostileLayerError("it unpacks to more than its manifest says")
        return data
