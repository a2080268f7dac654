"""The verb `status`: what is in the cache, how old it is, who uses it now, and what it cost. Reads only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from builder import events, text
from builder.cache import inventory, marker_files, markers, toolchain, usage
from builder.cli.commands.hold import PATH as HOLD
from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.engine.lease import LABEL
from builder.flock import holders
from builder.run import cache_locks, maintenance, overlay
from builder.run.container_executor import ContainerExecutor
from builder.text import age, duration, size

#: What a container of this program does, by its mode; others warm, look or clean.
_MODES = {"hold": "holds the cache", "views": "makes or drops a view", "run": "warms", "prune": "removes"}
_BUILDER, _HOLDER = "works on the cache", "holds the cache"


@dataclass(frozen=True, kw_only=True)
class StatusArgs(ManifestArgs):
    """Arguments of `status`."""


def run(args: StatusArgs, invocation: Invocation) -> None:
    """Report what the cache holds, how old it is, what uses it, and what it cost."""
    with invocation.containers(invocation.context(invocation.manifest())) as executor:
        status(executor)


def status(executor: ContainerExecutor) -> None:
    """Families by key with entries and bytes, every marker with age, last use and price, and who uses the root now."""
    context = executor.context
    found = _Found()
    if executor.cache.exists():
        found = _look(executor)
    report, console = context.report, context.console
    report.cache = executor.cache.name
    report.extra.update(families=found.families, markers=found.marks, users=found.users, cost=found.cost)
    console.say(f"cache {executor.cache.name}, toolchain {report.toolchain or 'unknown'}")
    console.table(
        ("family", "key", "entries", "invalid", "size", "used by"),
        [
            [row["family"], row["key"], str(row["entries"]), str(row["invalid"]), size(row["bytes"]), row["use"]]
            for row in found.families
            if row["entries"] or row["invalid"]
        ],
    )
    console.table(
        ("task", "age", "last used", "took", "GPU-min", "proof", "of"),
        [
            [
                row["label"],
                age(row["age_seconds"]) if row["age_seconds"] is not None else "–",
                f"{age(row['unused_seconds'])} ago" if row["unused_seconds"] is not None else "–",
                duration(row["seconds"]),
                f"{row['gpu_minutes']:.1f}" if row["gpu_minutes"] is not None else "–",
                row["proof"],
                row["use"],
            ]
            for row in found.marks
        ],
    )
    for reservation in dict.fromkeys(row["reservation"] for row in found.marks if row["reservation"]):
        labels = ", ".join(row["label"] for row in found.marks if row["reservation"] == reservation)
        console.say(f"{labels}: {reservation}")
    if found.marks:
        console.say(
            f"what is here took {duration(found.cost['seconds'])} of warm-ups and {found.cost['gpu_minutes']:.1f} "
            "GPU-minutes, as far as markers say"
        )
    if found.users:
        console.table(("who uses it now", "how"), [[row["who"], row["how"]] for row in found.users])
    else:
        console.say("nobody uses it now")


@dataclass
class _Found:
    """Rows of the document. cost: of all markers."""

    families: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    users: list[dict[str, str]] = field(default_factory=list)

    @property
    def cost(self) -> dict[str, float]:
        return {name: round(sum(row[name] or 0.0 for row in self.marks), 3) for name in ("seconds", "gpu_minutes")}


def _look(executor: ContainerExecutor) -> _Found:
    context = executor.context
    records = executor.records(context.manifest.tasks).values()
    # Tasks may have environments, and so toolchains, of their own.
    current = {place for record in records for place in toolchain.family_keys(record).items()}
    context.report.toolchain = toolchain.digest(toolchain.family_keys(next(iter(records))))
    held, used = _held(executor)
    found = _Found([{**each, "use": _use((each["family"], each["key"]) in current)} for each in held])
    now = time.time()
    with executor.cache.view(entries=False) as root:
        for path in sorted(root.glob("markers/*/*.json")):
            found.marks.append(_marker(path, root, used, current, now))
    found.users = list(_users(executor))
    return found


def _use(current: bool) -> str:
    return "this image" if current else "another toolchain"


def _held(executor: ContainerExecutor) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """What every family directory holds: family, key, entries, invalid, bytes; and when markers were last of use, by
    path, where that was counted by a container, because the root cannot be read from here: a copy would be as large as
    the cache.
    """
    direct = executor.cache.direct()
    found: list[dict[str, Any]] = []
    used: dict[str, float] | None = None
    if direct is not None:
        found += [vars(held) for held in inventory.contents(direct)]
    else:
        used = told = {}

        def hear(event: events.Event) -> None:
            match event:
                case events.FamilyContents():
                    found.append(dict(vars(event)))
                case events.MarkerUsed():
                    told[event.path] = event.time

        maintenance.run(executor, "status", hear)
    return sorted(found, key=lambda held: (held["family"], held["key"])), used


def _marker(
    path: Path, root: Path, used: Mapping[str, float] | None, current: set[tuple[str, str]], now: float
) -> dict[str, Any]:
    marker = marker_files.read(path)
    observed = marker.observed if marker else marker_files.Observed()
    place = str(path.relative_to(root))
    written, last = None, None
    with contextlib.suppress(OSError):
        written = path.lstat().st_mtime
        last = usage.last(root, place, written) if used is None else used.get(place, written)
    seconds, count = observed.seconds, observed.gpus
    claims = marker.keys if marker else {}
    return {
        "task": text.printable(path.parent.name),
        "label": text.printable(marker.label)[:60] if marker else text.printable(path.parent.name),
        "path": text.printable(place),
        "written": _moment(written),
        "age_seconds": None if written is None else round(max(0.0, now - written), 3),
        "last_used": _moment(last),
        "unused_seconds": None if last is None else round(max(0.0, now - last), 3),
        "seconds": seconds,
        "gpus": count,
        "gpu_minutes": None if seconds is None or count is None else round(seconds * count / 60, 3),
        "image": text.printable(observed.image or ""),
        "proof": text.printable(marker.proof) if marker else "unreadable",
        "reservation": (markers.reservation(marker) or None) if marker else None,
        "claims": sorted(claims),
        "use": _use(marker is not None and set(claims.items()) <= current),
    }


def _moment(seconds: float | None) -> str:
    """In UTC; a file's time may be any number."""
    with contextlib.suppress(OSError, OverflowError, ValueError, TypeError):
        return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")  # type: ignore[arg-type]
    return "unknown"


