"""What a cache root holds, as `retention` needs it: markers, memos, family directories, bytes and last uses.

Markers and memos are the roots, entries the objects. Reads only, follows no link, and never raises for what it finds.
Sizes are allocated blocks; a file with several names counts once.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builder import text
from builder.beneath import Tree
from builder.cache import layout, leaves, marker_files, marker_format, toolchain, usage
from builder.cache.entries import NAMES
from builder.cache.families import Family
from builder.cache.layout import family_directories
from builder.cache.memos import memos_in, records

#: Layouts with independent entries, so that one of them may be removed without the others.
ALONE = ("deep_gemm", "triton")

#: Directories of the root that belong to views.
VIEWS = ("generations", "views")


Dir = tuple[str, str]  # family, key


@dataclass(frozen=True)
class SurveyedMarker:
    """A marker. path: below the root. folder: name of its directory. task: its label, for people.

    toolchain: of the run that wrote it. keys, entries: by claimed family. image: id of the image of that run, or "".
    written, used: seconds since the epoch.
    """

    path: str
    folder: str
    task: str
    toolchain: str
    keys: Mapping[str, str]
    entries: Mapping[str, frozenset[str]]
    image: str
    written: float
    used: float

    @property
    def dirs(self) -> set[Dir]:
        return set(self.keys.items())


@dataclass(frozen=True)
class Memo:
    """One record of an image's memo. path: below the root, of the file.

    names: of the image. keys: of every family, on each machine that used the root, the last one first.
    toolchains: of these keys.
    """

    path: str
    names: frozenset[str]
    keys: tuple[Mapping[str, str], ...]
    toolchains: tuple[str, ...]
    written: float


@dataclass(frozen=True)
class Object:
    """A file or a tree. bytes: allocated. used: time of the last use, in seconds since the epoch."""

    bytes: int
    used: float


@dataclass(frozen=True)
class Holdings:
    """All that a root holds.

    strangers: reason by path of markers that this program cannot read. newer: one of them has another schema, so that
    its needs are unknown. dirs, entries: by family and key; entries only of what can be removed alone. bytes: of the
    root, without what only generations and views hold, which is `view_bytes`. numbers: of all entries, where counted.
    """

    marks: tuple[SurveyedMarker, ...]
    memos: tuple[Memo, ...]
    strangers: Mapping[str, str]
    newer: bool
    dirs: Mapping[Dir, Object]
    entries: Mapping[Dir, Mapping[str, Object]]
    bytes: int
    view_bytes: int = 0
    numbers: Mapping[Dir, int] = field(default_factory=dict)


def survey(root: Path, *, counted: bool = False) -> Holdings:
    """Return what the root holds, from one walk. counted: with the number of entries, valid or not."""
    accessed = usage.has_access_times(root)
    found, strangers = marks(root)
    measure = _Measure(accessed)
    dirs: dict[Dir, Object] = {}
    entries: dict[Dir, dict[str, Object]] = {}
    numbers: dict[Dir, int] = {}
    total, view_bytes = 0, 0
    apart = set()
    with Tree(root) as tree:
        for each in family_directories(root):
            with each.tree().read_once() as inner:
                names = list(_alone(each.family, inner))
                dirs[each.name], entries[each.name] = measure.split(inner, names)
                numbers[each.name] = sum(1 for _ in NAMES[each.family.layout](each.family, inner)) if counted else 0
            total += dirs[each.name].bytes
            apart.add(f"{each.family.name}/{each.key}")
        # Generations hold other names of the same files, so they are measured last.
        for item in sorted(tree.listing() or (), key=lambda item: item.name in VIEWS):
            size = measure.of(tree, item.name, apart).bytes
            total, view_bytes = (total, view_bytes + size) if item.name in VIEWS else (total + size, view_bytes)
    return Holdings(
        marks=tuple(found),
        memos=tuple(memos(root)),
        strangers={stranger.path: stranger.problem for stranger in strangers},
        newer=any(stranger.newer for stranger in strangers),
        dirs=dirs,
        entries=entries,
        bytes=total,
        view_bytes=view_bytes,
        numbers=numbers,
    )


def _alone(family: Family, tree: Tree) -> Iterator[str]:
    """Yield what of a family directory may be removed without the rest."""
    if family.looked_at:
        yield from leaves.every(family, tree)
    elif family.layout in ALONE:
        yield from NAMES[family.layout](family, tree)


def marks(root: Path) -> tuple[list[SurveyedMarker], list[marker_files.MarkerFile]]:
    """Return every marker, and the other files in their place."""
    readable, strangers = [], []
    for found in marker_files.every(root):
        if found.marker is None:
            strangers.append(found)
        else:
            readable.append(_surveyed(root, found, found.marker))
    return readable, strangers


def _surveyed(root: Path, found: marker_files.MarkerFile, marker: marker_format.Marker) -> SurveyedMarker:
    return SurveyedMarker(
        path=found.path,
        folder=found.folder,
        task=text.printable(marker.label or found.folder)[:200],
        toolchain=text.printable(str(marker.toolchain))[:40],
        keys=marker.keys,
        entries={family: frozenset(claim.entries) for family, claim in marker.claims.items()},
        image=marker.observed.image or "",
        written=found.written,
        used=usage.last(root, found.path, found.written),
    )


def memos(root: Path) -> Iterator[Memo]:
    """Yield every record of every image's memo that this program understands."""
    with Tree(root) as tree:
        for item in tree.listing("images") or ():
            if not item.last.endswith(".json") or item.last.startswith("."):
                continue
            try:
                written = item.stat().st_mtime
            except OSError:
                continue
            for memo in memos_in(root / item.name):
                keys = tuple(toolchain.family_keys(record) for record in records(root, memo))
                yield Memo(item.name, memo.names, keys, tuple(map(toolchain.digest, keys)), written)


