"""What a run tells: live lines, the table at the end, and one JSON document for machines."""

from __future__ import annotations

import io
import json
import os
import re
import select
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from builder.cache import markers
from builder.errors import BuilderError, ProblemsError
from builder.report import tables
from builder.run.plan import Item, Plan
from builder.text import duration, printable, size

JSON_SCHEMA = 1


@dataclass
class TaskResult:
    """What became of one task. seconds is None for a task that nothing was done for. loaded: the weights it was warmed
    with, where it has a model (``weights``, ``dummy weights, 4 layers``). reservation: what has to be said wherever it
    is called warm.
    """

    label: str
    model: str
    key: str
    state: str
    reason: str = ""
    seconds: float | None = None
    entries: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    added_bytes: Mapping[str, int] = field(default_factory=dict)
    loaded: str = ""
    verified: bool = False
    proof: str | None = None
    since: str = ""
    reservation: str = ""
    log: str | None = None
    tail: Sequence[str] = ()

    @property
    def note(self) -> str:
        """The last column of the table."""
        parts = [self.reason]
        if self.state == "warm":
            parts.insert(0, f"since {self.since}" if self.since else "")
        if self.state == "warm":
            parts.append(self.reservation)
        if self.state in ("warm", "warmed") and self.loaded not in ("", "weights"):
            parts.append(f"with {self.loaded}")
        return ", ".join(part for part in parts if part)

    @property
    def proven(self) -> str | None:
        """How it is known that this task is warm; None where it is not."""
        return self.proof if self.state in ("warm", "warmed") else None


def result_of(item: Item, state: str, reason: str = "", **more: Any) -> TaskResult:
    return TaskResult(item.task.label, item.task.model, item.key, state, reason, **more)


def before(item: Item) -> TaskResult:
    """A task's result before anything is done for it: what its marker says."""
    marker: Mapping[str, Any] = item.judgement.marker or {}
    if not item.warm:
        return result_of(item, "cold", item.judgement.reason)
    entries = marker.get("entries")
    return result_of(
        item,
        "warm",
        entries={name: len(names) for name, names in entries.items()} if isinstance(entries, dict) else {},
        proof=marker.get("proof"),
        verified=marker.get("proof") == "verified",
        since=str(marker.get("written", ""))[:10],
        loaded=_loaded(marker),
        reservation=markers.reservation(marker),
    )


def _loaded(marker: Mapping[str, Any]) -> str:
    """A marker may hold anything."""
    observed = marker.get("observed")
    loaded = observed.get("loaded") if isinstance(observed, dict) else None
    return printable(loaded)[:60] if isinstance(loaded, str) else ""


@dataclass
class Report:
    """One run's result; complete at every moment, so that an interrupted run has its report too."""

    verb: str | None
    image_ref: str = ""
    image_id: str | None = None
    toolchain: str | None = None
    cache: str = ""
    tasks: list[TaskResult] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    #: What a verb prints on stdout, where its result is text.
    text: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def planned(self, plan: Plan) -> None:
        """The tasks as a run that has done nothing yet has them."""
        self.tasks = [before(item) for item in plan.items]
        said = {task.reservation: None for task in self.tasks if task.reservation}
        for reservation in said:
            labels = ", ".join(task.label for task in self.tasks if task.reservation == reservation)
            if (warning := f"{labels}: {reservation}") not in self.warnings:
                self.warnings.append(warning)

    def settle(self, result: TaskResult) -> None:
        """Puts a task's result in the place of its plan."""
        self.tasks[[task.label for task in self.tasks].index(result.label)] = result

    def of(self, label: str) -> TaskResult:
        """The result of this task so far."""
        return next(task for task in self.tasks if task.label == label)

    def count(self, *states: str) -> int:
        """How many tasks are in one of these states."""
        return sum(task.state in states for task in self.tasks)

    def document(self, exit_code: int, error: BuilderError | None) -> str:
        """The one document that ``--json`` prints."""
        data: dict[str, Any] = {
            "schema": JSON_SCHEMA,
            "verb": self.verb,
            "exit": exit_code,
            "image": {"ref": self.image_ref, "id": self.image_id},
            "toolchain": self.toolchain,
            "cache": self.cache,
            "tasks": [
                {
                    "model": task.model,
                    "label": task.label,
                    "key": task.key,
                    "state": task.state,
                    "reason": task.reason,
                    "seconds": None if task.seconds is None else round(task.seconds, 3),
                    "entries": dict(task.entries),
                    "entries_added": sum(task.added.values()),
                    "added": {name: number for name, number in task.added.items() if number},
                    "added_bytes": dict(task.added_bytes),
                    "loaded": task.loaded or None,
                    "verified": task.verified and task.proven is not None,
                    "reservation": task.reservation or None,
                    "proof": task.proven,
                    "log": task.log,
                }
                for task in self.tasks
            ],
            "gpus": self.gpus,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            **self.extra,
        }
        if error is not None:
            data["error"] = {"message": error.message}
            if isinstance(error, ProblemsError):
                data["error"]["problems"] = [
                    {"place": problem.place, "text": problem.text, "remedy": problem.remedy}
                    for problem in error.problems
                ]
        # The same document for everybody but GitHub's runner, which takes this for a command wherever it stands.
        return json.dumps(data, indent=2).replace("##[", "##\\u005b")


def families(counts: Mapping[str, int], sign: str = "", sizes: Mapping[str, int] | None = None) -> str:
    """``+518 deep_gemm (51.2 MB), +3 triton (40.1 kB)``; an en dash for nothing."""
    sizes = sizes or {}
    return (
        ", ".join(
            f"{sign}{number} {name}" + (f" ({size(sizes[name])})" if name in sizes else "")
            for name, number in sorted(counts.items())
            if number
        )
        or "–"
    )


STATE_STYLE = {
    "warm": "green",
    "warmed": "green",
    "cold": "yellow",
    "partial": "yellow",
    "skipped": "yellow",
    "failed": "red",
}


def task_table(tasks: Sequence[TaskResult]) -> list[list[str]]:
    """Rows of the table at the end of a run."""
    rows = []
    for task in tasks:
        proven = task.proven or "–"
        if task.proven is not None and task.verified:
            proven = "0 new" if task.state == "warmed" else "yes"
        entries = families(task.added, "+", task.added_bytes) if any(task.added.values()) else families(task.entries)
        rows.append([task.label, task.state, duration(task.seconds), entries, proven, task.note])
    return rows


TASK_COLUMNS = ("task", "state", "time", "entries", "verified", "note")


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
        """A table that wraps on a terminal, and keeps one row a line in a pipe."""
        try:
            from rich.console import Console as RichConsole
            from rich.table import Table
            from rich.text import Text
        except ImportError:  # inside a test job nothing is installed for this program's sake
            self.say(tables.table(columns, rows))
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in columns:
            table.add_column(name, overflow="fold", no_wrap=not self._terminal)
        for row in rows:
            styled = (styles.get(cell, "") if name == "state" else "" for name, cell in zip(columns, row, strict=True))
            table.add_row(*(Text(cell, style=style) for cell, style in zip(row, styled, strict=True)))
        buffer = io.StringIO()
        # A pipe has no width: rows are as long as they need to be, so that grep finds whole sentences.
        width = self._width if self._terminal else 1000
        console = RichConsole(
            file=buffer, force_terminal=self._terminal, width=width, highlight=False, legacy_windows=False
        )
        console.print(table)
        self.say("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()))


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
