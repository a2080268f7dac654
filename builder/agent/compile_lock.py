"""Tasks of one run that compile into the same root at the same time, and how each of them still proves its own work.

A pass that adds nothing is a proof whatever others do meanwhile, because they only ever add. One that seems to add
something may have seen a neighbour's work: then it is done again while nobody else compiles. Whoever compiles holds one
file of the root shared, whoever has to be undisturbed holds it exclusively, and nobody holds it while he waits for it.
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

#: Seconds between two words of one who waits: who says nothing is taken for dead.
SAY_SECONDS = 15.0


class Beside:
    """One task among its neighbours. active: whether there may be any. Nothing is opened before `begin`."""

    def __init__(self, root: Path, guard: Guard, output: Output, *, active: bool) -> None:
        self._path, self._guard, self._output = layout.compiling_lock(root), guard, output
        self.active = active
        self._descriptor = -1

    def begin(self) -> None:
        """From now on this task compiles, until its process ends. Raises Stopped, OSError."""
        if self.active:
            self._hold(exclusive=False)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Nobody else compiles while the context is."""
        if not self.active:
            yield
            return
        self._let_go()
        self._hold(exclusive=True)
        try:
            yield
        finally:
            self._let_go()
        self._hold(exclusive=False)

    def _hold(self, *, exclusive: bool) -> None:
        said = time.monotonic()

        def wait() -> None:
            nonlocal said
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                what = "until no other task compiles" if exclusive else "until another task has proven its work"
                self._output.say(f"waiting {what}")

        self._descriptor = self._guard.acquire(self._path, exclusive=exclusive, on_wait=wait)

    def _let_go(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
