"""Modes of views: make, drop, list and audit them below ``<root>/views`` and ``<root>/generations``.

Everything is made under a temporary name and renamed, under one lock: a kill leaves a ``.tmp`` that nothing reads, and
that the next holder of the lock removes.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from builder import events, text
from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.beneath import Tree
from builder.cache import generations, layout, overlay_audit
from builder.cache.findings import KINDS, Audit, foremost
from builder.cache.view_records import FOLDER, ViewRecord, read, records, write
from builder.events import FAILED, WARMED
from builder.job import MERGED, Job

#: Findings, and shapes, that are reported one by one; the others are only counted.
MOST_REPORTED = 2000
#: Directory entries of one tree that are visited for its size and age.
MOST_VISITED = 100_000


def create(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-create``: publish the newest state as a generation, and make empty layers above it."""
    root, name, engine = Path(job.mount), job.view.name, job.view.engine
    layout.prepare(root)
    guard.acquire(layout.generations_lock(root), exclusive=True)
    tree = Tree(root)
    layout.close(tree, FOLDER, make=True)
    generations.remove_unfinished(root, generations.FOLDER)
    generations.remove_unfinished(root, FOLDER)
    if tree.exists(f"{FOLDER}/{name}"):
        other = read(root, name)
        if other is not None and other.engine != engine:
            output.say(f"the view {name} belongs to another engine ({text.printable(other.engine)}): drop it there")
            return FAILED
        tree.remove(f"{FOLDER}/{name}")  # without a volume: left by a killed builder
    output.event(events.Phase("looking for what is new"))
    generation, omitted = generations.publish(root, check=guard.check)
    record = ViewRecord(name, generation, time.time(), engine)
    _make(root, record)
    for each in omitted:
        output.event(events.FamilyOmitted(**vars(each)))
    output.event(events.ViewState(**vars(record)))
    return WARMED


def _make(root: Path, record: ViewRecord) -> None:
    new = f".{record.view}.{os.urandom(8).hex()}.tmp"
    tree = Tree(root, FOLDER)
    try:
        tree.make_folder(f"{new}/upper")
        tree.make_folder(f"{new}/work")
        # The top folder that the job sees has the mode and owner of the root.
        tree.copy_mode(f"{new}/upper", root.stat())
        write(root, new, record)
        tree.move(new, tree, record.view)
    except BaseException:
        if tree.exists(new):
            tree.remove(new)
        raise


