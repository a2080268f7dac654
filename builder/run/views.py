"""Views: a test job's own writable overlay above the warm cache, so that nothing it runs changes what others trust.

A view is a volume of the overlay kind on the engine, and layers below the cache root. This process holds the lock of
all views around every step; containers make and remove the layers, and the engine mounts the volume when a job starts.
A kill between two steps leaves a state that the next builder recognises: layers without a volume are of a killed
builder, and a volume is only made when everything that it names exists.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from builder import events
from builder.cache.findings import KINDS, Audit
from builder.engine.api import Mount, Volume
from builder.engine.lease import LABEL
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
from builder.run import cache_locks, job_environment, maintenance
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.run.job_environment import JobEnvironment
from builder.task import Shape
from builder.text import did_you_mean, printable, size

#: Labels of a view's volume: its name, and the cache root that it is a view of.
LABEL_VIEW, LABEL_ROOT = LABEL + "view", LABEL + "view-of"
#: Characters that the mount options of an overlay cannot hold, and the length that the kernel takes.
_SEPARATORS = ",:\\"
_MOST_OPTIONS = 4000
#: The kernel heeds no set-user-ID bit and opens no device in a view, whatever the job makes there.
_MOUNT_FLAGS = "nosuid,nodev"
#: Seconds that an audit may take.
AUDIT_TIMEOUT = 900.0
#: Without these features every layer holds all changes itself: no renamed directories, no files without content.
_PLAIN = "redirect_dir=off,metacopy=off,index=off"


@dataclass(frozen=True)
class NewView:
    """A view that was made."""

    volume: str
    generation: str  # the immutable copy of the cache below it
    environment: JobEnvironment  # gives it to a job


@dataclass(frozen=True)
class ViewRow:
    """A view in the list of all. The fields are keys of the JSON document."""

    name: str
    created: float  # seconds since the epoch; 0.0: unknown
    generation: str
    bytes: int  # written by the job
    files: int
    used_by: list[str]  # names of containers
    note: str  # what is wrong with it


@dataclass(frozen=True)
class GenerationRow:
    """A generation in the list of all. The fields are keys of the JSON document."""

    id: str
    asked: float  # when a view was last made of it, in seconds since the epoch
    bytes: int
    files: int
    views: list[str]


# --- volumes ---------------------------------------------------------------------------------------------------------


def volume_name(executor: ContainerExecutor, job: str) -> str:
    """Return the name of a view's volume. It names the root too: one engine may have views of several."""
    return f"warm-cache-view-{hashlib.sha256(executor.root_name.encode()).hexdigest()[:8]}-{job}"


def volumes(executor: ContainerExecutor) -> list[Volume]:
    """Return the volumes of this root's views on this engine."""
    found = executor.engine.volumes(f"{LABEL_ROOT}={executor.root_name}")
    return sorted((volume for volume in found if LABEL_VIEW in volume.labels), key=lambda volume: volume.name)


def _states(executor: ContainerExecutor) -> list[Event]:
    """Return events with the state of each view and generation below the root."""
    found: list[Event] = []
    maintenance.run(executor, "view-list", found.append)
    return found


@contextlib.contextmanager
def removed_unused(executor: ContainerExecutor) -> Iterator[ViewRequest]:
    """Remove volumes of views that no container uses and that were not written to for longer than a job may last.

    Holds the lock of all views. Yields the request for the sweep's container: the views that still have a volume, so
    that the layers of the others may be removed.
    """
    with cache_locks.views(executor):
        mine = {volume.labels[LABEL_VIEW]: volume.name for volume in volumes(executor)}
        found = _states(executor) if mine else []
        idle = {event.view: event.idle for event in found if isinstance(event, events.ViewState)}
        keep = []
        for job, volume in mine.items():
            if executor.engine.users(volume) or idle.get(job, float("inf")) < executor.context.manifest.cache.job_max:
                keep.append(job)
                continue
            try:
                executor.engine.remove_volume(volume)
            except EngineRefusedError:
                keep.append(job)  # a job has started meanwhile
        yield ViewRequest(engine=executor.engine.identity, keep=tuple(keep))


# --- create ----------------------------------------------------------------------------------------------------------


