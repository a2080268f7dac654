"""The only writer to the output stream, with groups and annotations for GitHub Actions."""

from __future__ import annotations

import os
import re
import select
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from builder.report import tables
from builder.report.tables import STATE_STYLE

#: The mark before a line of a container, of an operator's hook, and of this program between those.
LOG_MARKS = {"out": "│", "err": "┃", "note": "▸", "hook": "»"}


class Console:
    """Write lines, tables, groups and annotations. All methods are thread-safe.

    Colours and folding only on a terminal; collapsed groups only in GitHub Actions. A closed stream (``| head``) ends
    the display; the run and its logs continue. A full pipe without reader (``| less``) blocks until ``hurried()``.
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
        self.verbose = verbose
        self.closed = False
        self.stuck = False

    def say(self, text: str = "") -> None:
        """Write one or more lines; in GitHub Actions escape everything that the runner takes for a command."""
        self._write(harmless(text) if self.github else text)

    @property
    def terminal(self) -> TextIO | None:
        """Return the stream if it is a terminal that live lines can be drawn on, else None."""
        return self._stream if self._terminal and not self.github and not self.closed else None

    def above(self, take: Callable[[str], None] | None) -> None:
        """Pass all further text to ``take``, which draws it above its live lines; None: write it here again."""
        self._above = take

    def _write(self, text: str) -> None:
        take = self._above
        if take is not None and not self.closed:
            take(text)
            return
        with self._lock:
            if self.closed:
                return
            try:
                # Characters that the stream's encoding lacks are escaped: an error would end all output.
                encoding = getattr(self._stream, "encoding", None) or "utf-8"
                self._put(text.encode(encoding, "backslashreplace").decode(encoding) + "\n", encoding)
            except (OSError, ValueError):
                self.closed = True

    def _put(self, text: str, encoding: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # a stream of Python's own, or a closed one
            self._stream.write(text)
            self._stream.flush()
            return
        poller, data = select.poll(), memoryview(text.encode(encoding))
        poller.register(descriptor, select.POLLOUT)
        while data:
            while not poller.poll(100):
                if self._hurried():
                    self.give_up()
                    return
            data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]

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
        inside = "".join(f"{harmless(line)}\n" for line in lines)
        self._write(f"::group::{_command_data(title)}\n{inside}::endgroup::")

    def annotate(self, title: str, text: str, level: str = "error") -> None:
        """Add an annotation to the run's page in GitHub Actions; nothing elsewhere. level: ``error`` or ``warning``."""
        if self.github:
            self._write(f"::{level} title={_command_property(title)}::{_command_data(text)}")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Mapping[str, str] = STATE_STYLE
    ) -> None:
        """Write a table: folded and coloured on a terminal, one row a line in a pipe."""
        width, codes = (self._width, styles) if self._terminal else (None, None)
        self.say(tables.table(columns, rows, width=width, styles=codes))


#: The older form of a command counts anywhere in a line; the newer one at its start, after optional blanks.
_OLD_COMMAND = "##["


_COMMAND = re.compile(r"(^|\r)(\s*)::", re.MULTILINE)


def harmless(text: str) -> str:
    """Return text that looks the same and that GitHub's runner does not take for a command."""
    return _COMMAND.sub(r"\1\2: :", text.replace(_OLD_COMMAND, "## ["))


def _command_data(text: str) -> str:
    """Escape the data of a workflow command."""
    return text.replace(_OLD_COMMAND, "## [").replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _command_property(text: str) -> str:
    return _command_data(text).replace(":", "%3A").replace(",", "%2C")
