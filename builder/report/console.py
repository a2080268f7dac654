"""The only writer to the output stream, with groups and annotations for GitHub Actions."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from builder.host.outside import GiveUp, Writer, never
from builder.report import tables
from builder.report.tables import STATE_STYLE
from builder.text import displayed

#: The mark before a line of a container, of an operator's hook, and of this program between those.
LOG_MARKS = {"out": "│", "err": "┃", "note": "▸", "hook": "»"}

#: Seconds that a writer of this program waits for a stream that takes nothing.
PATIENCE = 5.0
#: Bytes that may wait before a writer waits for them, and before they are dropped.
_ROOM, _MOST = 1 << 18, 16 << 20


class Console:
    """Write lines, tables, groups and annotations. All methods are thread-safe.

    Colours and folding only on a terminal; collapsed groups only in GitHub Actions. A closed stream (``| head``) ends
    the display; the run and its logs continue. A stream without a reader (``| less``) holds up its writers once, for
    PATIENCE seconds; what does not fit the queue after that is dropped and counted until it is read again.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        terminal: bool,
        github: bool = False,
        width: int = 80,
        verbose: bool = False,
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stream = stream
        self._hurried = hurried
        self.github = github
        self._terminal = terminal
        self._width = max(40, width)
        self._lock = threading.Lock()
        self._above: Callable[[str], None] | None = None
        self._writer: Writer | None = None
        self._waits = True
        self._dropped = 0
        self._failure: OSError | ValueError | None = None
        self.verbose = verbose
        self.closed = False
        self.stuck = False

    def say(self, text: str = "") -> None:
        """Write one or more lines, without controls of a terminal; in GitHub Actions also without its commands."""
        self.write(displayed(text))

    def write(self, text: str) -> None:
        """Write text as it is, but for commands of GitHub Actions: for what has colours, or is for a program."""
        self._write(harmless(text) if self.github else text)

    @property
    def error(self) -> OSError | ValueError | None:
        """Return why nothing more can be written to the stream."""
        return self._failure if self._writer is None else self._writer.error

    def writes_to(self, stream: TextIO | None) -> bool:
        """Return whether this is the console's own stream."""
        return self._stream is stream

    @property
    def terminal(self) -> TextIO | None:
        """Return the stream if it is a terminal that live lines can be drawn on, else None."""
        if not self._terminal or self.github or self.closed:
            return None
        self.flush(PATIENCE)  # live lines are drawn by another writer
        return None if self.stuck else self._stream

    def above(self, take: Callable[[str], None] | None) -> None:
        """Pass all further text to ``take``, which draws it above its live lines; None: write it here again."""
        self._above = take

    def _write(self, text: str) -> None:
        take = self._above
        if take is not None and not self.closed:
            take(text)
            return
        if self._is_closed():
            return
        # Characters that the stream's encoding lacks are escaped: an error would end all output.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        data = f"{text}\n".encode(encoding, "backslashreplace")
        with self._lock:
            writer = self._started()
            if writer is None:
                self._put(data.decode(encoding))
                return
            self._queue(writer, data)
        if self._waits and writer.error is None:
            # The readers of a container's output come by here: none waits twice for a stream without a reader.
            self._waits = writer.wait(_ROOM, PATIENCE, give_up=self._hurried)
        if writer.error is not None:
            self.closed = True

    def _is_closed(self) -> bool:
        return self.closed

    def _queue(self, writer: Writer, data: bytes) -> None:
        if self._dropped:
            note = f"  {LOG_MARKS['note']} {self._dropped} lines not shown: nobody read this output\n".encode()
            if writer.put(note):
                self._dropped, self._waits = 0, True
        if self._dropped or not writer.put(data):
            self._dropped += data.count(b"\n")

    def _started(self) -> Writer | None:
        """Return the writer; None for a stream of Python's own, or where there is no room for a thread."""
        if self._writer is None:
            try:
                descriptor = self._stream.fileno()
                self._stream.flush()
                writer = Writer(lambda: descriptor, most=_MOST, owned=False)
                writer.start()
            except (OSError, ValueError, AttributeError, RuntimeError):
                return None
            self._writer = writer
        return self._writer

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failure = error
            self.closed = True

    def flush(self, patience: float | None, give_up: GiveUp = never) -> bool:
        """Wait until all is written; return whether it is. What a stream does not take in time is left to its thread.

        patience: seconds without a byte taken; None waits as long as it takes.
        """
        writer, stop = self._writer, lambda: self._hurried() or give_up()
        if writer is not None and not self.stuck and not writer.wait(0, patience, give_up=stop):
            self.give_up()
        return not self.stuck

    def close(self, patience: float | None) -> None:
        """Write all as `flush` does, and end the thread; nothing more is written."""
        if self.flush(patience) and self._writer is not None:
            self._writer.close(patience, give_up=self._hurried)
        self.closed = True

    def give_up(self) -> None:
        """Stop writing: the stream has no reader, and there is no time left to wait for one."""
        self.closed = self.stuck = True

    @property
    def hurried(self) -> bool:
        """Return whether the process is to end and has waited long enough for a reader."""
        return self._hurried()

    def log(self, stream: str, line: str) -> None:
        """Write one line of a container behind its mark. stream: a key of LOG_MARKS."""
        self.say(f"  {LOG_MARKS[stream]} {line}")

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Put all output of the block under this title; collapsed in GitHub Actions."""
        if self.github:
            self._write(f"::group::{_command_data(title)}")
        else:
            self.say(title)
        try:
            yield
        finally:
            if self.github:
                self._write("::endgroup::")

    def collapsed(self, title: str, lines: Sequence[str]) -> None:
        """Write a whole group at once, so that no other output can fall into it."""
        inside = "".join(f"{harmless(displayed(line))}\n" for line in lines)
        self._write(f"::group::{_command_data(title)}\n{inside}::endgroup::")

    def annotate(self, title: str, text: str, level: str = "error", *, file: str = "", line: int = 0) -> None:
        """Add an annotation to the run's page in GitHub Actions; nothing elsewhere. level: ``error`` or ``warning``.

        file, line: where it is shown in the files of a pull request.
        """
        if self.github:
            place = f"file={_command_property(file)},line={line}," if file else ""
            self._write(f"::{level} {place}title={_command_property(title)}::{_command_data(text)}")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Mapping[str, str] = STATE_STYLE
    ) -> None:
        """Write a table: folded and coloured on a terminal, one row a line in a pipe."""
        width, codes = (self._width, styles) if self._terminal else (None, None)
        shown = [[displayed(cell) for cell in row] for row in rows]
        self.write(tables.table(columns, shown, width=width, styles=codes))


#: The older form of a command counts anywhere in a line; the newer one at its start, after optional blanks.
_OLD_COMMAND = "##["


_COMMAND = re.compile(r"(^|\r)(\s*)::", re.MULTILINE)


def harmless(text: str) -> str:
    """Return text that looks the same and that GitHub's runner does not take for a command."""
    return _COMMAND.sub(r"\1\2: :", text.replace(_OLD_COMMAND, "## ["))


def _command_data(text: str) -> str:
    """Escape the data of a workflow command."""
    shown = displayed(text.replace("\r", "\n"))
    return shown.replace(_OLD_COMMAND, "## [").replace("%", "%25").replace("\n", "%0A")


def _command_property(text: str) -> str:
    return _command_data(text).replace(":", "%3A").replace(",", "%2C")