def create(executor: ContainerExecutor, job: str, *, replace: bool) -> NewView:
    """Make a view. Raises ColdError without a cache, UsageError for a used one of this name, and BusyError.

    replace: remove a view of this name first.
    """
    context = executor.context
    cache = context.manifest.cache
    # Everything that can be wrong is checked before anything is made.
    if not maintenance.has_root(executor):
        raise ColdError(f"there is no cache at {executor.root_name}: nothing is warm there yet")
    volume, path = volume_name(executor, job), _path_on_engine(executor)
    mounts = [f"type=volume,src={volume},dst={cache.mount},volume-nocopy"]
    environment = job_environment.of_job(executor, root=mounts)
    environment.text("docker", context.report.toolchain)  # raises for what a shell would split
    generation = ""

    def on_event(event: Event) -> None:
        nonlocal generation
        match event := maintenance.printed(event):
            case events.ViewState():
                generation = event.generation
            case events.FamilyOmitted():
                context.report.warnings.append(
                    f"{event.family}/{event.key} is not in the view: {event.why}. What a job needs of it is compiled "
                    "in the view"
                )

    with cache_locks.views(executor):
        _free_name(executor, job, volume, replace)
        order = ViewRequest(job, executor.engine.identity)
        maintenance.run(executor, "view-create", on_event, ContainerRequest(view=order))
        try:
            executor.engine.create_volume(
                volume,
                options=_options(path, generation, job),
                labels={LABEL_VIEW: job, LABEL_ROOT: executor.root_name},
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
    return NewView(volume, printable(generation), environment)


def _path_on_engine(executor: ContainerExecutor) -> str:
    """Return the root's path on the engine's host. Raises PreflightError where an overlay cannot name it."""
    cache = executor.context.manifest.cache
    if cache.root is not None:
        path = str(cache.root)
    else:
        volume = executor.engine.volume(str(cache.volume))
        if volume is None or volume.driver != "local" or volume.options or not volume.mountpoint:
            what = "is not of the local driver, or is mounted from elsewhere"
            raise _refused(f"the volume {cache.volume} {what}, so that it cannot have views.", "Use a directory.")
        path = volume.mountpoint
    separator = next((character for character in _SEPARATORS if character in path), None)
    if separator is not None:
        raise _refused(
            f"{path} holds {separator!r}, which the mount options of an overlay cannot.",
            "Use a root without , : and \\.",
        )
    return path


def _refused(text: str, remedy: str) -> PreflightError:
    return PreflightError(CANNOT_RUN, [Problem("cache", text, remedy)])


def _options(path: str, generation: str, job: str) -> Mapping[str, str]:
    root = PurePosixPath(path)
    own = root / "views" / job
    layers = f"lowerdir={root / 'generations' / generation},upperdir={own / 'upper'},workdir={own / 'work'}"
    options = f"{_MOUNT_FLAGS},{layers},{_PLAIN}"
    if len(options) > _MOST_OPTIONS:
        raise _refused(f"{path} is too long for the mount options of an overlay.", "Use a shorter path.")
    return {"type": "overlay", "device": "overlay", "o": options}


def _free_name(executor: ContainerExecutor, job: str, volume: str, replace: bool) -> None:
    """Remove a volume of this name to which nothing was written, or any if it is to be replaced.

    Raises UsageError for another one, and BusyError where a container uses it.
    """
    if executor.engine.volume(volume) is None:
        return
    written = 0

    def on_event(event: Event) -> None:
        nonlocal written
        if isinstance(event, events.ViewState):
            written += event.files

    if not replace:
        maintenance.run(executor, "view-list", on_event, ContainerRequest(view=ViewRequest(job)))
        if written or executor.engine.users(volume):
            raise UsageError(
                f"there is a view {job} already, and it was used. Choose another name, pass --replace, or drop it: "
                f"warm-cache view drop {job}"
            )
    _remove(executor, job, volume)


def _prove(executor: ContainerExecutor, volume: str) -> None:
    """Mount the volume once, so that a failure shows here and not when a job starts."""
    try:
        executor.cache.prove(volume)
    except EngineRefusedError as error:
        raise _refused(
            f"the engine cannot mount an overlay on {executor.root_name}: {error.message}.",
            "The root has to be on a local file system that supports it: ext4, xfs or tmpfs.",
        ) from error


# --- audit, drop, list -----------------------------------------------------------------------------------------------


def audited(executor: ContainerExecutor, job: str) -> Audit:
    """Return what the job changed in its view. Raises UsageError if there is no such view."""
    context = executor.context
    volume = volume_name(executor, job)
    context.report.cache = executor.root_name
    if executor.engine.volume(volume) is None:
        raise _unknown(executor, job)
    found = Audit()

    def on_event(event: Event) -> None:
        match event:
            case events.ViewState():
                if large := _too_large(executor, event):
                    context.report.warnings.append(f"the view {job}: {large}")
            case events.Finding():
                found.findings.append(maintenance.printed(event))
            case events.Audited():
                found.used = event.used
                found.asked = [Shape(*row) for row in event.asked]
                found.truncated = printable(event.truncated)
                found.counts = {kind: event.counts.get(kind, 0) for kind in KINDS}
                found.took = event.seconds
                if (total := found.count(*KINDS)) > len(found.findings):
                    context.report.warnings.append(f"{total} findings, of which {len(found.findings)} are listed")

    mount = Mount(source=volume, target=MERGED, kind="volume", read_only=True)
    request = ContainerRequest(view=ViewRequest(job), mounts=(mount,))
    maintenance.run(executor, "view-audit", on_event, request, timeout=AUDIT_TIMEOUT)
    return found


def _unknown(executor: ContainerExecutor, job: str) -> UsageError:
    known = [volume.labels[LABEL_VIEW] for volume in volumes(executor)]
    hint = did_you_mean(job, known) if known else "there is none"
    return UsageError(f"there is no view {job!r} of {executor.root_name}; {hint}")


def drop(executor: ContainerExecutor, job: str) -> bool:
    """Remove a view; return whether there was one. Raises BusyError where a container uses it."""
    volume = volume_name(executor, job)
    if not maintenance.has_root(executor):
        return False
    with cache_locks.views(executor):
        exists = executor.engine.volume(volume) is not None
        _remove(executor, job, volume)
        found: list[Event] = []
        maintenance.run(executor, "view-drop", found.append, ContainerRequest(view=ViewRequest(job)))
    return exists or any(isinstance(event, events.Removed) for event in found)


def _remove(executor: ContainerExecutor, job: str, volume: str) -> None:
    """Remove the volume. Raises BusyError where a container uses it, which the engine decides."""
    try:
        executor.engine.remove_volume(volume)
    except EngineRefusedError as error:
        names = sorted(user.name for user in executor.engine.users(volume))
        if error.status != 409 and not names:
            raise
        raise BusyError(
            f"the view {job} is in use by {', '.join(names) or 'a container'}: remove that first (docker rm -f)"
        ) from error


def listed(executor: ContainerExecutor) -> tuple[list[ViewRow], list[GenerationRow]]:
    """Return all views of the root, and the generations that they lie on."""
    rows: list[ViewRow] = []
    generations: list[GenerationRow] = []
    if not maintenance.has_root(executor):
        return rows, generations
    found = {volume.labels[LABEL_VIEW]: volume for volume in volumes(executor)}
    for event in _states(executor):
        match event:
            case events.GenerationState():
                jobs = [printable(name) for name in event.views]
                generations.append(GenerationRow(printable(event.id), event.asked, event.bytes, event.files, jobs))
            case events.ViewState():
                volume = found.pop(event.view, None)
                users = [user.name for user in executor.engine.users(volume.name)] if volume else []
                rows.append(_view_row(event, users, "; ".join(_notes(executor, event, volume))))
    rows += [_view_row(events.ViewState(name), [], "its layers are missing: drop it") for name in found]
    return rows, generations


def _notes(executor: ContainerExecutor, view: events.ViewState, volume: Volume | None) -> Iterator[str]:
    """Yield what is wrong with a view, for people."""
    if volume is None:
        yield "unfinished: it has no volume here"
    elif not volume.options.get("o", "").startswith(_MOUNT_FLAGS):
        yield f"made by an older version, without {_MOUNT_FLAGS}: make it anew"
    if large := _too_large(executor, view):
        yield large


def _too_large(executor: ContainerExecutor, view: events.ViewState) -> str:
    """Return that a view holds more than it should; "" for one that does not. Nothing keeps it from growing."""
    bound = executor.context.manifest.cache.view_max
    return f"{size(view.bytes)} written, above [cache] view_max ({size(bound)})" if view.bytes > bound else ""


def _view_row(view: events.ViewState, users: list[str], note: str) -> ViewRow:
    return ViewRow(
        name=printable(view.view),
        created=view.created,
        generation=printable(view.generation),
        bytes=view.bytes,
        files=view.files,
        used_by=users,
        note=note,
    )
