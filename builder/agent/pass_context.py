"""What every pass of a recipe works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from builder.agent.compile_lock import CompileLock
from builder.agent.guard import Guard
from builder.agent.log_watch import Watch
from builder.agent.output import Output
from builder.agent.process import Child
from builder.agent.shape_forks import Imported
from builder.task import Task

SERVER_STOP_SECONDS = 15.0  # sglang 0.5.23 drains for up to 15 s


class Partial(Exception):
    """Some of the work was done, but not all. The message is the reason."""


@dataclass(frozen=True)
class PassContext:
    """What every pass works with."""

    task: Task
    env: Mapping[str, str]
    workdir: str
    output: Output
    guard: Guard
    grace: float  # seconds between SIGTERM and SIGKILL for a child
    entries: Callable[[], int]  # counts the valid entries of every claimable family
    compile_lock: CompileLock
    chunked_prefill_size: int  # of a server on the GPU here, unless its argv sets it
    imported: Imported
    on_tick: Callable[[], None] = lambda: None  # called about ten times a second
    watches: list[Watch] = field(default_factory=list)  # of all children so far, also where a pass failed

    def child(self, argv: Sequence[str], watch: Watch, *, server: bool = False) -> Child:
        """Return a child of this task, not started yet. server: it gets time to stop its own workers."""
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
            keep=lambda: self.imported.pids,
            on_tick=self.on_tick,
        )


def model_argv(task: Task, module: str) -> list[str]:
    """Return the command line that runs a module of sglang with the task's model and argv."""
    revision = [] if task.revision is None else ["--revision", task.revision]
    return ["python3", "-m", module, "--model", task.model, *revision, *task.argv]
