"""Runs a maintenance job (sweep, verify, prune, views) in a container, and passes its events on.

Also answers whether there is a cache root to work on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from builder.cache import layout
from builder.engine.container import Deadlines
from builder.errors import CANNOT_RUN, EngineLostError, PreflightError, Problem
from builder.events import FAILED, WARMED, Event
from builder.job import Mode
from builder.run import container_job, preflight
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import NOTHING_ELSE, ContainerRequest, describe
from builder.task import Task
from builder.text import duration, printable

#: Seconds for a root of a terabyte on a slow disk.
TIMEOUT = 3600.0

E = TypeVar("E", bound=Event)


def run(
    executor: ContainerExecutor,
    mode: Mode,
    on_event: Callable[[Event], None],
    request: ContainerRequest = NOTHING_ELSE,
    *,
    timeout: float = TIMEOUT,
) -> None:
    """Run the agent in this mode, and pass its events on when it has ended.

    Raises PreflightError or EngineLostError unless it succeeded; its events are passed on before.

    timeout: seconds after which it is ended.
    """
    context = executor.context
    limits = Deadlines(
        task=timeout,
        silence=timeout,
        start=context.manifest.run.start,
        grace=context.manifest.run.grace,
    )
    outcome = container_job.run(executor, mode, Task(label=mode, model="", recipe="command"), limits, request)
    for event in outcome.events:
        on_event(event)
    context.cancel.check()
    if outcome.ended == "exited" and outcome.exit_code == WARMED:
        return
    if outcome.ended == "timeout" or outcome.oom:
        cause = f"took longer than {duration(timeout)}" if outcome.ended == "timeout" else "needed too much memory"
        raise PreflightError(CANNOT_RUN, [Problem("cache", f"{mode} {cause} and was ended: it is not complete.")])
    if outcome.exit_code == FAILED:
        problem = Problem("cache", outcome.tail[-1] if outcome.tail else "it cannot be used.")
        raise PreflightError(CANNOT_RUN, [problem])
    raise EngineLostError(f"the container that was to {mode} {describe(outcome)}", notes=outcome.tail)


def has_root(executor: ContainerExecutor) -> bool:
    """Return whether there is a cache root to work on. Maintenance makes none: its name may be misspelt.

    Raises PreflightError for a directory that holds something else: it is certainly not the one that was meant.
    """
    executor.context.report.cache = executor.root_name
    if executor.cache.exists():
        with executor.cache.view(entries=False) as root:
            if foreign := layout.foreign(root):
                raise PreflightError(CANNOT_RUN, [preflight.other_content(executor.root_name, foreign)])
            return (root / "layout.json").is_file()
    return False


def announce_root(executor: ContainerExecutor) -> bool:
    """Return whether there is a cache root to work on, and report where there is none."""
    found = has_root(executor)
    if not found:
        executor.context.console.say(f"there is no cache at {executor.root_name}, so there is nothing to do in it")
    return found


def require_root(executor: ContainerExecutor) -> None:
    """Raise PreflightError where there is no cache root to look at; an empty directory or volume is none yet."""
    executor.require_root()
    if not has_root(executor):
        raise PreflightError(f"there is no cache in {executor.root_name}")


def printed(event: E) -> E:
    """Return the event with its texts made printable."""
    texts = {name: printable(value) for name, value in vars(event).items() if isinstance(value, str)}
    return replace(event, **texts)
