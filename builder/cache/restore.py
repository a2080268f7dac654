"""Restores a cache image into a cache root: unpacked beside it, verified, then put in place by renames, markers last.

Step by step, and what is there after a kill at each:

1. Layers are unpacked into ``staging/<random>``, below the root and closed to others. Every byte is verified against
   the manifest, every name and kind of file is one that a layer of ours has, and every entry is valid by itself. The
   cache has not changed; the next restore, or a sweep, removes what a killed one left.
2. Entries get their places one by one. What is valid stays. After a kill there are more valid entries, and no marker.
3. All of it is flushed to the disk, then memos and markers are written: a marker only when every entry that it lists is
   valid where it is now.

The caller holds the run lock. Exact times are those of the machine that packed, to the nanosecond.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from builder import files, flock
from builder.beneath import Tree
from builder.cache import inventory, layout, marker_files, marker_writing, memos, toolchain, usage
from builder.cache.cache_image import INDEX, CacheImage, Layer, PackedFamily
from builder.cache.families import FAMILY, Family
from builder.cache.layer_tar import HostileLayerError, Member, members
from builder.cache.marker_format import Marker
from builder.cache.packing import OnLayer, blob_name
from builder.cache.placement import Placed, place
from builder.cache.restored import Restored, remember
from builder.files import matches
from builder.text import printable, size

#: Bytes of a document of times; seconds to wait for a process that removes something of a family.
_TIMES_LIMIT, _PATIENCE = 32 << 20, 30.0
#: Bytes that a file takes besides its own, and those that stay free.
_PER_FILE, _SPARE = 4096, 64 << 20


class RefusedImageError(Exception):
    """The image is not what it says, or holds what no image of ours does. The message is the reason."""


class RestoreBusyError(Exception):
    """Another process has what is needed. The message names it."""


@dataclass(frozen=True)
class RestoreRequest:
    """What to restore. digest, source: of the manifest, and where it is from. families: those that fit.

    keys: digest of the family keys of this environment. mount: the root as its users see it.
    """

    digest: str
    source: str
    image: CacheImage
    families: tuple[tuple[str, str], ...]
    keys: str
    mount: str


@dataclass(frozen=True)
class FamilyRestored:
    """What became of one family directory, in entries."""

    family: str
    key: str
    added: int
    kept: int
    quarantined: int


@dataclass(frozen=True)
class RestoreResult:
    """What was restored. markers: paths of those that were written. left: what was not, one sentence each."""

    families: tuple[FamilyRestored, ...] = ()
    markers: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    bytes: int = 0

    @property
    def added(self) -> int:
        """Entries that were not there."""
        return sum(each.added for each in self.families)


def restore(
    root: Path,
    blobs: Path,
    request: RestoreRequest,
    check: Callable[[], None] = lambda: None,
    on_layer: OnLayer = lambda _name, _done, _total: None,
) -> RestoreResult:
    """Restore an image whose blobs are in a directory, each named by its digest. Raises RefusedImageError,
    RestoreBusyError, OSError and LayoutError; the root is then as whole as it was. check: may raise.
    """
    layout.prepare(root)
    with _locked(root, request) as stack:
        clear_staging(root)
        name = f"{layout.STAGING}/{os.urandom(8).hex()}"
        with Tree(root) as tree:
            layout.close(tree, layout.STAGING, make=True)
            tree.make_folder(name, mode=layout.CLOSED_MODE)
        stack.callback(_remove, root, name)
        staged = _stage(root, name, blobs, request, check, on_layer)
        check()
        return _publish(root, name, request, staged, check)


def unpack_index(blob: Path, layer: Layer, out: Path) -> None:
    """Unpack the layer of markers and memos into a directory of this process's own. Raises RefusedImageError."""
    try:
        with blob.open("rb") as source, Tree(out) as target:
            for member, content in members(source, layer):
                _unpack(target, layer, member, content, {})
    except HostileLayerError as error:
        raise RefusedImageError(f"layer {layer.name} ({layer.digest[:19]}…) is refused: {error}") from None


def clear_staging(root: Path) -> list[str]:
    """Remove what killed restores left; return their names. The caller holds `layout.staging_lock`. Raises OSError."""
    with Tree(root) as tree:
        found = [item.name for item in tree.some(layout.STAGING, 1000) or ()]
        for name in found:
            _discard(tree, name)
    return found


