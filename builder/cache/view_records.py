"""The modes of views: what a container does below ``<root>/views`` and ``<root>/generations``.

A view is an overlay: a generation below, and ``<root>/views/<job>/upper`` above it, where everything lands that the job
writes. The engine mounts it, as a volume that the builder makes of the paths that are prepared here. The job's
container sees nothing of the root but the overlay.

All that is made here is made beside its place and renamed, under one lock: a kill leaves a ``.tmp`` that nobody reads,
and that whoever gets the lock next removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder import events, files, text
from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.cache import generations, layout, overlay_audit
from builder.cache.findings import KINDS, Audit, foremost
from builder.events import FAILED, WARMED
from builder.job import MERGED, Job

#: What a view may be called: it becomes part of a volume's name and of mount options.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,62}")

SCHEMA = 1
#: Findings that are told one by one; the others are only counted.
MOST_TOLD = 2000
#: Things in an upper layer that are looked at to tell its size and age.
MOST_SIZED = 100_000
_RECORD_LIMIT = 1 << 16


@dataclass(frozen=True)
class Record:
    """``view.json``. view: its name. generation: what lies below. created: seconds since the epoch. engine: the id of
    the engine that has the volume.
    """

    view: str
    generation: str
    created: float
    engine: str


def home(root: Path) -> Path:
    return root / "views"


def records(root: Path) -> dict[str, Record | None]:
    """Every view by its name; None for one whose record cannot be read."""
    found = {}
    for item in files.listing(str(home(root))) or ():
        if NAME.fullmatch(item.name) and files.is_dir(item):
            found[item.name] = _read(Path(item.path))
    return found


def below(root: Path, path: Path) -> str | None:
    """The name of a view that has this file or directory of the root below it, if there is one: by name in its
    generation, or because it is that generation (or a part of it).
    """
    try:
        name = path.relative_to(root)
    except ValueError:
        return None
    for view, record in sorted(records(root).items()):
        if record is None:
            continue
        if os.path.lexists(generations.tree(root, record.generation) / name):
            return view
        if name.parts[:2] in (("generations",), ("generations", record.generation)):
            return view
    return None


def create(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-create``: the newest state as a generation, and empty layers above it. Tells the generation."""
    root, name = Path(job.mount), job.view.name
    layout.prepare(root)
    guard.acquire(layout.generations_lock(root), exclusive=True)
    home(root).mkdir(exist_ok=True)
    generations.remove_unfinished(generations.home(root))
    generations.remove_unfinished(home(root))
    place, engine = home(root) / name, job.view.engine
    if os.path.lexists(place):
        theirs = _read(place)
        if theirs is not None and theirs.engine != engine:
            output.say(f"the view {name} belongs to another engine ({text.printable(theirs.engine)}): drop it there")
            return FAILED
        generations.remove(place, home(root))  # without a volume: what a killed builder left
    output.event(events.Phase("looking for what is new"))
    generation, omitted = generations.publish(root, check=guard.check)
    record = Record(name, generation, time.time(), engine)
    _make(root, record)
    for left in omitted:
        output.event(events.FamilyOmitted(**vars(left)))
    output.event(events.ViewState(**vars(record)))
    return WARMED


def _make(root: Path, record: Record) -> None:
    new = home(root) / f".{record.view}.{os.urandom(8).hex()}.tmp"
    try:
        for layer in ("upper", "work"):
            (new / layer).mkdir(parents=True)
        # The top of what the job sees has the modes and owner of the root.
        shutil.copystat(root, new / "upper")
        status = root.stat()
        with contextlib.suppress(OSError):
            os.chown(new / "upper", status.st_uid, status.st_gid)
        document = {"schema": SCHEMA, **dataclasses.asdict(record)}
        files.write_atomically(new / "view.json", json.dumps(document, indent=1).encode("ascii") + b"\n")
        new.rename(home(root) / record.view)
    except BaseException:
        if new.exists():
            generations.remove(new, home(root))
        raise