# --- who uses it
# -----------------------------------------------------------------------------------------------------------------


def _users(executor: ContainerExecutor) -> Iterator[dict[str, str]]:
    """Who has a lock of the root, as far as this process can see, and which running containers have it mounted, or a
    view of it. A mount alone keeps nothing from being removed, and a container may have it all its life.
    """
    direct = executor.cache.direct()
    if direct is not None:
        for path, how in ((cache_locks.RUN, _BUILDER), (cache_locks.VIEWS, _MODES["views"]), (HOLD, _HOLDER)):
            for who in holders(direct / path):
                yield {"who": who, "how": how}
    source = executor.cache.mount().source
    views = {volume.name: volume.labels[overlay.LABEL_VIEW] for volume in overlay.volumes(executor)}
    mounting = executor.engine.mounting([source, *views])
    for place, found in mounting:
        run = found.labels.get(f"{LABEL}run")
        if run == executor.context.run_id:
            continue
        who = f"container {text.printable(found.name)}"
        if place in views:
            yield {"who": who, "how": f"in the view {text.printable(views[place])}"}
        elif run is not None:
            yield {"who": who, "how": _MODES.get(found.name.partition(f"-{run}-")[2].partition("-")[0], _BUILDER)}
        else:
            yield {"who": who, "how": "has it mounted"}
    taken = {place for place, _ in mounting}
    for volume, job in sorted(views.items()):
        if volume not in taken:
            yield {"who": f"view {text.printable(job)}", "how": "in no container"}
