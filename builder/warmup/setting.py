"""What every pass of a recipe works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from builder.warmup import flags
from builder.warmup.child import Child
from builder.warmup.guard import Guard
from builder.warmup.output import Output
from builder.warmup.task import Task
from builder.warmup.watch import Watch


class Partial(Exception):
    """Something was warmed, and not all of it. The message is the reason."""


@dataclass(frozen=True)
class Setting:
    """What every pass works with.

    entries: counts the valid entries of every claimable family. on_tick: called about ten times a second. watches: of
    the children so far, for whoever reports what a pass that failed had seen.
    """

    task: Task
    env: Mapping[str, str]
    workdir: str
    output: Output
    guard: Guard
    grace: float
    entries: Callable[[], int]
    on_tick: Callable[[], None] = lambda: None
    watches: list[Watch] = field(default_factory=list)

    def child(self, argv: Sequence[str], watch: Watch, *, grace: float | None = None) -> Child:
        """A child of this task, not started yet."""
        self.watches.append(watch)
        return Child(
            argv,
            env=self.env,
            cwd=self.workdir,
            output=self.output,
            watch=watch,
            guard=self.guard,
            grace=self.grace if grace is None else grace,
            on_tick=self.on_tick,
        )


def model_argv(task: Task, module: str) -> list[str]:
    words = list(task.argv)
    if task.load == "dummy":
        words = flags.with_dummy_weights(words, task.layers)
    revision = [] if task.revision is None else ["--revision", task.revision]
    return ["python3", "-m", module, "--model", task.model, *revision, *words]
