"""The tasks that run, while they run: a live line for each on a terminal, a heartbeat elsewhere, and never both.

All drawing happens in one thread, which is also the only one that loads the library for it. Text that others say is
handed to that thread and shown above the lines; what a terminal does not take in time is dropped and counted, so that
nobody ever waits for a screen.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from builder.host.deadlines import Deadline
from builder.report.console import Console
from builder.report.progress import Activity
from builder.text import clock

if TYPE_CHECKING:
    from rich.table import Table

#: Seconds between two heartbeats.
EVERY = 30.0
#: Seconds between two pictures.
FRAME = 0.1
#: Texts that wait to be shown; seconds that whoever comes with one more waits for room.
_QUEUE, _PATIENCE = 4000, 1.0
#: Seconds for the last picture.
_LAST = 2.0


class Display:
    """Use as a context manager. summary: one short sentence about the whole run, asked for with every picture."""

    def __init__(self, console: Console, summary: Callable[[], str], *, every: float | None = None) -> None:
        self._console, self._summary = console, summary
        self._every = EVERY if every is None else every
        self._began = time.monotonic()
        self._shown: list[Activity] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._screen: _Screen | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Display:
        terminal = self._console.terminal
        if terminal is not None:
            self._screen = _Screen(self._console, terminal, self.picture)
            self._console.above(self._screen.take)
        target = self._beat if self._screen is None else self._screen.run
        self._thread = threading.Thread(target=target, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._screen is not None:
            self._screen.close()
        if self._thread is not None:
            last = Deadline(_LAST)
            while self._thread.is_alive() and not last.over and not self._console.hurried:
                self._thread.join(last.within(FRAME).left())
            if self._thread.is_alive() and self._screen is not None:
                self._console.give_up()
        self._console.above(None)

    def add(self, activity: Activity) -> None:
        with self._lock:
            self._shown.append(activity)

    def remove(self, activity: Activity) -> None:
        with self._lock:
            self._shown.remove(activity)

    def picture(self) -> tuple[list[Activity], str]:
        """What runs now, and the sentence below it."""
        with self._lock:
            return list(self._shown), self._summary()

    # --- without a terminal ------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._over.wait(self._every):
            running, summary = self.picture()
            if running:
                lines = [f"  ▸ {clock(time.monotonic() - self._began)}: {summary}"]
                self._console.say("\n".join([*lines, *(f"  ▸ {activity.line()}" for activity in running)]))


class _Screen:
    """The lower end of a terminal. `run` in a thread of its own, until `close`."""

    def __init__(self, console: Console, stream: TextIO, picture: Callable[[], tuple[list[Activity], str]]) -> None:
        self._console, self._stream, self._picture = console, stream, picture
        self._texts: deque[str] = deque()
        self._dropped = 0
        self._stuck = False
        self._width = 80
        self._changed = threading.Condition()
        self._closed = False

    def take(self, text: str) -> None:
        """To be shown above the lines."""
        with self._changed:
            patience = 0.0 if self._stuck else _PATIENCE
            self._stuck = not self._changed.wait_for(lambda: len(self._texts) < _QUEUE or self._closed, patience)
            if self._stuck:
                self._dropped += 1 + self._texts.popleft().count("\n")
            self._texts.append(text)

    def close(self) -> None:
        """The rest is shown, and the lines go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        try:
            self._draw()
        except (OSError, ValueError):  # the terminal is gone
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
            console.show_cursor(True)  # whatever ends this process, the cursor is there
            over, drawn = False, None
            while not over:
                with self._changed:
                    over = self._changed.wait_for(lambda: self._closed, FRAME)
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
        running, summary = self._picture()
        return [(one.label, one.where, clock(one.seconds), "   ".join(one.parts())) for one in running], summary

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        rows, summary = self._rows()
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3 if self._width > 60 else 1, 0, 0))
        # What a task is doing is worth more than the whole of its name.
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
