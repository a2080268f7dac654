"""The engine's stream format, and text that came out of a container made safe to show.

A frame is a stream number, three zero bytes, a length, and so many bytes: a piece of output, cut anywhere.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEADER = struct.Struct(">B3sL")
_STREAMS = 4
#: Engines send tens of KiB at most. What claims more is no frame, and would be held until memory ends.
_LONGEST = 64 << 20


class BrokenFramesError(ValueError):
    """What arrives is not the engine's format."""


class Demux:
    """Takes a connection's bytes as they come, and gives (stream, output) back."""

    def __init__(self) -> None:
        self._stream = 0
        self._left = 0
        self._held = b""

    def pieces(self, data: bytes | memoryview) -> list[tuple[int, bytes]]:
        """Everything at once, the part of an unfinished frame included; neighbours of one stream are joined.

        The work grows with the number of frames, not of lines. Raises BrokenFramesError.
        """
        if self._held:
            data, self._held = self._held + bytes(data), b""
        found: list[tuple[int, bytes]] = []
        parts: list[bytes | memoryview] = []
        at, end, joined = 0, len(data), self._stream
        while at < end:
            if not self._left:
                if end - at < _HEADER.size:
                    self._held = bytes(data[at:])
                    break
                self._stream, self._left = self._header(data, at)
                at += _HEADER.size
                if self._stream != joined:
                    if parts:
                        found.append((joined, b"".join(parts)))
                        parts = []
                    joined = self._stream
            taken = min(self._left, end - at)
            if taken:
                parts.append(data[at : at + taken])
                at += taken
                self._left -= taken
        if parts:
            found.append((joined, b"".join(parts)))
        return found

    def whole(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Frame by frame, each as it was; an unfinished one waits for its rest."""
        data = self._held + data if self._held else data
        at = 0
        while len(data) - at >= _HEADER.size:
            stream, size = self._header(data, at)
            if len(data) - at - _HEADER.size < size:
                break
            at += _HEADER.size + size
            yield stream, data[at - size : at]
        self._held = data[at:]

    @property
    def between_frames(self) -> bool:
        """Whether an end here is an end the engine can have meant."""
        return not self._left and not self._held

    @staticmethod
    def _header(data: bytes | memoryview, at: int) -> tuple[int, int]:
        stream, zeros, size = _HEADER.unpack_from(data, at)
        if stream >= _STREAMS or zeros != b"\0\0\0" or size > _LONGEST:
            raise BrokenFramesError(f"not a frame of the engine: {bytes(data[at : at + 8])!r}")
        return stream, size
