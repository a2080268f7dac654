"""The verb `status`: what is in the cache, how old it is, what uses it now, and what it cost. Reads only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from builder import events
from builder.cache import inventory, layout, marker_files, marker_format, markers, toolchain, usage
from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.engine.lease import LABEL_MODE, LABEL_RUN
from builder.flock import holders
from builder.report.console import Console
from builder.report.results import Section
from builder.run import maintenance, views
from builder.run.container_executor import ContainerExecutor
from builder.text import age, duration, printable, size

#: What a container of this program does, by its mode; all others work on the cache.
_MODES = {"hold": "holds the cache", "views": "makes or drops a view", "run": "warms", "prune": "removes"}
_BUILDER = "works on the cache"


@dataclass(frozen=True, kw_only=True)
class StatusArgs(ManifestArgs):
    """Arguments of `status`."""


@dataclass(frozen=True)
class _FamilyRow:
    """A family directory. The fields are keys of the JSON document, here and below."""

    family: str
    key: str
    entries: int
    invalid: int
    bytes: int
    use: str


@dataclass(frozen=True, kw_only=True)
class _MarkerRow:
    """A marker. Times are in UTC, ages in seconds."""

    task: str
    label: str
    path: str
    written: str
    age_seconds: float | None
    last_used: str
    unused_seconds: float | None
    seconds: float | None  # of the task's last run
    gpus: int | None
    gpu_minutes: float | None
    image: str
    proof: str
    reservation: str | None
    claims: list[str]  # families
    use: str


@dataclass(frozen=True)
class _User:
    """A process, container or view that uses the root."""

    who: str
    how: str


@dataclass
class _Status(Section):
    """All rows, and the cost of all tasks' last runs."""

    families: list[_FamilyRow] = field(default_factory=list)
    markers: list[_MarkerRow] = field(default_factory=list)
    users: list[_User] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the seconds of all tasks' last runs."""
        return round(sum(row.seconds or 0.0 for row in self.markers), 3)

    @property
    def gpu_minutes(self) -> float:
        """Return the GPU-minutes of all tasks' last runs."""
        return round(sum(row.gpu_minutes or 0.0 for row in self.markers), 3)

    def to_json(self) -> Mapping[str, object]:
        return {**super().to_json(), "cost": {"seconds": self.seconds, "gpu_minutes": self.gpu_minutes}}


def run(args: StatusArgs, invocation: Invocation) -> None:
    """Report what the cache holds, how old it is, what uses it, and what it cost."""
    console, report = invocation.console, invocation.report
    with invocation.containers(invocation.context(invocation.manifest())) as executor:
        maintenance.require_root(executor)
        found = _read(executor)
        report.cache = executor.root_name
        report.add(found)
        console.say(f"cache {report.cache}, toolchain {report.toolchain or 'unknown'}")
        _show(console, found)


def _show(console: Console, found: _Status) -> None:
    entries = [row for row in found.families if row.entries or row.invalid]
    _table(
        console,
        "no family has an entry",
        ("family", "key", "entries", "invalid", "size", "used by"),
        [[row.family, row.key, str(row.entries), str(row.invalid), size(row.bytes), row.use] for row in entries],
    )
    _table(
        console,
        "no task has a marker",
        ("task", "age", "last used", "took", "GPU-min", "proof", "of"),
        [
            [
                row.label,
                age(row.age_seconds) if row.age_seconds is not None else "–",
                f"{age(row.unused_seconds)} ago" if row.unused_seconds is not None else "–",
                duration(row.seconds),
                f"{row.gpu_minutes:.1f}" if row.gpu_minutes is not None else "–",
                row.proof,
                row.use,
            ]
            for row in found.markers
        ],
    )
    for reservation in dict.fromkeys(row.reservation for row in found.markers if row.reservation):
        labels = ", ".join(row.label for row in found.markers if row.reservation == reservation)
        console.say(f"{labels}: {reservation}")
    if found.markers:
        console.say(f"markers record {duration(found.seconds)} of warm-ups and {found.gpu_minutes:.1f} GPU-minutes")
    if found.users:
        console.table(("used now by", "how"), [[row.who, row.how] for row in found.users])
    else:
        console.say("nothing uses it now")


