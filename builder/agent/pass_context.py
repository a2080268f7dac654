"""What every pass of a recipe works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from builder.agent.compile_lock import Beside
from builder.agent.guard import Guard
from builder.agent.log_watch import Watch
from builder.agent.output import Output
from builder.agent.process import Child
from builder.task import Task


class Partial(Exception):
    """Something was warmed, and not all of it. The message is the reason."""


SERVER_STOP_SECONDS = 15.0  # sglang 0.5.23 drains for up to 15 s


@dataclass(frozen=True)
class Setting:
    """What every pass works with.

    entries: counts the valid entries of every claimable family. on_tick: called about ten times a second. watches: of
    the children so far, for whoever reports what a pass that failed had seen. beside: the neighbours.
    """

    task: Task
    env: Mapping[str, str]
    workdir: str
    output: Output
    guard: Guard
    grace: float
    entries: Callable[[], int]
    beside: Beside
    on_tick: Callable[[], None] = lambda: None
    watches: list[Watch] = field(default_factory=list)

    def child(self, argv: Sequence[str], watch: Watch, *, server: bool = False) -> Child:
        """A child of this task, not started yet. A server gets the time, and the peace, to stop by itself."""
        self.watches.append(watch)
        return Child(
            argv,
            env=self.env,
            cwd=self.workdir,
            output=self.output,
            watch=watch,
            guard=self.guard,
            grace=SERVER_STOP_SECONDS if server else self.grace,
            gentle=server,
            on_tick=self.on_tick,
        )


def model_argv(task: Task, module: str) -> list[str]:
    revision = [] if task.revision is None else ["--revision", task.revision]
    return ["python3", "-m", module, "--model", task.model, *revision, *task.argv]