@dataclass
class _Measure:
    """Adds up trees. A file with several names counts where it is met first. accessed: access times count as use."""

    accessed: bool
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def of(self, tree: Tree, name: str, apart: Collection[str] = ()) -> Object:
        try:
            return self._walk(tree, name, tree.lstat(name), apart)
        except OSError:
            return Object(0, 0.0)

    def split(self, tree: Tree, names: list[str]) -> tuple[Object, dict[str, Object]]:
        """Return the measure of a family directory, and of each of its entries."""
        entries = {name: self.of(tree, name) for name in names}
        rest = self.of(tree, "", entries)
        size = rest.bytes + sum(entry.bytes for entry in entries.values())
        return Object(size, max([rest.used, *(entry.used for entry in entries.values())])), entries

    def _walk(self, tree: Tree, name: str, status: os.stat_result, apart: Collection[str] = ()) -> Object:
        size, used = self._count(status), usage.touched(status, accessed=False)
        todo = [name] if stat.S_ISDIR(status.st_mode) else []
        if not todo:
            used = usage.touched(status, accessed=self.accessed)
        while todo:
            for item in tree.listing(todo.pop()) or ():
                if item.name in apart:
                    continue
                try:
                    status = item.stat()
                except OSError:
                    continue
                size += self._count(status)
                # Listing a directory changes its access time, and is no use of its content.
                is_dir = stat.S_ISDIR(status.st_mode)
                used = max(used, usage.touched(status, accessed=self.accessed and not is_dir))
                if is_dir and not tree.is_too_deep(item.name):
                    todo.append(item.name)
        return Object(size, used)

    def _count(self, status: os.stat_result) -> int:
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in self._seen:
                return 0
            self._seen.add((status.st_dev, status.st_ino))
        return status.st_blocks * 512


def samples(root: Path) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Yield what a cache root holds as metrics: name, value, labels.

    A family directory counts for every toolchain that uses it.
    """
    found = survey(root, counted=True)
    users: dict[Dir, set[str]] = {}
    for memo in found.memos:
        for keys, name in zip(memo.keys, memo.toolchains, strict=True):
            for place in keys.items():
                users.setdefault(place, set()).add(name)
    for place, item in sorted(found.dirs.items()):
        entries = found.numbers[place]
        for name in sorted(users.get(place, {"none"})):
            labels = {"family": place[0], "key": place[1], "toolchain": name}
            yield "entries", entries, labels
            yield "entries_size_bytes", item.bytes, labels
    yield "size_bytes", found.bytes + found.view_bytes, {}
    yield "quarantined_entries", quarantined(root), {}
    disk = shutil.disk_usage(root)
    yield "filesystem_free_bytes", disk.free, {}
    yield "filesystem_size_bytes", disk.total, {}


def quarantined(root: Path) -> int:
    """Return how many entries and leftovers are in quarantine."""
    with Tree(root, layout.QUARANTINE) as tree:
        return sum(len(tree.listing(item.name) or ()) for item in tree.listing() or () if item.is_dir)
