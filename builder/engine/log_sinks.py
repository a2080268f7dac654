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

from builder.engine.api import STDERR, STDOUT
from builder.host.outside import GiveUp, Writer, never, start_thread
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
#: Bytes that may wait for the log's file system before the reader of the output waits for it too.
_BACKLOG = 16 << 20
#: Seconds without a byte taken after which a log is given up: during the run, and at its end.
PATIENCE, CLOSING = 30.0, 5.0


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
    """The complete log. A failure to write ends the file, never the draining; `problem` describes it.

    It is written in its own thread, because a file system may hang. `write` waits for a slow one, but not for
    longer than PATIENCE without a byte taken, nor once `hurry` was called.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._writer: Writer | None = None
        self._closed = False
        self._hurried = False
        self._gave_up = ""

    @property
    def is_open(self) -> bool:
        """Return whether it was opened, and not closed to the end since."""
        return self._writer is not None and not (self._closed and self._writer.is_finished)

    @property
    def problem(self) -> str:
        """Return why the file is not complete; "" as long as nothing is known against it."""
        error = self._writer.error if self._writer is not None else None
        why = (getattr(error, "strerror", None) or str(error)) if error is not None else self._gave_up
        return f"the log {self.path} is not complete: {why}" if why else ""

    def open(self) -> None:
        """Begin a new file, which other users cannot read."""
        path = self.path
        if path is not None:
            writer = Writer(lambda: _private(path), most=2 * _BACKLOG, piece=MAX_LINE)
            writer.start()
            self._writer = writer

    def write(self, mark: str, region: bytes) -> None:
        """Add these lines, each after the mark."""
        if self._writer is None or self.problem:
            return
        begin = f"{mark}| ".encode()
        data = begin + region[:-1].replace(b"\n", b"\n" + begin) + b"\n"
        room = self._writer.wait(_BACKLOG, PATIENCE, give_up=lambda: self._hurried)
        if not self._writer.put(data) or not (room or self._hurried):
            self._gave_up = self._gave_up or "its place took no more bytes in time"

    def hurry(self) -> None:
        """Let no `write` wait any more, in whatever thread it is."""
        self._hurried = True

    def close(self, seconds: float = CLOSING, give_up: GiveUp = never) -> None:
        """Wait until all is written, for at most this long without a byte taken. May be called twice."""
        writer = self._writer
        self._closed = True
        if writer is not None and not writer.close(seconds, give_up=give_up) and writer.error is None:
            self._gave_up = self._gave_up or "its place took no more bytes in time"


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
            show_line = self._show_line
            self._thread = start_thread(lambda: self._run(show_line), "display")

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
