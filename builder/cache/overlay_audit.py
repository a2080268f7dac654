"""What a job did to its view: the upper layer against the generation below it and the merged view.

The upper layer belongs to an untrusted job. It is walked once, without following a link and within `AuditBounds`; only
regular files in it are opened, and nothing in it raises. A layer with more files than that is reported as such and not
judged; where bytes or seconds end first, what was found until then is reported with the reason.

A deletion is a device in the upper layer, and a directory that was deleted and made again hides what is below by an
attribute that only a privileged reader sees. So nothing here interprets the overlay's own marks: in a directory that
the upper layer has as well, whatever the generation has and the merged view has not was deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from builder.beneath import Tree
from builder.cache.entries import ProblemKind, problem_of
from builder.cache.families import FAMILY, Family, is_key
from builder.cache.findings import Audit, shape_of_lock, short, span, with_shapes
from builder.events import Finding
from builder.files import UnreadableError, matches
from builder.task import Shape


@dataclass(frozen=True)
class AuditBounds:
    """What one audit may cost. files: also directories, of the upper layer. bytes: that are compared."""

    files: int = 200_000
    bytes: int = 16 << 30
    seconds: float = 600.0  # the container has 900


#: Files that a use of the cache writes to at the top of a root.
_OURS = re.compile(r"locks/[^/]+\.lock")
_CHUNK = 1 << 20
#: A name of so many characters counts twice.
_LONG = 256


@dataclass(frozen=True)
class Layers:
    """The directories of a view. A path is trusted, with every directory above it.

    lower: the generation. upper: what the job wrote. merged: what the job sees, as it is mounted in this process.
    mount: where the job has it. created: of the view, seconds since the epoch.
    """

    lower: Path | Tree
    upper: Path | Tree
    merged: Path | Tree
    mount: str
    created: float


@dataclass
class _Touched:
    """What the upper layer has of one family directory. files: status by name. deleted: names of files."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)


class _TooMuchError(Exception):
    """An audit reached one of its bounds. The message is what was reached."""


class _Meter:
    """Counts what an audit costs. check: called from time to time, may raise."""

    def __init__(self, bounds: AuditBounds, check: Callable[[], None]) -> None:
        self._bounds, self._check = bounds, check
        self._files, self._bytes = 0, 0
        self._until = time.monotonic() + bounds.seconds

    @property
    def left(self) -> int:
        """Return how many names of a directory are worth listing."""
        return self._bounds.files - self._files + 1

    def files(self, number: int) -> None:
        """Count files of the upper layer. Raises _TooMuchError."""
        self._files += number
        if self._files > self._bounds.files:
            raise _TooMuchError(f"more than {self._bounds.files} files were written")
        self.pause()

    def bytes(self, number: int) -> None:
        """Count bytes that are compared. Raises _TooMuchError."""
        self._bytes += number
        if self._bytes > self._bounds.bytes:
            raise _TooMuchError(f"more than {self._bounds.bytes} bytes would have to be compared")
        self.pause()

    def pause(self) -> None:
        """Look at the clock. Raises _TooMuchError, and what `check` raises."""
        self._check()
        if time.monotonic() > self._until:
            raise _TooMuchError(f"it took more than {self._bounds.seconds:.0f} s")


def audit(layers: Layers, *, now: float, check: Callable[[], None], bounds: AuditBounds | None = None) -> Audit:
    """Return everything that the job changed, or as much of it as the bounds allow.

    now: seconds since the epoch. check: called from time to time, may raise.
    """
    found, meter = Audit(), _Meter(bounds or AuditBounds(), check)
    trees = _Trees(Tree.of(layers.lower), Tree.of(layers.upper), Tree.of(layers.merged), meter)
    places: dict[tuple[str, str], _Touched] = {}
    locks: list[tuple[float, Shape]] = []
    try:
        for name, status in _walk(trees.upper, meter):
            _sort(trees, name, status, places, found)
    except _TooMuchError as reached:
        found.findings.clear()
        found.truncated = f"{reached}: none was judged"
        return found
    for (name, _), touched in places.items():
        for file, status in touched.files.items():
            shape = shape_of_lock(file) if name == "deep_gemm" else None
            if shape is not None and stat.S_ISREG(status.st_mode):
                locks.append((status.st_mtime, shape))
    try:
        for (name, key), touched in sorted(places.items()):
            place = _Place(trees, layers, FAMILY[name], key, now)
            for finding in place.judge(touched, found):
                found.findings.append(finding)
    except _TooMuchError as reached:
        found.truncated = f"{reached}: not all was judged"
    found.asked = sorted({shape for _, shape in locks})
    found.findings = sorted(with_shapes(found.findings, locks))
    return found


