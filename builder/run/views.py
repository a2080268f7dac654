"""Views: a test job's own writable overlay above the warm cache, so that nothing it runs changes what others trust.

The builder holds the lock of all views around every step; containers make and remove what lies below the root, and the
engine mounts it as a volume of the overlay kind when a job starts. The order of steps is such that a kill between two
of them leaves something that the next one sees through: layers without a volume are a killed builder's, and a volume is
made when all that it names is there.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from builder import events
from builder.cache.findings import KINDS, Audit, Finding
from builder.engine.api import Mount
from builder.errors import (
    CANNOT_RUN,
    BusyError,
    ColdError,
    EngineLostError,
    EngineRefusedError,
    PreflightError,
    Problem,
    UsageError,
)
from builder.events import Event
from builder.job import MERGED, ViewRequest
from builder.report.console import Console
from builder.run import cache_locks, job_environment, maintenance, overlay
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.task import Shape
from builder.text import age, did_you_mean, printable, size

#: What the mount options of an overlay cannot hold, and the length that the kernel takes.
_TORN = ",:\\"
_MOST_OPTIONS = 4000
#: Without these every layer says all that was done in it: no renamed directories, no files without their content.
_PLAIN = "redirect_dir=off,metacopy=off,index=off"


# --- create ----------------------------------------------------------------------------------------------------------


def create(executor: ContainerExecutor, job: str, *, replace: bool) -> None:
    """Make a view, and report the arguments of docker run that give it to a job."""
    context = executor.context
    cache = context.manifest.cache
    # Whatever can be wrong is found before anything is made.
    if not maintenance.is_there(executor):
        raise ColdError(f"{executor.cache.name} does not exist: nothing is warm there yet")
    volume, place = overlay.volume_name(executor, job), _place(executor)
    mounts = [f"type=volume,src={volume},dst={cache.mount},volume-nocopy"]
    text, document = (job_environment.render(executor, form, mounts) for form in ("docker", "json"))
    generation = ""

    def hear(event: Event) -> None:
        nonlocal generation
        match event:
            case events.ViewState():
                generation = event.generation
            case events.FamilyOmitted():
                omitted = maintenance.row(event)
                context.report.warnings.append(
                    f"{omitted['family']}/{omitted['key']} is not in the view: {omitted['why']}. What a job needs of "
                    "it is compiled in the view"
                )

    with cache_locks.views(executor):
        _make_room(executor, job, volume, replace)
        order = ViewRequest(job, overlay.engine_id(executor))
        maintenance.run(executor, "view-create", hear, ContainerRequest(view=order))
        try:
            executor.engine.create_volume(
                volume,
                options=_options(place, generation, job),
                labels={overlay.LABEL_VIEW: job, overlay.LABEL_ROOT: executor.cache.name},
            )
            _prove(executor, volume)
        except BaseException:
            with context.cancel.shield(), contextlib.suppress(EngineLostError, PreflightError):
                executor.engine.remove_volume(volume)
                maintenance.run(executor, "view-drop", lambda event: None, ContainerRequest(view=order))
            raise
    cold = [task.label for task in context.report.tasks if task.state == "cold"]
    if cold:
        context.report.warnings.append(f"cold, so that a job compiles it in its view: {', '.join(cold)}")
    context.report.text = text
    generation = printable(generation)
    context.report.extra.update(job=job, volume=volume, generation=generation, docker=json.loads(document))
    context.console.say(f"the view {job} of {executor.cache.name} lies on generation {generation}, volume {volume}")


def _place(executor: ContainerExecutor) -> str:
    """The root's path on the engine's host, which is where the engine mounts from. Raises PreflightError where an
    overlay cannot name it.
    """
    cache = executor.context.manifest.cache
    if cache.root is not None:
        place = str(cache.root)
    else:
        volume = executor.engine.volume(str(cache.volume))
        if volume is None or volume.driver != "local" or volume.options or not volume.mountpoint:
            what = "is not of the local driver, or is mounted from elsewhere"
            raise _refused(f"the volume {cache.volume} {what}, so that no view can lie on it.", "Use a directory.")
        place = volume.mountpoint
    torn = next((character for character in _TORN if character in place), None)
    if torn is not None:
        raise _refused(
            f"{place} holds {torn!r}, which the mount options of an overlay cannot.", "Use a root without , : and \\."
        )
    return place


def _refused(text: str, remedy: str) -> PreflightError:
    return PreflightError(CANNOT_RUN, [Problem("cache", text, remedy)])


def _options(place: str, generation: str, job: str) -> Mapping[str, str]:
    root = PurePosixPath(place)
    own = root / "views" / job
    layers = f"lowerdir={root / 'generations' / generation},upperdir={own / 'upper'},workdir={own / 'work'}"
    options = f"{layers},{_PLAIN}"
    if len(options) > _MOST_OPTIONS:
        raise _refused(f"{place} is too long for the mount options of an overlay.", "Use a shorter path.")
    return {"type": "overlay", "device": "overlay", "o": options}


def _make_room(executor: ContainerExecutor, job: str, volume: str, replace: bool) -> None:
    """No volume of this name: one that nobody has written to is as good as none. Raises UsageError for any other,
    unless it is to be replaced, and BusyError where a container has it.
    """
    if executor.engine.volume(volume) is None:
        return
    written = 0

    def hear(event: Event) -> None:
        nonlocal written
        if isinstance(event, events.ViewState):
            written += event.files

    if not replace:
        maintenance.run(executor, "view-list", hear, ContainerRequest(view=ViewRequest(job)))
        if written or executor.engine.users(volume):
            raise UsageError(
                f"there is a view {job} already, and it was used. Choose another name, pass --replace, or drop it: "
                f"warm-cache view drop {job}"
            )
    _remove(executor, job, volume)


def _prove(executor: ContainerExecutor, volume: str) -> None:
    """A first look through the mount: what is wrong with it shows here and not when a job starts."""
    try:
        executor.cache.prove(volume)
    except EngineRefusedError as error:
        raise _refused(
            f"the engine cannot lay an overlay on {executor.cache.name}: {error.message}.",
            "The root has to lie on a local file system that can carry one: ext4, xfs or tmpfs.",
        ) from error


# --- audit, drop, list -----------------------------------------------------------------------------------------------


def audited(executor: ContainerExecutor, job: str) -> Audit:
    context = executor.context
    volume = overlay.volume_name(executor, job)
    context.report.cache = executor.cache.name
    if executor.engine.volume(volume) is None:
        raise _unknown(executor, job)
    found = Audit()

    def hear(event: Event) -> None:
        match event:
            case events.AuditFinding():
                found.findings.append(Finding(**maintenance.row(event)))
            case events.Audited():
                found.used = event.used
                found.asked = [Shape(*row) for row in event.asked]
                found.truncated = printable(event.truncated)
                found.counts = {kind: event.counts.get(kind, 0) for kind in KINDS}
                found.took = event.seconds
                if (told := found.count(*KINDS)) > len(found.findings):
                    context.report.warnings.append(f"{told} findings, of which {len(found.findings)} are told")

    mount = Mount(source=volume, target=MERGED, kind="volume", read_only=True)
    maintenance.run(executor, "view-audit", hear, ContainerRequest(view=ViewRequest(job), mounts=(mount,)))
    return found


def _unknown(executor: ContainerExecutor, job: str) -> UsageError:
    known = [volume.labels[overlay.LABEL_VIEW] for volume in overlay.volumes(executor)]
    hint = did_you_mean(job, known) if known else "there is none"
    return UsageError(f"there is no view {job!r} of {executor.cache.name}; {hint}")


def drop(executor: ContainerExecutor, job: str) -> None:
    context = executor.context
    volume = overlay.volume_name(executor, job)
    if not maintenance.is_there(executor):
        raise _unknown(executor, job)
    with cache_locks.views(executor):
        there = executor.engine.volume(volume) is not None
        _remove(executor, job, volume)
        gone: list[Event] = []
        maintenance.run(executor, "view-drop", gone.append, ContainerRequest(view=ViewRequest(job)))
    if not there and not any(isinstance(event, events.Removed) for event in gone):
        raise _unknown(executor, job)
    context.report.extra["job"] = job
    context.console.say(f"the view {job} is gone")


def _remove(executor: ContainerExecutor, job: str, volume: str) -> None:
    """The volume goes, unless a container has it: the engine has the last word. Raises BusyError."""
    try:
        executor.engine.remove_volume(volume)
    except EngineRefusedError as error:
        names = sorted(user.name for user in executor.engine.users(volume))
        if error.status != 409 and not names:
            raise
        raise BusyError(
            f"the view {job} is in use by {', '.join(names) or 'a container'}: remove that first (docker rm -f)"
        ) from error


def show(executor: ContainerExecutor) -> None:
    context = executor.context
    rows: list[dict[str, Any]] = []
    generations: list[dict[str, Any]] = []
    if maintenance.is_there(executor):
        volumes = {volume.labels[overlay.LABEL_VIEW]: volume.name for volume in overlay.volumes(executor)}
        for event in overlay.looked(executor):
            match event:
                case events.GenerationState():
                    generations.append(_generation(event))
                case events.ViewState():
                    volume = volumes.pop(event.view, None)
                    users = [user.name for user in executor.engine.users(volume)] if volume else []
                    rows.append(_row(event, users, "" if volume else "unfinished: it has no volume here"))
        rows += [_row(events.ViewState(name), [], "its layers are gone: drop it") for name in volumes]
    context.report.extra.update(views=rows, generations=generations)
    console = Console(text := io.StringIO(), terminal=False)
    now = time.time()
    console.table(
        ("view", "age", "written", "files", "generation", "used by", "note"),
        [
            [
                row["name"],
                age(now - row["created"]) if row["created"] else "–",
                size(row["bytes"]),
                str(row["files"]),
                row["generation"] or "–",
                ", ".join(row["used_by"]) or "–",
                row["note"],
            ]
            for row in rows
        ],
    )
    console.table(
        ("generation", "asked for", "size", "files", "views"),
        [
            [
                row["id"],
                f"{age(now - row['asked'])} ago",
                size(row["bytes"]),
                str(row["files"]),
                ", ".join(row["views"]),
            ]
            for row in generations
        ],
    )
    context.report.text = text.getvalue().rstrip("\n")


def _row(view: events.ViewState, users: list[str], note: str) -> dict[str, Any]:
    return {
        "name": printable(view.view),
        "created": view.created,
        "generation": printable(view.generation),
        "bytes": view.bytes,
        "files": view.files,
        "used_by": users,
        "note": note,
    }


def _generation(generation: events.GenerationState) -> dict[str, Any]:
    return {
        "id": printable(generation.id),
        "asked": generation.asked,
        "bytes": generation.bytes,
        "files": generation.files,
        "views": [printable(name) for name in generation.views],
    }
