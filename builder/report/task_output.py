"""The output of one task, kept apart from the output of tasks that run at the same time.

A task that runs alone: its lines follow its title as they arrive, in GitHub Actions inside a collapsed group. Several
at once: every line carries the task's label. Groups of GitHub Actions cannot be interleaved, so there the lines are
buffered (the last KEPT of them) and written as one group at the end of the task; its log file has every line at once.
The end of a log is repeated below a collapsed group only: elsewhere it is in sight already.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from builder.report.console import LOG_MARKS, Console

#: Lines of one task that are kept for its group. The log file has them all.
KEPT = 2000


class TaskOutput:
    """Write the lines of one task, each behind ``name``."""

    def __init__(self, console: Console, say: Callable[[str], None], name: str = "") -> None:
        self._console, self._say, self._name = console, say, name

    def say(self, text: str) -> None:
        """Write a line of this program."""
        self._say(f"{self._name}{text}")

    def remark(self, text: str) -> None:
        """Write a line of this program between the lines of the task's log."""
        self._say(f"  {LOG_MARKS['note']} {self._name}{text}")

    def log(self, stream: str, line: str) -> None:
        """Write a line of the task's log. stream: a key of LOG_MARKS."""
        self._say(f"  {LOG_MARKS[stream]} {self._name}{line}")

    def finish(self, text: str, tail: Sequence[str] = ()) -> None:
        """Write the result: one sentence that begins with the task's label. tail: the last lines of its log."""
        self._say(text)


class _FoldedOutput(TaskOutput):
    """Keep the result and the end of the log for below the task's collapsed group."""

    def __init__(self, console: Console, say: Callable[[str], None]) -> None:
        super().__init__(console, say)
        self._results: list[tuple[str, Sequence[str]]] = []

    def finish(self, text: str, tail: Sequence[str] = ()) -> None:
        self._results.append((text, tail))

    def flush(self) -> None:
        """Write what was kept. Called when the group is closed."""
        for text, tail in self._results:
            lines = [f"the last {'line' if len(tail) == 1 else f'{len(tail)} lines'} of its log:"] if tail else []
            lines += [f"  {LOG_MARKS['out']} {line}" for line in tail]
            self._console.say("\n".join([text, *lines]))


class _BufferedOutput(_FoldedOutput):
    """Buffer the lines too, for one group of GitHub Actions at the end."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, self._keep)
        self._title = title
        self._lines: deque[str] = deque(maxlen=KEPT)
        self._dropped = 0
        self._lock = threading.Lock()  # log lines and everything else are added by two threads

    def _keep(self, text: str) -> None:
        with self._lock:
            self._dropped += len(self._lines) == KEPT
            self._lines.append(text)

    def flush(self) -> None:
        with self._lock:
            lines = list(self._lines)
        if self._dropped:
            lines.insert(0, f"the first {self._dropped} lines are in the log file only")
        self._console.collapsed(self._title, lines)
        super().flush()


@contextlib.contextmanager
def open_output(console: Console, title: str, label: str, *, concurrent: bool) -> Iterator[TaskOutput]:
    """Yield the output of one task for as long as it runs. concurrent: other tasks may run at the same time."""
    if not console.github:
        console.say(title)
        yield TaskOutput(console, console.say, f"{label}: " if concurrent else "")
        return
    if concurrent:
        console.say(f"{title} begins")
    output = _BufferedOutput(console, title) if concurrent else _FoldedOutput(console, console.say)
    try:
        with contextlib.nullcontext() if concurrent else console.group(title):
            yield output
    finally:
        output.flush()