def sweep_staging(root: Path) -> list[str]:
    """Remove what killed restores left, unless one is at work; return their names. Raises OSError."""
    with Tree(root) as tree:
        if not tree.some(layout.STAGING, 1):
            return []
    descriptor = flock.open_lock(layout.staging_lock(root), create=True, root=root)
    try:
        return clear_staging(root) if flock.try_lock(descriptor) else []
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(root: Path, request: RestoreRequest) -> Iterator[contextlib.ExitStack]:
    """Hold the lock of restores, and each family shared: what removes something of a family has it exclusively."""
    with contextlib.ExitStack() as stack:
        paths = [(layout.staging_lock(root), False, "another restore works on this cache")]
        for family, key in request.families:
            path = layout.family_lock(root, family, key)
            paths.append((path, True, f"another process removes something of {family}/{key}"))
        for path, shared, busy in paths:
            descriptor = flock.open_lock(path, create=True, root=root)
            stack.callback(os.close, descriptor)
            limit = time.monotonic() + _PATIENCE
            while not flock.try_lock(descriptor, shared=shared):
                if time.monotonic() > limit:
                    raise RestoreBusyError(busy)
                threading.Event().wait(0.05)
        yield stack


def _remove(root: Path, name: str) -> None:
    with contextlib.suppress(OSError), Tree(root) as tree:
        _discard(tree, name)


def _discard(tree: Tree, name: str) -> None:
    """Delete what is in staging: one file first, since a full disk has no room for what a removal makes."""
    for path, item in tree.walk(name):
        if item is not None and item.is_file:
            tree.unlink(path)
            break
    tree.remove(name)


# --- unpacking beside ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Staged:
    """What a family directory has in staging: names of its files, and exact times in ns."""

    names: list[str]
    times: dict[str, int]


def _stage(
    root: Path, name: str, blobs: Path, request: RestoreRequest, check: Callable[[], None], on_layer: OnLayer
) -> dict[tuple[str, str], _Staged]:
    """Unpack and verify the layers of the families that fit, and the last one."""
    image, wanted = request.image, set(request.families)
    layers = [layer for layer in image.layers if not layer.family or (layer.family, layer.key) in wanted]
    _require_space(root, layers)
    staged = {pair: _Staged([], {}) for pair in request.families}
    for done, layer in enumerate(layers):
        on_layer(layer.name, done, len(layers))
        try:
            with (blobs / blob_name(layer.digest)).open("rb") as source, Tree(root, name) as target:
                for member, content in members(source, layer, check):
                    _unpack(target, layer, member, content, staged)
        except HostileLayerError as error:
            raise RefusedImageError(f"layer {layer.name} ({layer.digest[:19]}…) is refused: {error}") from None
    for family in image.description.families:
        if (family.family, family.key) in wanted:
            _validate(root, name, family, staged[family.family, family.key], request.mount)
    return staged


def _require_space(root: Path, layers: list[Layer]) -> None:
    needed = sum(layer.bytes + layer.files * _PER_FILE for layer in layers) + _SPARE
    status = os.statvfs(root)
    if status.f_bavail * status.f_frsize < needed:
        free = size(status.f_bavail * status.f_frsize)
        raise OSError(28, f"it takes {size(needed)} to restore, and {free} are free", str(root))


def _unpack(
    target: Tree,
    layer: Layer,
    member: Member,
    content: Iterator[bytes],
    staged: Mapping[tuple[str, str], _Staged],
) -> None:
    """Write one member below the staging directory, if its layer may hold it."""
    if layer.family:
        place, known = f"{layer.family}/{layer.key}", staged[layer.family, layer.key]
        if not member.is_dir and re.fullmatch(rf"{place}\.mtime_ns(\.[0-9a-f])?\.json", member.name):
            known.times.update(_times(content, member.size))
            return
        if not member.is_dir and member.name == f"{place}.json":
            return  # what the key stands for is in the description, too
        if member.name.startswith(f"{place}/"):
            below = member.name[len(place) + 1 :]
            if problem := _unwanted(FAMILY[layer.family], below):
                raise HostileLayerError(f"it holds {printable(below)[:200]}, {problem}")
            if not member.is_dir:
                known.names.append(below)
        elif not (member.is_dir and member.name in ("", layer.family, place)):
            raise HostileLayerError(f"it holds {printable(member.name)[:200]}, which is not of {place}")
    elif member.name and member.name.partition("/")[0] not in INDEX:
        raise HostileLayerError(f"it holds {printable(member.name)[:200]}, which is neither marker nor memo")
    if member.is_dir:
        if member.name:
            target.make_folder(member.name)
        return
    if above := member.name.rpartition("/")[0]:
        target.make_folder(above)
    descriptor = target.new_file(member.name, 0o755 if member.executable else 0o644)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for data in content:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]


def _unwanted(family: Family, name: str) -> str:
    """Return why a file of this name is never part of this family's layer, or ""."""
    parts = name.split("/")
    if family.layout == "files" and (parts[0] in family.apart or matches(parts[0], family.host_specific)):
        return "which is no kernel, or true on one host alone"
    if any(matches(part, family.transient) for part in parts):
        return "a lock or a temporary file"
    return ""


