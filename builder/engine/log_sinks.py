"""Destinations of a container's output: a file with every line, a display with as many as it can take, a short tail.

A region is bytes of whole lines: each ends with a newline and has no other carriage return or newline. The work is done
per region, and per line only for the lines that people see.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from builder.engine.api import STDERR, STDOUT
from builder.text import readable, shortened

#: Prefix of each line in the log file, by stream.
MARKS = {STDOUT: "out", STDERR: "err"}

#: A longer line is cut into lines of this many bytes.
MAX_LINE = 1 << 20
TAIL_LINES = 30
#: Of a log file: what a task prints may be confidential.
LOG_MODE = 0o600

_SHOWN_CHARACTERS = 2000
_QUEUE_BYTES = 1 << 20


@dataclass(frozen=True)
class Sinks:
    """Where the output is sent.

    log_path: receives every line after its prefix ``out| `` or ``err| ``.
    display: called with a stream (``out``, ``err``, or ``note`` for this program's remarks) and one line that is safe
    to print, in its own thread; lines are dropped while it is slow.
    """

    log_path: Path | None = None
    display: Callable[[str, str], None] | None = None


class Lines:
    """Cuts one stream's bytes into regions. Carriage returns end lines too, so that progress bars are seen moving."""

    def __init__(self) -> None:
        self.rest = bytearray()
        self._after_return = False

    def feed(self, data: bytes) -> bytes:
        """Return the region that these bytes complete; empty if they end no line."""
        if self._after_return:
            self._after_return = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._after_return = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first = data.find(b"\n")
        if first < 0:
            self.rest += data
            return self._cut()
        self.rest += data[:first]
        region = self._cut() + bytes(self.rest)
        end = data.rfind(b"\n") + 1
        self.rest = bytearray(data[end:])
        return region + data[first:end]

    def last(self) -> bytes:
        """Return the unfinished line as a region."""
        rest, self.rest = bytes(self.rest), bytearray()
        return rest + b"\n" if rest else b""

    def _cut(self) -> bytes:
        cut = b""
        while len(self.rest) > MAX_LINE:
            cut += bytes(self.rest[:MAX_LINE]) + b"\n"
            del self.rest[:MAX_LINE]
        return cut


def _private(path: Path) -> int:
    """Return a descriptor of the emptied file, whose mode is `LOG_MODE` if this user may set it. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, LOG_MODE)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) != LOG_MODE:
        with contextlib.suppress(OSError):  # another user's file
            os.fchmod(descriptor, LOG_MODE)
    return descriptor


class LogFile:
    """The complete log. A failure to write ends the file, never the draining; `problem` describes it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.problem = ""
        self._file: BinaryIO | None = None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def open(self) -> None:
        """Begin a new file, which other users cannot read."""
        if self.path is not None:
            try:
                self._file = os.fdopen(_private(self.path), "wb", buffering=0)
            except OSError as error:
                self._fail(error)

    def write(self, mark: str, region: bytes) -> None:
        """Add these lines, each after the mark."""
        if self._file is None:
            return
        begin = f"{mark}| ".encode()
        data = memoryview(begin + region[:-1].replace(b"\n", b"\n" + begin) + b"\n")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """May be called twice."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.problem = f"the log {self.path} is not complete: {error.strerror or error}"
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return


class Tail:
    """The last lines of the output, for error messages."""

    def __init__(self, count: int = TAIL_LINES) -> None:
        self._count = count
        self._lines: deque[bytes] = deque(maxlen=count)

    def add(self, region: bytes) -> None:
        self._lines.extend(
            line[: 4 * _SHOWN_CHARACTERS] for line in region[:-1].rsplit(b"\n", self._count)[-self._count :]
        )

    def lines(self) -> list[str]:
        """Return the lines, oldest first, safe to print."""
        return [show(line) for line in self._lines]


class Display:
    """Shows lines in its own thread. Lines that do not fit the queue are dropped and counted: the pump never waits."""

    def __init__(self, show_line: Callable[[str, str], None] | None) -> None:
        self._show_line = show_line
        self._queue: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.problem = ""

    def open(self) -> None:
        """Start the thread, if there is a display."""
        if self._show_line is not None:
            self._thread = threading.Thread(target=self._run, args=(self._show_line,), name="display", daemon=True)
            self._thread.start()

    def add(self, stream: str, region: bytes) -> None:
        """Queue these lines, or drop them. Never waits."""
        if self._thread is None:
            return
        with self._changed:
            if self._bytes > _QUEUE_BYTES or self.problem:
                self._dropped += region.count(b"\n")
                return
            self._queue.append((stream, region))
            self._bytes += len(region)
            self._changed.notify()

    def note(self, text: str) -> None:
        """Queue a remark of this program. Never dropped."""
        with self._changed:
            self._queue.append(("note", text.encode() + b"\n"))
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Stop the thread; the queued lines have this long to be shown."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self.problem = self.problem or "the display took no more lines; the log file has them"

    def _run(self, show_line: Callable[[str, str], None]) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closed)
                    if not self._queue and not self._dropped:
                        return
                    stream, region = self._queue.popleft() if self._queue else ("note", b"")
                    self._bytes -= len(region) if stream != "note" else 0
                    dropped, self._dropped = (0, self._dropped) if self._queue else (self._dropped, 0)
                for line in region[:-1].split(b"\n") if region else ():
                    show_line(stream, show(line))
                if dropped:
                    show_line("note", f"{dropped} lines not shown; the log file has them")
        except Exception as error:  # noqa: BLE001 - a display must not stop the draining
            self.problem = f"showing the log failed: {type(error).__name__}: {error}"


def show(line: bytes) -> str:
    """Return one line decoded, without terminal sequences and of limited length."""
    return shortened(readable(line[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "replace")), _SHOWN_CHARACTERS)
