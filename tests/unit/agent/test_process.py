"""Waiting for a child process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from builder.agent.process import Child


class EndsBetweenTwoLooks(Child):
    """Runs at the first look and has ended at every later one."""

    def __init__(self) -> None:
        nothing: Any = SimpleNamespace(check=lambda: None, full=False, crash=None)
        super().__init__(["x"], env={}, cwd="/", output=nothing, watch=nothing, guard=nothing, grace=0.0)
        self.looks = 0
        self.copied = False

    @property
    def ended(self) -> bool:
        self.looks += 1
        return self.looks > 1

    def _drained(self) -> None:
        self.copied = True


def test_wait_ended_returns_after_the_output_is_copied() -> None:
    child = EndsBetweenTwoLooks()
    cast("Child", child).wait_ended()
    assert child.copied
