"""One exchange with a registry: the body of a request, the answer to it, and where it was sent."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from builder.errors import RegistryLostError, RegistryRefusedError
from builder.host import outside
from builder.registry.documents import error_text
from builder.registry.failures import TransientError
from builder.text import printable

if TYPE_CHECKING:
    import requests

#: Bytes of a body that are read or written at once.
CHUNK = 1 << 20
#: Pieces of a body that are read ahead.
_AHEAD = 4
#: Bytes of an error's body that are read.
_ERROR_LIMIT = 1 << 14


#: Pieces of a body as a thread reads them: the last one is empty, or the error that ended it.
Pieces = queue.Queue["bytes | Exception"]


class Waiting(Protocol):
    """What an answer needs of its transport."""

    def next_of(self, pieces: Pieces, host: str) -> bytes:
        """Return the next piece of a body, waited for as long as there is time; raise the error in its place."""

    def redacted(self, text: str) -> str:
        """Return the text without secrets."""


class Body:
    """A request's body of known length, from pieces. Counts what was taken, and can be stopped.

    progress: called with the number of bytes of each piece, in another thread.
    """

    def __init__(self, pieces: Iterable[bytes], size: int, progress: Callable[[int], None] = lambda _: None) -> None:
        self._pieces = pieces
        self._size = size
        self._progress = progress
        self.sent = 0
        self.reported = 0
        self.moved = time.monotonic()
        self.stopped = False
        self.error: Exception | None = None

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        try:
            yield from self._checked()
        except Exception as error:
            self.error = error  # http.client would make a failure of the connection of it
            raise

    def _checked(self) -> Iterator[memoryview]:
        for piece in self._pieces:
            view = memoryview(piece)
            for start in range(0, len(view), CHUNK):
                part = view[start : start + CHUNK]
                self.sent += len(part)
                if self.sent > self._size or self.stopped:
                    raise RegistryRefusedError("it became longer while it was sent")
                yield part
                self.moved = time.monotonic()
                self.reported += len(part)
                self._progress(len(part))
        if self.sent < self._size:
            raise RegistryRefusedError("it became shorter while it was sent")


class Answer:
    """The answer to a request. Its body is read with deadlines. A context manager: closing frees the connection."""

    def __init__(self, response: requests.Response, waiting: Waiting) -> None:
        self._response = response
        self._waiting = waiting
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.url: str = response.url or ""
        self._reader: threading.Thread | None = None
        self._left = threading.Event()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the connection. A thread that still reads from it does that itself: it has a lock that closing needs."""
        reader = self._reader
        if reader is None or not reader.is_alive():
            self._response.close()
            return
        self._left.set()
        with contextlib.suppress(Exception):
            self._response.raw.shutdown()  # ends a read that waits, in urllib3 2.3 and later

    def chunks(self) -> Iterator[bytes]:
        """Yield the body. Raises TransientError where it is cut, RegistryLostError at the deadline.

        A thread reads ahead, at most _AHEAD pieces: a read of a socket has no limit for all of its bytes.
        """
        pieces: Pieces = queue.Queue(_AHEAD)
        self._reader = outside.start_thread(functools.partial(self._read_into, pieces), "reader")
        while piece := self._waiting.next_of(pieces, host_of(self.url)):
            yield piece
        self._reader.join()

    def _read_into(self, pieces: Pieces) -> None:
        def put(item: bytes | Exception) -> bool:
            while not self._left.is_set():
                with contextlib.suppress(queue.Full):
                    pieces.put(item, timeout=0.1)
                    return True
            return False

        try:
            while put(piece := self._response.raw.read(CHUNK, decode_content=False)) and piece:
                pass
        except Exception as error:  # noqa: BLE001 - raised again where the pieces are taken
            put(error)
        finally:
            if self._left.is_set():
                self._response.close()

    def read(self, limit: int, what: str) -> bytes:
        """Return the whole body. Raises RegistryRefusedError beyond `limit` bytes."""
        found = bytearray()
        for piece in self.chunks():
            found += piece
            if len(found) > limit:
                raise RegistryRefusedError(f"{host_of(self.url)}: {what} has more than {limit} bytes")
        return bytes(found)

    def length(self) -> int | None:
        """Return the Content-Length; None where it is missing or no number."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None

    def error(self) -> str:
        """Return what the registry wrote about its error: its code and message, on one line; "" if nothing."""
        with contextlib.suppress(RegistryRefusedError, RegistryLostError, TransientError):
            return self._waiting.redacted(error_text(self.read(_ERROR_LIMIT, "an error")))
        return ""


def host_of(url: str) -> str:
    """Return the host of a URL, which is all of it that messages show."""
    try:
        return printable(urllib.parse.urlsplit(url).netloc.rpartition("@")[2])
    except ValueError:
        return "the registry"


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80)
