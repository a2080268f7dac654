"""What is said about one task, and by it, so that it can be told apart from what others say at the same time.

A task that is alone speaks as it always did: its lines follow its title as they come, in GitHub Actions inside a
collapsed group. Of several side by side every line carries the task's label. GitHub's groups cannot be interleaved, so
there what a task says is kept, as far as people may want to read it, and shown as one group when the task has ended;
its log file has everything at once and in any case.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from builder.report.console import LOG_MARKS, Console

#: Lines of one task that are kept for its group. The log file has them all.
KEPT = 2000


class Voice:
    """One task's. say: a remark of ours; log: a line of its container; conclude: what became of it."""

    def __init__(self, console: Console, say: Callable[[str], None], name: str = "") -> None:
        self._console, self._say, self._name = console, say, name

    def say(self, text: str) -> None:
        self._say(f"{self._name}{text}")

    def remark(self, text: str) -> None:
        """Between the lines of its log."""
        self._say(f"  {LOG_MARKS['note']} {self._name}{text}")

    def log(self, stream: str, line: str) -> None:
        self._say(f"  {LOG_MARKS[stream]} {self._name}{line}")

    def conclude(self, text: str) -> None:
        """One sentence, that begins with its label."""
        self._say(text)

    def annotate(self, title: str, text: str) -> None:
        self._console.annotate(title, text)


class _Kept(Voice):
    """In GitHub Actions, beside others."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, self._keep)
        self._lines: deque[str] = deque(maxlen=KEPT)
        self._dropped = 0
        self._lock = threading.Lock()  # its log comes from another thread than the rest
        self._conclusions: list[str] = []
        self._annotations: list[tuple[str, str]] = []

    def _keep(self, text: str) -> None:
        with self._lock:
            self._dropped += len(self._lines) == KEPT
            self._lines.append(text)

    def conclude(self, text: str) -> None:
        self._conclusions.append(text)

    def annotate(self, title: str, text: str) -> None:
        self._annotations.append((title, text))

    def tell(self, title: str) -> None:
        """All of it, in one piece."""
        with self._lock:
            lines = list(self._lines)
        if self._dropped:
            lines.insert(0, f"the first {self._dropped} lines are in the log file only")
        self._console.collapsed(title, lines)
        for text in self._conclusions:
            self._console.say(text)
        for about, text in self._annotations:
            self._console.annotate(about, text)


@contextmanager
def speaking(console: Console, title: str, label: str, *, together: bool) -> Iterator[Voice]:
    """The voice of one task for as long as it runs. together: others may speak at the same time."""
    if not together:
        with console.group(title):
            yield Voice(console, console.say)
    elif console.github:
        console.say(f"{title} begins")
        kept = _Kept(console)
        try:
            yield kept
        finally:
            kept.tell(title)
    else:
        console.say(title)
        yield Voice(console, console.say, f"{label}: ")