def _table(console: Console, nothing: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table, or one line where it has no row."""
    if rows:
        console.table(columns, rows)
    else:
        console.say(nothing)


def _read(executor: ContainerExecutor) -> _Status:
    context = executor.context
    records = executor.records(context.manifest.tasks).values()
    # Tasks may have environments, and so toolchains, of their own.
    current = {directory for record in records for directory in toolchain.family_keys(record).items()}
    context.report.toolchain = toolchain.digest(toolchain.family_keys(next(iter(records))))
    directories, used = _contents(executor)
    found = _Status([_FamilyRow(**vars(each), use=_use((each.family, each.key) in current)) for each in directories])
    now = time.time()
    with executor.cache.view(entries=False) as root:
        for each in sorted(marker_files.every(root), key=lambda each: each.path):
            found.markers.append(_marker(each, root, used, current, now))
    found.users = list(_users(executor))
    return found


def _use(current: bool) -> str:
    return "this image" if current else "another toolchain"


def _contents(executor: ContainerExecutor) -> tuple[list[inventory.Content], dict[str, float] | None]:
    """Return how much each family directory holds, and when each marker was last used, by path.

    A root that this process cannot read is read by a container: a copy would be as large as the cache. The times are
    None where this process reads them itself.
    """
    direct = executor.direct_root()
    found: list[inventory.Content] = []
    used: dict[str, float] = {}

    def on_event(event: events.Event) -> None:
        match event:
            case events.FamilyContents():
                found.append(inventory.Content(**vars(maintenance.printed(event))))
            case events.MarkerUsed():
                used[event.path] = event.time

    if direct is not None:
        found += inventory.contents(direct)
    else:
        maintenance.run(executor, "status", on_event)
    return sorted(found, key=lambda each: (each.family, each.key)), used if direct is None else None


def _marker(
    found: marker_files.MarkerFile,
    root: Path,
    used: Mapping[str, float] | None,
    current: set[tuple[str, str]],
    now: float,
) -> _MarkerRow:
    marker = found.marker
    observed = marker.observed if marker else marker_format.Observed()
    written, last = found.written or None, None
    if written is not None:
        last = usage.last(root, found.path, written) if used is None else used.get(found.path, written)
    seconds, gpus = observed.seconds, observed.gpus
    claims = marker.keys if marker else {}
    return _MarkerRow(
        task=printable(found.folder),
        label=printable(marker.label)[:60] if marker else printable(found.folder),
        path=found.path,
        written=_moment(written),
        age_seconds=None if written is None else round(max(0.0, now - written), 3),
        last_used=_moment(last),
        unused_seconds=None if last is None else round(max(0.0, now - last), 3),
        seconds=seconds,
        gpus=gpus,
        gpu_minutes=None if seconds is None or gpus is None else round(seconds * gpus / 60, 3),
        image=printable(observed.image or ""),
        proof=printable(marker.proof) if marker else "unreadable",
        reservation=(markers.reservation(marker) or None) if marker else None,
        claims=sorted(claims),
        use=_use(marker is not None and set(claims.items()) <= current),
    )


def _moment(seconds: float | None) -> str:
    """Return a time in UTC, or ``unknown``: a file's time may be any number."""
    with contextlib.suppress(OSError, OverflowError, ValueError, TypeError):
        return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")  # type: ignore[arg-type]
    return "unknown"


def _users(executor: ContainerExecutor) -> Iterator[_User]:
    """Yield the processes that hold a lock of the root, and the running containers that have it or a view mounted.

    Locks only as far as this process can see them. A mount alone does not prevent removal, and a container may have it
    all its life.
    """
    direct = executor.direct_root()
    if direct is not None:
        locks = {
            layout.run_lock(direct): _BUILDER,
            layout.views_lock(direct): _MODES["views"],
            layout.hold_lock(direct): _MODES["hold"],
        }
        for path, how in locks.items():
            for process in holders(path):
                yield _User(process, how)
    jobs = {volume.name: volume.labels[views.LABEL_VIEW] for volume in views.volumes(executor)}
    mounting = executor.engine.mounting([executor.cache.mount().source, *jobs])
    for source, container in mounting:
        run_id = container.labels.get(LABEL_RUN)
        if run_id == executor.context.run_id:
            continue
        name = f"container {printable(container.name)}"
        if source in jobs:
            yield _User(name, f"in the view {printable(jobs[source])}")
        elif run_id is not None:
            yield _User(name, _MODES.get(container.labels.get(LABEL_MODE, ""), _BUILDER))
        else:
            yield _User(name, "has it mounted")
    mounted = {source for source, _ in mounting}
    for volume, job in sorted(jobs.items()):
        if volume not in mounted:
            yield _User(f"view {printable(job)}", "in no container")
