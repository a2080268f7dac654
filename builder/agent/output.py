"""Standard output and error of this program: the child's log, unchanged, and events between its lines.

One object owns both streams, so that the byte counts of the last event are exact and no event begins in the middle of a
line. Secrets are masked before anything is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable

from builder import events

MASK = b"***"
SHORTEST_SECRET = 6  # bytes; anything shorter is a word, and masking words would garble the log
STDOUT, STDERR = 0, 1


class Redactor:
    """Masks secret values in one stream, also where a read cuts them in two.

    White space around a value (such as the newline at the end of a file) is no part of the secret: masking it would
    join two lines of the log.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        values = {os.fsencode(secret).strip() for secret in secrets}
        self._secrets = sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)
        self._any = re.compile(b"|".join(map(re.escape, self._secrets)))
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return what may be printed now. The start of a secret at the end of the data is held back."""
        if not self._secrets:
            return data
        data = self._held + data
        shown = []
        at = 0
        while True:
            hold = min(_start_of(secret, data, at) for secret in self._secrets)
            found = self._any.search(data, at) if self._occurs(data) else None
            if found is None or found.start() >= hold:
                break
            shown += [data[at : found.start()], MASK]
            at = found.end()
        self._held = data[hold:]
        return b"".join((*shown, data[at:hold]))

    def flush(self) -> bytes:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, b""
        return self.mask(held)

    def mask(self, data: bytes) -> bytes:
        """Return the data with every whole secret replaced."""
        return self._any.sub(MASK, data) if self._occurs(data) else data

    def _occurs(self, data: bytes) -> bool:
        # Ten times as fast as the regular expression, and enough for nearly every chunk.
        return any(secret in data for secret in self._secrets)


class Output:
    """This program's stdout and stderr. Thread-safe. limit: bytes of log after which nothing more is copied."""

    def __init__(
        self, nonce: str, secrets: Iterable[str] = (), *, limit: int, descriptors: tuple[int, int] = (1, 2)
    ) -> None:
        self._nonce = nonce
        self.secrets = tuple(secrets)
        self._redactor = Redactor(self.secrets)
        self._limit = limit
        self._descriptors = descriptors
        self._lock = threading.Lock()
        self._mid_line = False
        self._closed = False
        self.written = [0, 0]
        self.full = False

    def copy(self, stream: int, data: bytes) -> None:
        """Copy a child's log unchanged."""
        with self._lock:
            if self._closed or self.full or not data:
                return
            self.full = sum(self.written) + len(data) > self._limit
            self._write(stream, data)

    def say(self, text: str) -> None:
        """Write a line for people to stderr."""
        with self._lock:
            if not self._closed:
                self._write(STDERR, self._redactor.mask(f"warm-cache: {text}\n".encode("utf-8", "replace")))

    def event(self, event: events.Event) -> None:
        """Write one event line."""
        with self._lock:
            if not self._closed:
                self._event(event)

    def end(self) -> None:
        """Write the last line, with byte counts. Everything after it is dropped."""
        with self._lock:
            if self._closed:
                return
            if self._mid_line:
                self._write(STDOUT, b"\n")
            self._event(events.End(self.written[STDOUT], self.written[STDERR]))
            self._closed = True

    def _event(self, event: events.Event) -> None:
        line = self._redactor.mask(events.encode(self._nonce, event))
        self._write(STDOUT, b"\n" + line if self._mid_line else line)

    def _write(self, stream: int, data: bytes) -> None:
        if stream == STDOUT:
            self._mid_line = data[-1:] not in (b"\n", b"\r")
        view = memoryview(data)
        with contextlib.suppress(OSError):  # no reader any more: the work continues, and the exit status has the result
            while view:
                done = os.write(self._descriptors[stream], view)
                self.written[stream] += done
                view = view[done:]


def _start_of(secret: bytes, data: bytes, at: int) -> int:
    """Return where, from `at` on, the rest of the data is a beginning of the secret; its length if nowhere."""
    for start in range(max(at, len(data) - len(secret) + 1), len(data)):
        if secret.startswith(data[start:]):
            return start
    return len(data)
