"""The lock with which tasks of one run compile into the same root at the same time, and each still proves its own work.

A second pass that adds nothing is a proof whatever other tasks do meanwhile, because they only add. One that seems to
add something may have seen another task's work: it is repeated while no other task compiles. A task holds one file of
the root shared while it compiles and exclusively while it must be alone, and releases it before it waits for it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.cache import layout

#: Seconds between two log lines of a task that waits: the builder ends tasks that write nothing.
REPORT_SECONDS = 15.0


class CompileLock:
    """One task's hold on the lock. Opens nothing before `acquire`. active: other tasks may compile at the same time."""

    def __init__(self, root: Path, guard: Guard, output: Output, *, active: bool) -> None:
        self._path, self._guard, self._output = layout.compiling_lock(root), guard, output
        self.active = active
        self._descriptor = -1

    def acquire(self) -> None:
        """Hold it shared, until the process ends. Raises Stopped, OSError."""
        if self.active:
            self._take(exclusive=False)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold it exclusively within the context: no other task compiles."""
        if not self.active:
            yield
            return
        self._release()
        self._take(exclusive=True)
        try:
            yield
        finally:
            self._release()
        self._take(exclusive=False)

    def _take(self, *, exclusive: bool) -> None:
        reported = time.monotonic()

        def report() -> None:
            nonlocal reported
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                reason = "until no other task compiles" if exclusive else "until another task has proven its work"
                self._output.say(f"waiting {reason}")

        self._descriptor = self._guard.acquire(self._path, exclusive=exclusive, on_wait=report)

    def _release(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
