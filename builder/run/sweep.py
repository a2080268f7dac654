"""Removes what killed builders left: containers on the engine, and unsafe leftovers in the cache root."""

from __future__ import annotations

from dataclasses import dataclass, field

from builder import events
from builder.engine.sweep import OTHERS_AGE, Swept, kept_for_others
from builder.report.results import Section
from builder.run import cache_locks, maintenance, views
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.text import counted


@dataclass
class SweptContainers(Section):
    """Containers of dead owners."""

    containers: list[Swept]


@dataclass
class SweptRoot(Section):
    """What was done below the cache root."""

    swept: list[events.Quarantined] = field(default_factory=list)
    removed: list[events.Removed] = field(default_factory=list)
    kept: list[events.Kept] = field(default_factory=list)


def sweep_engine(executor: ContainerExecutor) -> None:
    """Remove containers of dead owners, and run the releases that they left. No cache and no image is needed."""
    context = executor.context
    found = executor.sweep()
    context.report.add(SweptContainers(found))
    removed = sum(container.removed for container in found)
    left = f", {len(found) - removed} left" if len(found) > removed else ""
    context.console.say(f"{executor.engine.url}: {counted(removed, 'container')} of dead builders removed{left}")
    _say_kept(executor)


def sweep(executor: ContainerExecutor) -> None:
    """Remove containers of dead owners, quarantine unsafe leftovers, and remove what was quarantined long enough."""
    context = executor.context
    found = SweptRoot()
    context.report.add(SweptContainers(executor.sweep()))
    context.report.add(found)

    def on_event(event: events.Event) -> None:
        match event := maintenance.printed(event):
            case events.Quarantined():
                found.swept.append(event)
                context.console.say(f"quarantined {event.family}/{event.key}/{event.path}: {event.why}")
            case events.Removed():
                found.removed.append(event)
                why = "it was quarantined for longer than a job may last" if event.family else "nothing uses it"
                context.console.say(f"removed {event.path}: {why}")
            case events.Kept():
                found.kept.append(event)
                context.console.say(f"kept {event.path}: {event.why}")

    if not maintenance.announce_root(executor):
        return
    with cache_locks.held(executor), views.removed_unused(executor) as request:
        maintenance.run(executor, "sweep", on_event, ContainerRequest(view=request))
    more = f", {len(found.kept)} kept" if found.kept else ""
    context.console.say(f"{executor.root_name}: {len(found.swept)} quarantined, {len(found.removed)} removed{more}")
    _say_kept(executor)


def _say_kept(executor: ContainerExecutor) -> None:
    context = executor.context
    others = kept_for_others(context.options.state_dir, executor.engine.identity)
    if others:
        context.console.say(
            f"{counted(len(others), 'lease')} of dead builders kept for other engines (first: {others[0]}): a sweep "
            f"with DOCKER_HOST set to theirs removes them, and any sweep after {OTHERS_AGE / 86400:.0f} days"
        )
