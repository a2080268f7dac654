"""One container on an errand in the cache root: what it did is told by its events, and it ends well or that is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builder.engine.container import Deadlines
from builder.errors import CANNOT_RUN, EngineLostError, PreflightError, Problem
from builder.events import FAILED, WARMED, Event
from builder.job import Mode
from builder.run import container_job
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import NOTHING_ELSE, ContainerRequest, describe
from builder.task import Task
from builder.text import printable

#: A root of a terabyte on a slow disk; a container that says nothing for so long hangs. Seconds.
TIMEOUT = 3600.0


def run(
    executor: ContainerExecutor, mode: Mode, hear: Callable[[Event], None], request: ContainerRequest = NOTHING_ELSE
) -> None:
    """This mode to its end, and what it told. Raises what kept it from ending well."""
    context = executor.context
    limits = Deadlines(
        task=TIMEOUT,
        silence=TIMEOUT,
        start=context.manifest.run.start,
        grace=context.manifest.run.grace,
    )
    outcome = container_job.run(executor, mode, Task(label=mode, model="", recipe="command"), limits, request)
    for event in outcome.events:
        hear(event)
    context.cancel.check()
    if outcome.ended == "exited" and outcome.exit_code == WARMED:
        return
    if outcome.exit_code == FAILED:
        problem = Problem("cache", outcome.tail[-1] if outcome.tail else "it cannot be used.")
        raise PreflightError(CANNOT_RUN, [problem])
    raise EngineLostError(f"the container that was to {mode} {describe(outcome)}", notes=outcome.tail)


def is_there(executor: ContainerExecutor) -> bool:
    """Whether there is a cache root to work on; nothing here makes one where somebody mistyped a name."""
    executor.context.report.cache = executor.cache.name
    if executor.cache.exists():
        with executor.cache.view(entries=False) as root:
            if (root / "layout.json").is_file():
                return True
    return False


def row(event: Event) -> dict[str, Any]:
    """Return the event's fields, with texts made printable."""
    return {name: printable(value) if isinstance(value, str) else value for name, value in vars(event).items()}
