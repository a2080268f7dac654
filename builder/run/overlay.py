"""Views as the engine has them: volumes with the labels of a view, and which of them nobody needs any more."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

from builder.engine.api import Volume
from builder.engine.lease import LABEL
from builder.errors import EngineRefusedError
from builder.events import Event, ViewState
from builder.job import ViewRequest
from builder.run import cache_locks, maintenance
from builder.run.container_executor import ContainerExecutor

#: Labels of a view's volume: its name, and the cache root that it is a view of.
LABEL_VIEW, LABEL_ROOT = LABEL + "view", LABEL + "view-of"


def volume_name(executor: ContainerExecutor, job: str) -> str:
    """One engine may have views of several roots."""
    return f"warm-cache-view-{hashlib.sha256(executor.cache.name.encode()).hexdigest()[:8]}-{job}"


def engine_id(executor: ContainerExecutor) -> str:
    return str(executor.engine.info.get("ID") or "")


def volumes(executor: ContainerExecutor) -> list[Volume]:
    """Of this root's views on this engine."""
    found = executor.engine.volumes(f"{LABEL_ROOT}={executor.cache.name}")
    return sorted((volume for volume in found if LABEL_VIEW in volume.labels), key=lambda volume: volume.name)


def looked(executor: ContainerExecutor) -> list[Event]:
    found: list[Event] = []
    maintenance.run(executor, "view-list", found.append)
    return found


@contextlib.contextmanager
def swept(executor: ContainerExecutor) -> Iterator[ViewRequest]:
    """Removes the volumes of views that no container has, and that nobody wrote to for longer than a job may last. What
    the sweep's container is told: which views still have a volume, so that the others' layers may go.
    """
    with cache_locks.views(executor):
        mine = {volume.labels[LABEL_VIEW]: volume.name for volume in volumes(executor)}
        found = looked(executor) if mine else []
        idle = {event.view: event.idle for event in found if isinstance(event, ViewState)}
        keep = []
        for job, volume in mine.items():
            if executor.engine.users(volume) or idle.get(job, float("inf")) < executor.context.manifest.cache.job_max:
                keep.append(job)
                continue
            try:
                executor.engine.remove_volume(volume)
            except EngineRefusedError:
                keep.append(job)  # a job was faster
        yield ViewRequest(engine=engine_id(executor), keep=tuple(keep))