def _times(content: Iterator[bytes], length: int) -> dict[str, int]:
    if length > _TIMES_LIMIT:
        raise HostileLayerError("its times take too many bytes")
    try:
        document = files.parsed(b"".join(content))
    except files.UnreadableError as error:
        raise HostileLayerError(f"its document of times {error}") from None
    sound = isinstance(document, dict) and all(type(ns) is int and 0 <= ns < 1 << 62 for ns in document.values())
    if not sound:
        raise HostileLayerError("its document of times holds something else")
    found: dict[str, int] = document
    return found


def _validate(root: Path, name: str, family: PackedFamily, staged: _Staged, mount: str) -> None:
    """Raise RefusedImageError unless every staged file is part of a valid entry of the family, under its key."""
    kind, place = FAMILY[family.family], f"{family.family}/{family.key}"
    if toolchain.key_of(family.family, family.factors) != family.key:
        raise RefusedImageError(f"{place}: the key is not that of the factors which the image names")
    with Tree(root, f"{name}/{place}") as tree:
        found = inventory.scan(kind, tree, mount=mount)
        if found.invalid:
            entry = min(found.invalid)
            text = f"{place}/{printable(entry)[:200]}: {found.invalid[entry]}"
            raise RefusedImageError(f"an entry is not valid: {text}")
        for each in staged.names:
            depth = {"deep_gemm": 2, "triton": 1}.get(kind.layout)
            if ("/".join(each.split("/")[:depth]) if depth else each) not in found.valid:
                raise RefusedImageError(f"{place}/{printable(each)[:200]} is part of no entry")
        folders = {"/".join(parts[:end]) for parts in map(_parts, staged.names) for end in range(1, len(parts))}
        if not staged.times.keys() <= folders.union(staged.names):
            raise RefusedImageError(f"{place}: there are times for what is not there")


def _parts(name: str) -> list[str]:
    return name.split("/")


# --- putting in place ------------------------------------------------------------------------------------------------


def _publish(
    root: Path,
    name: str,
    request: RestoreRequest,
    staged: Mapping[tuple[str, str], _Staged],
    check: Callable[[], None],
) -> RestoreResult:
    rows: list[FamilyRestored] = []
    left: list[str] = []
    for family in request.image.description.families:
        pair = family.family, family.key
        if pair in staged:
            check()
            layout.describe_family(root, *pair, family.factors)
            tree = Tree(root, f"{name}/{pair[0]}/{pair[1]}")
            placed = place(root, tree, FAMILY[pair[0]], pair[1], staged[pair].times, mount=request.mount)
            rows.append(_row(pair, placed))
            left += placed.left
    files.flush(root)
    check()
    below = root / name
    memos.adopt(root, below)
    written = tuple(_markers(root, below, request, left))
    total = sum(layer.bytes for layer in request.image.layers if (layer.family, layer.key) in staged)
    remember(
        root,
        Restored(
            digest=request.digest,
            source=request.source,
            time=request.image.description.time,
            restored=int(time.time()),
            keys=request.keys,
            markers=written,
        ),
    )
    return RestoreResult(tuple(rows), written, tuple(left), total)


def _row(pair: tuple[str, str], placed: Placed) -> FamilyRestored:
    return FamilyRestored(*pair, placed.added, placed.kept, placed.quarantined)


def _markers(root: Path, below: Path, request: RestoreRequest, left: list[str]) -> Iterator[str]:
    """Publish each marker whose families were all taken, and whose entries are all valid where they are now."""
    taken = set(request.families)
    for item in marker_files.every(below):
        marker = item.marker
        if marker is None:
            left.append(f"{item.path}: {item.problem}")
            continue
        strange = sorted(family for family, claim in marker.claims.items() if (family, claim.key) not in taken)
        if strange:
            left.append(f"{printable(marker.label)}: its {', '.join(strange)} does not fit here")
            continue
        bad = _first_bad(root, marker, request.mount)
        if bad:
            left.append(f"{printable(marker.label)}: {bad}")
            continue
        others = {**marker.observed.others, "restored": request.digest}
        yield _written(root, replace(marker, observed=replace(marker.observed, others=others)), request.mount)


def _written(root: Path, marker: Marker, mount: str) -> str:
    """Publish a marker, unless one of this machine's own that is as new holds; return its path."""
    path = marker_writing.path_of(marker)
    with Tree(root) as tree:
        before = marker_files.read_in(tree, path)
    if before is None or before.written < marker.written or _first_bad(root, before, mount):
        return marker_writing.publish(root, marker)
    usage.stamp(root, path)
    return path


def _first_bad(root: Path, marker: Marker, mount: str) -> str:
    for family, claim in marker.claims.items():
        with Tree(root, f"{family}/{claim.key}") as tree:
            for entry in claim.entries:
                if problem := inventory.check(FAMILY[family], tree, entry, mount=mount):
                    return f"{family}/{printable(entry)[:200]}: {problem}"
    return ""
