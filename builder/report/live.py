"""Progress of running tasks: one live line per task on a terminal, a heartbeat line elsewhere.

One thread draws, and only that thread imports rich. Text of other threads is queued and drawn above the live lines;
what the terminal does not take in time is dropped and counted, so that no task waits for a slow screen.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

from builder.host.deadlines import Deadline
from builder.report.console import Console
from builder.report.progress import TaskProgress
from builder.text import duration

if TYPE_CHECKING:
    from rich.table import Table

#: Seconds between two heartbeats.
EVERY = 30.0
#: Seconds between two frames.
FRAME = 0.1
#: Texts that may wait to be drawn; seconds that a writer waits for room in the full queue.
_QUEUE, _PATIENCE = 4000, 1.0
#: Seconds for the last frame.
_LAST = 2.0


class LiveProgress:
    """Show running tasks; a context manager. summary: returns one short sentence about the whole run, per frame."""

    def __init__(self, console: Console, summary: Callable[[], str], *, every: float | None = None) -> None:
        self._console, self._summary = console, summary
        self._every = EVERY if every is None else every
        self._began = time.monotonic()
        self._shown: list[TaskProgress] = []
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._screen: _Screen | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LiveProgress:
        terminal = self._console.terminal
        if terminal is not None and find_spec("rich"):  # not installed inside a test job
            self._screen = _Screen(self._console, terminal, self.frame)
            self._console.above(self._screen.take)
        target = self._beat if self._screen is None else self._screen.run
        self._thread = threading.Thread(target=target, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._finished.set()
        if self._screen is not None:
            self._screen.close()
        if self._thread is not None:
            last = Deadline(_LAST)
            while self._thread.is_alive() and not last.expired and not self._console.hurried:
                self._thread.join(last.within(FRAME).left())
            if self._thread.is_alive() and self._screen is not None:
                self._console.give_up()
        self._console.above(None)

    def add(self, task: TaskProgress) -> None:
        with self._lock:
            self._shown.append(task)

    def remove(self, task: TaskProgress) -> None:
        with self._lock:
            self._shown.remove(task)

    def frame(self) -> tuple[list[TaskProgress], str]:
        """Return the running tasks and the summary."""
        with self._lock:
            return list(self._shown), self._summary()

    # --- without a terminal ------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._finished.wait(self._every):
            running, summary = self.frame()
            if running:
                lines = [f"  ▸ {duration(time.monotonic() - self._began)}: {summary}"]
                self._console.say("\n".join([*lines, *(f"  ▸ {task.line()}" for task in running)]))


class _Screen:
    """Draw the live lines at the bottom of a terminal. Call `run` in a thread; it returns after `close`."""

    def __init__(self, console: Console, stream: TextIO, frame: Callable[[], tuple[list[TaskProgress], str]]) -> None:
        self._console, self._stream, self._frame = console, stream, frame
        self._texts: deque[str] = deque()
        self._dropped = 0
        self._stuck = False
        self._width = 80
        self._changed = threading.Condition()
        self._closed = False

    def take(self, text: str) -> None:
        """Queue text to be drawn above the live lines."""
        with self._changed:
            patience = 0.0 if self._stuck else _PATIENCE
            self._stuck = not self._changed.wait_for(lambda: len(self._texts) < _QUEUE or self._closed, patience)
            if self._stuck:
                self._dropped += 1 + self._texts.popleft().count("\n")
            self._texts.append(text)

    def close(self) -> None:
        """Draw the queued text and remove the live lines."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        try:
            self._draw()
        except (OSError, ValueError):  # the terminal was closed
            self._console.closed = True

    def _draw(self) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live
        from rich.text import Text

        console = RichConsole(file=self._stream, force_terminal=True, highlight=False, legacy_windows=False)
        live = Live(
            get_renderable=self._table,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with live:
            console.show_cursor(True)  # a killed process must not leave a terminal without cursor
            closed, drawn = False, None
            while not closed:
                with self._changed:
                    closed = self._changed.wait_for(lambda: self._closed, FRAME)
                    texts = list(self._texts)
                    self._texts.clear()
                    if self._dropped:
                        texts.append(f"  ▸ {self._dropped} lines not shown; the log file has them")
                        self._dropped = 0
                    self._changed.notify_all()
                if texts:
                    console.print(Text.from_ansi("\n".join(texts)), soft_wrap=True)
                rows = self._rows()
                self._width = console.width
                if texts or rows != drawn:
                    drawn = rows
                    live.refresh()

    def _rows(self) -> tuple[list[tuple[str, ...]], str]:
        running, summary = self._frame()
        return [(one.label, one.where, duration(one.seconds), "   ".join(one.parts())) for one in running], summary

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        rows, summary = self._rows()
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3 if self._width > 60 else 1, 0, 0))
        # The progress of a task matters more than its whole label.
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(8, self._width // 3))
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for label, *others in rows:
            table.add_row(Text(label, style="bold"), *map(Text, others))
        grid = Table.grid()
        grid.add_row(table)
        grid.add_row(Text(summary, style="dim", no_wrap=True, overflow="ellipsis"))
        return grid
