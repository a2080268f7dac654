"""Streams of a container: the engine's frame format, and the connection that carries it.

A frame is a stream number, three zero bytes, a length, and that many bytes of output, cut anywhere.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

_HEADER = struct.Struct(">B3sL")
_STREAMS = 4
#: Engines send tens of KiB at most. A longer frame is none, and would be buffered until memory is exhausted.
_LONGEST = 64 << 20


class BrokenFramesError(ValueError):
    """The bytes are not in the engine's format."""


class Demux:
    """Splits a connection's bytes, however they arrive, into (stream, output)."""

    def __init__(self) -> None:
        self._stream = 0
        self._left = 0
        self._held = b""

    def pieces(self, data: bytes | memoryview) -> list[tuple[int, bytes]]:
        """Return all output in `data`, including part of an unfinished frame; adjacent output of a stream is joined.

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
        """Yield complete frames only, each as it was sent; an unfinished one is kept. Raises BrokenFramesError."""
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
        """Whether a regular end of the stream is possible here."""
        return not self._left and not self._held

    @staticmethod
    def _header(data: bytes | memoryview, at: int) -> tuple[int, int]:
        stream, zeros, size = _HEADER.unpack_from(data, at)
        if stream >= _STREAMS or zeros != b"\0\0\0" or size > _LONGEST:
            raise BrokenFramesError(f"not a frame of the engine: {bytes(data[at : at + 8])!r}")
        return stream, size


class HijackedConnection:
    """An attachment over a connection that began as an HTTP request.

    response: kept, because its collection would close the connection.
    """

    def __init__(self, connection: socket.socket, response: Any) -> None:
        self._socket = connection
        self._response = response
        self._closed = False
        # No timeout: a compiler may print nothing for many minutes.
        connection.settimeout(None)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self._socket.recv_into(buffer)
        except OSError:
            if self._closed:
                return 0
            raise

    def close(self) -> None:
        self._closed = True
        # close() alone leaves a reader in another thread blocked, and sends the engine no end-of-file.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, ValueError):
            self._response.close()
        self._socket.close()