def drop(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-drop``: the layers of one view go. Its volume is gone already."""
    root, name = Path(job.mount), job.view.name
    guard.acquire(layout.generations_lock(root), exclusive=True)
    place = home(root) / name
    if os.path.lexists(place):
        generations.remove(place, home(root))
        output.event(events.Removed("", "", f"views/{name}"))
    generations.remove_unfinished(home(root))
    return WARMED


def look(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-list``: every view and every generation, with sizes and times."""
    root = Path(job.mount)
    found = records(root)
    wanted = job.view.name
    for name, record in sorted(found.items()):
        if wanted in ("", name):
            size, files_there, touched = _sized(home(root) / name / "upper", guard.check)
            state = events.ViewState(**vars(record)) if record else events.ViewState(name)
            idle = time.time() - max(touched, state.created)
            output.event(dataclasses.replace(state, bytes=size, files=files_there, idle=idle))
    for generation in generations.known(root) if not wanted else ():
        size, count, _ = _sized(generations.tree(root, generation), guard.check)
        status = generations.tree(root, generation).lstat()
        users = tuple(sorted(name for name, record in found.items() if record and record.generation == generation))
        output.event(events.GenerationState(generation, status.st_mtime, size, count, users))
    return WARMED


def sweep(root: Path, job: Job, output: Output, guard: Guard) -> None:
    """Views without a volume, and generations that nobody has: part of mode ``sweep``, where the builder says which
    views have volumes and holds the lock that keeps others from making some.
    """
    if job.view.keep is None:
        return
    guard.acquire(layout.generations_lock(root), exclusive=True)
    keep, engine = set(job.view.keep), job.view.engine
    for folder in (home(root), generations.home(root)):
        generations.remove_unfinished(folder)
    for name, record in records(root).items():
        if name in keep:
            continue
        if record is not None and record.engine != engine:
            output.event(events.Kept("", "", f"views/{name}", "another engine has its volume"))
        else:
            generations.remove(home(root) / name, home(root))
            output.event(events.Removed("", "", f"views/{name}"))
    for generation in _needless(root, spare=1):
        guard.check()
        generations.remove(generations.tree(root, generation), generations.home(root))
        output.event(events.Removed("", "", f"generations/{generation}"))


def forget(root: Path, guard: Guard) -> None:
    """Removes every generation that no view has, the newest included: as long as one has another name of a file,
    nothing that is removed from the root frees a byte. The next view makes its own.
    """
    guard.acquire(layout.generations_lock(root), exclusive=True)
    for generation in _needless(root, spare=0):
        guard.check()
        generations.remove(generations.tree(root, generation), generations.home(root))


def _needless(root: Path, *, spare: int) -> list[str]:
    """Generations that no view has, without so many of the newest."""
    left = records(root)
    if None in left.values():
        return []  # nobody can tell what that view has below it
    needed = {record.generation for record in left.values() if record is not None}
    known = generations.known(root)
    return [generation for generation in known[: len(known) - spare] if generation not in needed]


def inspect(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-audit``: what the job did to its view, finding by finding."""
    root, name = Path(job.mount), job.view.name
    record = _read(home(root) / name)
    if record is None or not generations.tree(root, record.generation).is_dir():
        output.say(f"the view {name} is not whole: its record or its generation is gone. Drop it")
        return FAILED
    layers = overlay_audit.Layers(
        lower=generations.tree(root, record.generation),
        upper=home(root) / name / "upper",
        merged=Path(MERGED),
        mount=job.mount,
        created=record.created,
    )
    tell(overlay_audit.audit(layers, now=time.time(), check=guard.check), output)
    return WARMED


def tell(found: Audit, output: Output) -> None:
    """The findings as events; more than anybody reads are only counted."""
    for finding in foremost(found.findings, MOST_TOLD):
        output.event(events.AuditFinding(**vars(finding)))
    output.event(
        events.Audited(
            used=found.used,
            asked=tuple((shape.kernel, shape.n, shape.k, shape.groups) for shape in found.asked[:MOST_TOLD]),
            counts={kind: found.count(kind) for kind in KINDS},
            seconds=found.seconds,
            truncated=found.truncated,
        )
    )


#: Modes of the in-container program, and what each does.
MODES: dict[str, Callable[[Job, Output, Guard], int]] = {
    "view-create": create,
    "view-drop": drop,
    "view-list": look,
    "view-audit": inspect,
}


def _read(place: Path) -> Record | None:
    try:
        found = files.read_json(str(place / "view.json"), _RECORD_LIMIT)
    except files.UnreadableError:
        return None
    if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
        return None
    view, generation, created, engine = (found.get(field.name) for field in dataclasses.fields(Record))
    if (
        view != place.name
        or not isinstance(generation, str)
        or not generations.ID.fullmatch(generation)
        or not isinstance(created, (int, float))
        or not isinstance(engine, str)
    ):
        return None
    return Record(view, generation, float(created), engine)


def _sized(base: Path, check: Callable[[], None]) -> tuple[int, int, float]:
    """Bytes and number of the files below, and the last time anything there was written or moved; of a tree with more
    in it than anybody has use for, of a part.
    """
    size = count = seen = 0
    latest = 0.0
    stack = [str(base)]
    while stack and seen < MOST_SIZED:
        with contextlib.suppress(OSError), os.scandir(stack.pop()) as items:
            for item in items:
                seen += 1
                if seen > MOST_SIZED:
                    break
                check()
                status = item.stat(follow_symlinks=False)
                latest = max(latest, status.st_ctime)
                if stat.S_ISDIR(status.st_mode):
                    stack.append(item.path)
                else:
                    count += 1
                    size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size, count, latest