@dataclass(frozen=True)
class _Trees:
    """The layers as they are read."""

    lower: Tree
    upper: Tree
    merged: Tree
    meter: _Meter


def _walk(tree: Tree, meter: _Meter) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield everything below: (name, status, or None for an unreadable directory). Raises _TooMuchError."""
    stack = [""]
    while stack:
        above = stack.pop()
        items = tree.some(above, meter.left)
        if items is None:
            yield above, None
            continue
        for item in items:
            meter.files(1 + len(item.name) // _LONG)
            try:
                status = item.stat()
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode):
                if tree.is_too_deep(item.name):
                    yield item.name, None
                    continue
                stack.append(item.name)
            yield item.name, status


def _sort(
    trees: _Trees,
    name: str,
    status: os.stat_result | None,
    places: dict[tuple[str, str], _Touched],
    found: Audit,
) -> None:
    """Add one file of the upper layer to its family directory, or to the findings."""
    family, _, rest = name.partition("/")
    key, _, below = rest.partition("/")
    at_home = family in FAMILY and is_key(key)
    touched = places.setdefault((family, key), _Touched()) if at_home else None
    if status is None:
        found.findings.append(Finding("", "", "foreign", short(name), "a directory that cannot be read"))
        return
    if stat.S_ISDIR(status.st_mode):
        for gone in _missing(trees, name):
            _lost(trees, gone, places, found)
        return
    if _is_whiteout(status):
        return  # found by its directory, which is in the upper layer as well
    if touched is not None and below:
        touched.files[below] = status
    elif not _OURS.fullmatch(name) and not _equal(trees, name, status):
        own = trees.lower.exists(name)
        detail = "that differs from the cache's own; no other job sees it" if own else "of no family"
        found.findings.append(Finding("", "", "foreign", short(name), f"{_kind_of(status)} {detail}"))


def _missing(trees: _Trees, name: str) -> list[str]:
    """Return what the generation has in this directory and the merged view has not, or has as another kind."""
    gone = []
    for item in trees.lower.listing(name) or ():
        try:
            now = trees.merged.lstat(item.name).st_mode
        except OSError:
            now = 0
        if stat.S_IFMT(now) != stat.S_IFMT(item.stat().st_mode):
            gone.append(item.name)
    return gone


def _lost(trees: _Trees, name: str, places: dict[tuple[str, str], _Touched], found: Audit) -> None:
    """Add a deleted file or directory of the generation to its family directory, or to the findings."""
    parts = name.split("/")
    if parts[0] not in FAMILY:
        found.findings.append(Finding("", "", "deleted", short(name)))
        return
    keys = [parts[1]] if len(parts) > 1 else [item.last for item in trees.lower.listing(parts[0]) or ()]
    for key in keys:
        if is_key(key):
            touched = places.setdefault((parts[0], key), _Touched())
            touched.deleted.update(_files_below(trees.lower, f"{parts[0]}/{key}", parts[2:]))
        else:
            found.findings.append(Finding("", "", "deleted", short(f"{parts[0]}/{key}")))


def _files_below(lower: Tree, place: str, parts: list[str]) -> Iterator[str]:
    """Yield the names, from a family directory, of all files at or below this in a generation."""
    start = "/".join([place, *parts])
    if not lower.is_dir(start):
        yield "/".join(parts)
        return
    yield from (name[len(place) + 1 :] for name, item in lower.walk(start) if item is not None and not item.is_dir)


class _Place:
    """One family directory of a view."""

    def __init__(self, trees: _Trees, layers: Layers, family: Family, key: str, now: float) -> None:
        self._family, self._key, self._trees = family, key, trees
        self._lower = trees.lower.below(f"{family.name}/{key}")
        self._merged = trees.merged.below(f"{family.name}/{key}")
        self._mount, self._created, self._now = layers.mount, layers.created, now

    def judge(self, touched: _Touched, found: Audit) -> Iterator[Finding]:
        """Yield findings about every entry that was touched, and about files that belong to none."""
        entries: dict[str, set[str]] = {}
        for name in {*touched.files, *touched.deleted}:
            if self._is_transient(name):
                continue
            entry = self._entry(name)
            if entry is None:
                yield self._finding("foreign", name, f"{_kind_of(touched.files.get(name))} that is part of no entry")
            else:
                entries.setdefault(entry, set()).add(name)
        for entry, names in sorted(entries.items()):
            self._trees.meter.pause()
            finding, used = self._entry_finding(entry, names, touched)
            found.used += used
            if finding is not None:
                yield finding

    def _entry_finding(self, entry: str, names: set[str], touched: _Touched) -> tuple[Finding | None, bool]:
        family = self._family
        before = problem_of(family, self._lower, entry, self._mount) is None
        odd = next((name for name in sorted(names) if self._is_odd(touched.files.get(name))), None)
        if odd is not None:
            # Never opened: a device may do anything.
            detail = f"{short(odd.rpartition('/')[2])} is {_kind_of(touched.files.get(odd))}"
            return self._finding("damaged" if before else "foreign", entry, detail), False
        after = problem_of(family, self._merged, entry, self._mount)
        if after is not None and after.kind is ProblemKind.MISSING:
            return (self._finding("deleted", entry) if before else None), False
        if after is not None:
            return self._finding("damaged" if before else "foreign", entry, after.text), False
        if not before:
            return self._made("compiled", entry), False
        lost = names & touched.deleted - touched.files.keys()
        if lost:
            return self._finding("damaged", entry, f"{short(min(lost).rpartition('/')[2])} is gone"), False
        # Stamps and logs are written by a mere use.
        changed = [
            name
            for name in names
            if not matches(name.rpartition("/")[2], (".committed", *family.rewritten))
            and not _equal(self._trees, f"{family.name}/{self._key}/{name}", touched.files.get(name))
        ]
        if changed:
            return self._made("rewritten", entry, f"{short(min(changed).rpartition('/')[2])} holds other bytes"), False
        return None, True

    def _made(self, kind: str, entry: str, detail: str = "") -> Finding:
        size, began, ended = span(self._family, self._merged, entry, earliest=self._created, latest=self._now)
        return self._finding(kind, entry, detail, bytes=size, began=began, ended=ended)

    def _finding(self, kind: str, name: str, detail: str = "", **more: float) -> Finding:
        return Finding(self._family.name, self._key, kind, short(name), detail, **more)  # type: ignore[arg-type]

    def _entry(self, name: str) -> str | None:
        """Return the entry that a file of this name is part of; None for one that can be part of none."""
        parts = name.split("/")
        match self._family.layout:
            case "deep_gemm":
                return "/".join(parts[:2]) if parts[0] == "cache" and len(parts) > 2 and "." in parts[1][1:] else None
            case "triton":
                return parts[0] if len(parts) > 1 else None
            case _:
                return name

    def _is_transient(self, name: str) -> bool:
        """Return whether the name is of a lock, a build in progress, or no compiler's."""
        parts = name.split("/")
        family = self._family
        return (
            any(matches(part, family.transient) for part in parts)
            or parts[0] in family.apart
            or (len(parts) == 1 and matches(name, family.host_specific))
        )

    @staticmethod
    def _is_odd(status: os.stat_result | None) -> bool:
        return status is not None and not stat.S_ISREG(status.st_mode)


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _kind_of(status: os.stat_result | None) -> str:
    if status is None:
        return "something"
    names = {
        stat.S_IFREG: "a file",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return names.get(stat.S_IFMT(status.st_mode), "something")


def _equal(trees: _Trees, name: str, status: os.stat_result | None) -> bool:
    """Return whether a file of the upper layer has the bytes of the generation's; times have no meaning."""
    if status is None or not stat.S_ISREG(status.st_mode):
        return False
    with contextlib.ExitStack() as stack:
        files = []
        for tree in (trees.lower, trees.upper):
            try:
                descriptor, size = tree.open_regular(name)
            except UnreadableError:
                return False
            files.append((stack.enter_context(os.fdopen(descriptor, "rb")), size))
        (one, its), (other, others) = files
        if its != others:
            return False
        try:
            while data := one.read(_CHUNK):
                trees.meter.bytes(len(data))
                if data != other.read(_CHUNK):
                    return False
        except OSError:
            return False
    return True
