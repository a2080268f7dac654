"""Removes what killed builders left: containers on the engine, and unsafe leftovers in the cache root."""

from __future__ import annotations

import dataclasses
from typing import Any

from builder import events
from builder.run import cache_locks, maintenance, views
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.text import counted


def sweep_engine(executor: ContainerExecutor) -> None:
    """Remove containers of dead owners, and run the releases that they left. No cache and no image is needed."""
    context = executor.context
    found = executor.sweep()
    context.report.extra["containers"] = [dataclasses.asdict(container) for container in found]
    removed = sum(container.removed for container in found)
    left = f", {len(found) - removed} left" if len(found) > removed else ""
    context.console.say(f"{executor.engine.url}: {counted(removed, 'container')} of dead builders removed{left}")


def sweep(executor: ContainerExecutor) -> None:
    """Remove containers of dead owners, quarantine unsafe leftovers, and remove what was quarantined long enough."""
    context = executor.context
    containers = [dataclasses.asdict(container) for container in executor.sweep()]
    quarantined: list[dict[str, Any]] = []
    removed: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    context.report.extra.update(containers=containers, swept=quarantined, removed=removed, kept=kept)

    def on_event(event: events.Event) -> None:
        row = maintenance.row(event)
        match event:
            case events.Quarantined():
                quarantined.append(row)
                context.console.say(f"quarantined {row['family']}/{row['key']}/{row['path']}: {row['why']}")
            case events.Removed():
                removed.append(row)
                why = "it was quarantined for longer than a job may last" if row["family"] else "nothing uses it"
                context.console.say(f"removed {row['path']}: {why}")
            case events.Kept():
                kept.append(row)
                context.console.say(f"kept {row['path']}: {row['why']}")

    if not maintenance.announce_root(executor):
        return
    with cache_locks.held(executor), views.removed_unused(executor) as request:
        maintenance.run(executor, "sweep", on_event, ContainerRequest(view=request))
    more = f", {len(kept)} kept" if kept else ""
    context.console.say(f"{executor.root_name}: {len(quarantined)} quarantined, {len(removed)} removed{more}")