def drop(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-drop``: remove the layers of a view; its volume is already removed."""
    root, name = Path(job.mount), job.view.name
    guard.acquire(layout.generations_lock(root), exclusive=True)
    with Tree(root) as tree:
        if tree.exists(f"{FOLDER}/{name}"):
            tree.remove(f"{FOLDER}/{name}")
            output.event(events.Removed("", "", f"views/{name}"))
    generations.remove_unfinished(root, FOLDER)
    return WARMED


def list_all(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-list``: report every view (or the named one), and every generation, with sizes and times."""
    root, wanted = Path(job.mount), job.view.name
    views = records(root)
    for name, record in sorted(views.items()):
        if wanted in ("", name):
            size, count, written = _size(Tree(root, f"{FOLDER}/{name}/upper"), guard.check)
            state = events.ViewState(**vars(record)) if record else events.ViewState(name)
            idle = time.time() - max(written, state.created)
            output.event(replace(state, bytes=size, files=count, idle=idle))
    for generation in generations.known(root) if not wanted else ():
        tree = generations.tree(root, generation)
        size, count, _ = _size(Tree(root, f"generations/{generation}"), guard.check)
        users = sorted(name for name, record in views.items() if record and record.generation == generation)
        output.event(events.GenerationState(generation, tree.lstat().st_mtime, size, count, tuple(users)))
    return WARMED


def sweep(root: Path, job: Job, output: Output, guard: Guard) -> None:
    """Remove views without a volume, and unused generations: part of mode ``sweep``.

    The builder names the views that have volumes, and holds the lock that keeps others from making some.
    """
    if job.view.keep is None:
        return
    guard.acquire(layout.generations_lock(root), exclusive=True)
    for name in layout.CLOSED:
        with Tree(root) as tree:
            layout.close(tree, name)
    for folder in (FOLDER, generations.FOLDER):
        generations.remove_unfinished(root, folder)
    for name, record in records(root).items():
        if name in job.view.keep:
            continue
        if record is not None and record.engine != job.view.engine:
            output.event(events.Kept("", "", f"views/{name}", "another engine has its volume"))
        else:
            with Tree(root) as tree:
                tree.remove(f"{FOLDER}/{name}")
            output.event(events.Removed("", "", f"views/{name}"))
    for generation in _unused(root, spare=1):
        guard.check()
        generations.remove(root, generation)
        output.event(events.Removed("", "", f"generations/{generation}"))


def remove_generations(root: Path, guard: Guard) -> None:
    """Remove every generation that no view uses, the newest included; the next view makes its own.

    A generation is as large as the root was: what is removed there stays in it.
    """
    guard.acquire(layout.generations_lock(root), exclusive=True)
    for generation in _unused(root, spare=0):
        guard.check()
        generations.remove(root, generation)


def _unused(root: Path, *, spare: int) -> list[str]:
    """Return generations that no view uses, without so many of the newest; none where a record is unreadable."""
    views = records(root)
    if None in views.values():
        return []
    used = {record.generation for record in views.values() if record is not None}
    known = generations.known(root)
    return [generation for generation in known[: len(known) - spare] if generation not in used]


def audit(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``view-audit``: report what the job changed in its view."""
    root, name = Path(job.mount), job.view.name
    record = read(root, name)
    if record is None or not generations.tree(root, record.generation).is_dir():
        output.say(f"the view {name} is not whole: its record or its generation is missing. Drop it")
        return FAILED
    layers = overlay_audit.Layers(
        lower=Tree(root, f"generations/{record.generation}"),
        upper=Tree(root, f"{FOLDER}/{name}/upper"),
        merged=Path(MERGED),
        mount=job.mount,
        created=record.created,
    )
    size, count, _ = _size(Tree(root, f"{FOLDER}/{name}/upper"), guard.check)
    output.event(events.ViewState(**vars(record), bytes=size, files=count))
    report(overlay_audit.audit(layers, now=time.time(), check=guard.check), output)
    return WARMED


def report(found: Audit, output: Output) -> None:
    """Write the foremost findings as events, and the sum of all."""
    for finding in foremost(found.findings, MOST_REPORTED):
        output.event(finding)
    output.event(
        events.Audited(
            used=found.used,
            asked=tuple((shape.kernel, shape.n, shape.k, shape.groups) for shape in found.asked[:MOST_REPORTED]),
            counts={kind: found.count(kind) for kind in KINDS},
            seconds=found.seconds,
            truncated=found.truncated,
        )
    )


#: Modes of the in-container program, and what each does.
MODES: dict[str, Callable[[Job, Output, Guard], int]] = {
    "view-create": create,
    "view-drop": drop,
    "view-list": list_all,
    "view-audit": audit,
}


def _size(base: Tree, check: Callable[[], None]) -> tuple[int, int, float]:
    """Return bytes and number of the files below, and the time of the last write or move there.

    Of a tree with more than MOST_VISITED entries, that of a part.
    """
    size = count = visited = 0
    latest = 0.0
    stack = [""]
    while stack and visited < MOST_VISITED:
        for item in base.some(stack.pop(), MOST_VISITED - visited) or ():
            visited += 1
            check()
            with contextlib.suppress(OSError):
                status = item.stat()
                latest = max(latest, status.st_ctime)
                if stat.S_ISDIR(status.st_mode):
                    stack += [] if base.is_too_deep(item.name) else [item.name]
                else:
                    count += 1
                    size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size, count, latest
