"""Resuming a container's log after an attachment broke: nothing twice, nothing left out.

An attachment gives the program's bytes, without times or positions. The stored log gives entries: a line, or a piece of
16 KiB of a longer one, in which json-file has replaced every byte that is not UTF-8 by U+FFFD. What both have in common
is counted per stream: newlines, and after the last one the characters that the engine stored for the received bytes.

An engine that was killed may have delivered lines that it never stored. So the last received lines are compared as
well: from the point where the stored log differs, its content is new.
"""

from __future__ import annotations

import codecs
import re
from collections import deque

#: The engine cuts longer lines into pieces of this many bytes, counted from the line's beginning.
PIECE = 16 << 10

_WINDOW = 64 << 10
_MAX_PARTIAL = 1 << 20  # a multiple of PIECE, so that pieces stay pieces
_ESCAPED = re.compile("[\udc80-\udcff]")


class Received:
    """What was received of one stream, in bounded memory."""

    def __init__(self) -> None:
        self.bytes = 0
        self.newlines = 0
        self.partial = bytearray()
        #: Number of characters of the unfinished line that are no longer in `partial`.
        self.cut = 0
        self._recent: deque[bytes] = deque()
        self._recent_bytes = 0

    def add(self, data: bytes) -> None:
        """Count these bytes, which follow all others."""
        self.bytes += len(data)
        newlines = data.count(b"\n")
        if newlines:
            self.newlines += newlines
            end = data.rfind(b"\n") + 1
            self._remember(bytes(self.partial) + data[:end])
            self.partial = bytearray(data[end:])
            self.cut = 0
        else:
            self.partial += data
        while len(self.partial) > _MAX_PARTIAL:
            self.cut += len(stored_form(bytes(self.partial[:_MAX_PARTIAL])))
            del self.partial[:_MAX_PARTIAL]

    def recent_lines(self) -> list[bytes]:
        """Return the last complete lines, each with its newline; as many as fit the window."""
        return _split(b"".join(self._recent))

    def ends_like(self, stored: bytes) -> bool:
        """Return whether the received output ends like these stored entries, as far back as both reach."""
        mine = "".join(stored_form(line) for line in self.recent_lines()) + stored_form(bytes(self.partial))
        theirs = stored.decode("utf-8", "replace")
        size = min(len(mine), len(theirs))
        return size > 0 and mine[-size:] == theirs[-size:]

    def _remember(self, block: bytes) -> None:
        if self.cut:
            # The beginning of its first line is no longer held.
            block = block[block.find(b"\n") + 1 :]
            self._recent.clear()
            self._recent_bytes = 0
        if len(block) > _WINDOW:
            block = block[-_WINDOW:]
            block = block[block.find(b"\n") + 1 :]
            self._recent.clear()
            self._recent_bytes = 0
        self._recent.append(block)
        self._recent_bytes += len(block)
        while self._recent_bytes - len(self._recent[0]) >= _WINDOW:
            self._recent_bytes -= len(self._recent.popleft())


class Resume:
    """Reads one stream's stored log from its beginning, and returns only what was not received.

    whole: nothing seems to have been lost. This decides one case: the received bytes end with an incomplete character,
    and the stored log has U+FFFD there. If whole, that is the replacement of these bytes; otherwise it may be U+FFFD
    itself, which hardly any program prints, and its remaining bytes are new.
    """

    def __init__(self, received: Received, *, whole: bool = False) -> None:
        self._whole = whole
        self._expected = [stored_form(line).encode() for line in received.recent_lines()]
        self._next = 0
        self._unchecked = received.newlines - len(self._expected)
        partial, self._pending = _complete(bytes(received.partial))
        self._partial = stored_form(partial)
        self._cut = received.cut
        self._line = b""
        self._caught_up = not received.bytes

    def new(self, entry: bytes) -> bytes:
        """Return the new part of this entry: all of it, nothing, or its end."""
        if self._caught_up:
            return entry
        if self._unchecked > 0 and entry.count(b"\n") == entry.endswith(b"\n"):
            self._unchecked -= entry.endswith(b"\n")
            return b""
        return b"".join(self._piece(piece) for piece in _split(entry))

    def end(self) -> bytes:
        """Return what is still held back at the log's end: a last line without newline that was not received."""
        line, self._line = self._line, b""
        if self._caught_up or not line:
            return b""
        self._caught_up = True
        if self._next < len(self._expected):
            return b"" if any(expected.startswith(line) for expected in self._expected[self._next :]) else line
        return self._behind_partial(line, over=True) or b""

    def _piece(self, piece: bytes) -> bytes:
        ended = piece.endswith(b"\n")
        if self._caught_up:
            return piece
        if self._unchecked > 0:
            self._unchecked -= ended
            return b""
        self._line += piece
        if self._next < len(self._expected):
            return self._known_line() if ended else b""
        rest = self._behind_partial(self._line, over=ended)
        if rest is None:
            return b""
        self._caught_up = True
        self._line = b""
        return rest

    def _known_line(self) -> bytes:
        line, self._line = self._line, b""
        try:
            # Usually the very next. A later one, when the engine failed to store some.
            self._next = self._expected.index(line, self._next) + 1
        except ValueError:
            self._caught_up = True
            return line
        return b""

    def _behind_partial(self, line: bytes, *, over: bool) -> bytes | None:
        """Return what follows the unfinished line that was received; None if more of `line` is needed to decide."""
        text = line.decode("utf-8", "replace")
        have = self._cut + len(self._partial)
        if len(text) < have + len(self._pending) + 1 and not over:
            return None
        if text[self._cut : have] != self._partial:
            shorter = over and not line.endswith(b"\n") and self._partial.startswith(text[self._cut :])
            return b"" if shorter else line
        rest = text[have:]
        if self._pending and rest:
            head = rest[0].encode()
            replaced = rest.startswith("\ufffd" * len(self._pending))
            if head.startswith(self._pending) and not (self._whole and replaced):
                return head[len(self._pending) :] + rest[1:].encode()
            rest = rest[len(self._pending) :]
        return rest.encode()


def stored_form(data: bytes) -> str:
    """Return what json-file stores for these bytes, which begin a line.

    One U+FFFD for each byte that is not UTF-8, also where the end of a piece cuts a character.
    """
    if len(data) <= PIECE:
        return _ESCAPED.sub("\ufffd", data.decode("utf-8", "surrogateescape"))
    return "".join(stored_form(data[at : at + PIECE]) for at in range(0, len(data), PIECE))


def _complete(data: bytes) -> tuple[bytes, bytes]:
    """Split off an incomplete character at the end; its rest may follow."""
    at = len(data) - len(data) % PIECE
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder.decode(data[at:])
    pending = decoder.getstate()[0]
    return data[: len(data) - len(pending)], pending


def _split(data: bytes) -> list[bytes]:
    """Return the lines with their newlines; only a newline ends a line."""
    lines = data.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])
