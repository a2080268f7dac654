"""What people see: the one writer to a stream, with groups and annotations for GitHub Actions."""

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

#: What stands before a line of a container, of an operator's command, and before this program's remarks between them.
LOG_MARKS = {"out": "│", "err": "┃", "note": "▸", "hook": "»"}


class Console:
    """Everything people see. Colours and width only on a terminal; collapsed groups only in GitHub Actions.

    A closed stream (``| head``) ends the display and nothing else: the run and its logs go on. One that nobody reads
    (``| less``) is waited for, but not by who wants to go: hurried. Every method may be called from any thread.
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
        """One or more lines. Whatever they hold, none is a command for GitHub's runner."""
        self._write(harmless(text) if self.github else text)

    @property
    def terminal(self) -> TextIO | None:
        """The stream, where it is a terminal that can be drawn on, and no log of GitHub's that somebody reads later."""
        return self._stream if self._terminal and not self.github and not self.closed else None

    def above(self, take: Callable[[str], None] | None) -> None:
        """From now on text goes to whoever draws on the terminal, and shows it above that; None: nobody does now."""
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
                # What the stream's encoding does not have is escaped: it is no reason to fall silent.
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
        """Nobody reads it, and there is no time to wait for somebody."""
        self.closed = self.stuck = True

    @property
    def hurried(self) -> bool:
        """Whether somebody wants to go, and has waited for readers long enough."""
        return self._hurried()

    def log(self, stream: str, line: str) -> None:
        """One line of a container. The mark before it keeps it apart from ours."""
        self.say(f"  {LOG_MARKS[stream]} {line}")

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """What is said inside belongs to this title; collapsed in GitHub Actions."""
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
        """A group in one piece, whatever else is said at the time."""
        inside = "".join(f"{harmless(line)}\n" for line in lines)
        self._write(f"::group::{_command_data(title)}\n{inside}::endgroup::")

    def annotate(self, title: str, text: str, level: str = "error") -> None:
        """An error or a warning that GitHub Actions shows on the run's page; nothing elsewhere, where the table says
        it.
        """
        if self.github:
            self._write(f"::{level} title={_command_property(title)}::{_command_data(text)}")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Mapping[str, str] = STATE_STYLE
    ) -> None:
        """Write a table: folded and coloured on a terminal, one row a line in a pipe."""
        width, codes = (self._width, styles) if self._terminal else (None, None)
        self.say(tables.table(columns, rows, width=width, styles=codes))


#: The older form of a command counts anywhere in a line; the newer one at its beginning, and blanks do not.
_OLD_COMMAND = "##["


_COMMAND = re.compile(r"(^|\r)(\s*)::", re.MULTILINE)


def harmless(text: str) -> str:
    """As it was to people, and nothing to GitHub's runner."""
    return _COMMAND.sub(r"\1\2: :", text.replace(_OLD_COMMAND, "## ["))


def _command_data(text: str) -> str:
    """Escaped as GitHub's runner unescapes it."""
    return text.replace(_OLD_COMMAND, "## [").replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _command_property(text: str) -> str:
    return _command_data(text).replace(":", "%3A").replace(",", "%2C")
