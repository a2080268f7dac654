"""The history of a cache root: ``runs.jsonl``, one line for each task of a run and for each prebuild.

Each container writes its own line when it ends by itself, so that nothing but containers writes below the root; lines
of one run have its id. The file never grows above LIMIT: the older half is then dropped. Every user of the machine may
have written to it, so that a line is read as a record or counted as damaged, and nothing that is in it raises.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from builder import flock
from builder.beneath import Tree
from builder.cache import layout, toolchain
from builder.events import KernelsPrebuilt, Verdict
from builder.files import UnreadableError
from builder.job import Job
from builder.task import Task
from builder.text import printable, shortened
from builder.typed_json import from_object

NAME = layout.HISTORY
LOCK = "locks/history.lock"
#: Bytes of the file, and of one line of it.
LIMIT, LINE = 1 << 20, 8 << 10
#: Seconds that a writer waits for another one. Without the lock it adds its line and drops none.
_PATIENCE = 2.0
#: Characters of a text that is kept.
_TEXT = 200
#: Numbers above this are no seconds (the year 2286).
_MOST = 1e10


_NO_TASK = Task("", "", "")


@dataclass(frozen=True)
class HistoryLine:
    """One task of a run, or one prebuild.

    stage: ``task`` or ``prebuild``. began: seconds since the epoch. gpus: indices on the machine, as far as they are
    known. entries: valid ones by family; added, added_bytes: by family, what this run added.
    """

    run: str
    stage: str
    label: str
    state: str
    began: float
    seconds: float
    model: str = ""
    recipe: str = ""
    reason: str = ""
    proof: str = ""
    toolchain: str = ""
    image: str = ""
    host: str = ""
    builder: str = ""
    gpus: tuple[int, ...] = ()
    entries: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    added_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """What the file holds, the oldest line first. damaged: number of lines that are none. problem: of the file."""

    lines: tuple[HistoryLine, ...] = ()
    damaged: int = 0
    problem: str = ""


_KNOWN = frozenset(each.name for each in fields(HistoryLine))


def add(root: Path, line: HistoryLine) -> None:
    """Add a line. A root that takes none stays as it is: a history is no reason for a task to fail."""
    data = json.dumps(_plain(line), sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"
    if len(data) > LINE:
        return
    with contextlib.suppress(OSError, UnreadableError), _locked(root) as alone, Tree(root) as tree:
        descriptor = tree.open_file(NAME, os.O_RDWR | os.O_APPEND, create=True, mode=0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data  # a machine that lost power left half a line
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if alone and size + len(data) > LIMIT:
            kept = _tail(tree, LIMIT // 2)
            tree.write_atomically(NAME, kept.partition(b"\n")[2])


def add_task(root: Path, job: Job, verdict: Verdict, keys: Mapping[str, str]) -> None:
    """Add how a task ended. keys: its family keys, as far as they are known."""
    task = job.task or _NO_TASK
    line = HistoryLine(
        stage="task",
        label=task.label,
        state=verdict.state,
        model=task.model,
        recipe=task.recipe,
        reason=verdict.reason,
        proof=verdict.proof or "",
        toolchain=toolchain.digest(keys) if keys else "",
        gpus=job.gpus[: task.gpus],
        entries=verdict.entries,
        added=verdict.added,
        added_bytes=verdict.added_bytes,
        **_origin(job, verdict.seconds),
    )
    add(root, line)


def add_prebuild(root: Path, job: Job, made: KernelsPrebuilt, seconds: float) -> None:
    """Add what a prebuild made."""
    line = HistoryLine(
        stage="prebuild",
        label="prebuild",
        state="partial" if made.missing else "warmed",
        reason=f"{len(made.missing)} of its kernels are missing" if made.missing else "",
        added={"deep_gemm": made.made},
        added_bytes={"deep_gemm": made.bytes},
        **_origin(job, seconds),
    )
    add(root, line)


def _origin(job: Job, seconds: float) -> dict[str, Any]:
    origin = job.observed
    return {
        "began": time.time() - seconds,
        "seconds": seconds,
        "run": origin.run if origin else "",
        "image": origin.image if origin else "",
        "host": origin.host if origin else "",
        "builder": origin.builder if origin else "",
    }


def read(root: Path) -> History:
    """Return what the history of this root says, at most LIMIT bytes of it."""
    try:
        with Tree(root) as tree:
            if not tree.exists(NAME):
                return History()
            data = _tail(tree, LIMIT)
    except (OSError, UnreadableError) as error:
        return History(problem=f"{NAME} cannot be read: {printable(str(error))}")
    found, damaged = [], 0
    for raw in data.split(b"\n"):
        if raw.strip():
            line = _parsed(raw)
            damaged += line is None
            found += [line] if line is not None else []
    return History(tuple(sorted(found, key=lambda line: line.began)), damaged)


def _parsed(raw: bytes) -> HistoryLine | None:
    if len(raw) > LINE:
        return None
    try:
        data = json.loads(raw)
        if not isinstance(data, dict):
            return None
        # A later version may record more.
        known = {name: value for name, value in data.items() if name in _KNOWN}
        line = from_object(HistoryLine, known, "line", floats=(0.0, _MOST))
    except (ValueError, RecursionError):
        return None
    return from_object(HistoryLine, _plain(line), "line")


def _plain(line: HistoryLine) -> dict[str, object]:
    """Return the fields, their texts printable and short, and no number below zero."""
    data: dict[str, object] = asdict(line)
    for name, value in data.items():
        if isinstance(value, str):
            data[name] = shortened(printable(value), _TEXT)
        elif isinstance(value, dict):
            data[name] = {shortened(printable(key), 40): max(0, number) for key, number in list(value.items())[:64]}
        elif isinstance(value, (tuple, list)):
            data[name] = [max(0, number) for number in value[:64]]
        elif isinstance(value, float):
            data[name] = round(value, 3)
    return data


def _tail(tree: Tree, most: int) -> bytes:
    """Return the last bytes of the file. Raises OSError, UnreadableError."""
    descriptor, size = tree.open_regular(NAME)
    with os.fdopen(descriptor, "rb") as file:
        file.seek(max(0, size - most))
        return file.read(most)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[bool]:
    """Hold the lock of the writers; yield whether it was had in time."""
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = flock.open_lock(root / LOCK, create=True, root=root)
    try:
        until = time.monotonic() + _PATIENCE
        while descriptor is not None and not flock.try_lock(descriptor):
            if time.monotonic() >= until:
                yield False
                return
            threading.Event().wait(0.02)
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
