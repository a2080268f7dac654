"""Packs what markers of a cache root claim into the layers of a cache image. Reads the root, and writes elsewhere.

Nothing private is packed: of a marker no host, no run and no name of an image; of memos no variable but those that the
packed tasks have, and no UUID of a GPU; of a family what the markers claim and nothing else, so that locks, temporary
files, leftovers and whatever is true of one host alone stay where they are. What programs log next to their kernels
stays too, and the marker that travels does not list it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder import files
from builder.beneath import Tree
from builder.cache import inventory, marker_files, marker_format, memos, toolchain
from builder.cache.cache_image import MOST_BYTES, MOST_FILES, SPLIT_ABOVE, Layer, PackedFamily, PackedTask, encoded
from builder.cache.families import FAMILIES, FAMILY, Family
from builder.cache.layer_tar import CONSTANT, ChangedError, LayerWriter
from builder.cache.marker_format import Claim, Marker
from builder.files import matches
from builder.text import printable

#: Names of files that programs log to, in families whose entries are files: paths, times and names of one machine.
LOGS = ("*.log",)
#: Of a marker's circumstances, those without a name that are of use elsewhere.
_KEPT = ("builder", "time", "compiled-on")
#: The stamp that a hit touches.
_STAMP = ".committed"

#: Receives the name of a layer that is being packed, and how many of how many are done.
OnLayer = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PackRequest:
    """What to pack. markers: paths below the root, of markers that hold. mount: the root as its users see it.

    images, envs: names of the images whose memos travel, and the environments of tasks that these are of.
    """

    markers: tuple[str, ...]
    mount: str
    images: tuple[str, ...] = ()
    envs: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Packed:
    """The layers, in their order, and what they hold. omitted: what was left out, one sentence each."""

    layers: tuple[Layer, ...]
    families: tuple[PackedFamily, ...]
    tasks: tuple[PackedTask, ...]
    omitted: tuple[str, ...] = ()


@dataclass
class _Directory:
    """What is packed of one family directory. entries: names."""

    family: Family
    key: str
    factors: Mapping[str, Any]
    entries: set[str] = field(default_factory=set)


def pack(
    root: Path,
    out: Path,
    request: PackRequest,
    check: Callable[[], None] = lambda: None,
    on_layer: OnLayer = lambda _name, _done, _total: None,
) -> Packed:
    """Write the layers into a directory, each named by the hex digits of its digest, and return what they are.

    Raises ChangedError where the root changes meanwhile, OSError where the directory has no room. check: may raise.
    """
    found, omitted = _markers(root, request.markers)
    directories = _directories(found.values())
    tasks = [_task(marker) for marker in found.values()]
    parts = [part for each in directories for part in _parts(root, each, request.mount, check)]
    if sum(part.bytes for part in parts) > MOST_BYTES or sum(len(part.files) for part in parts) > MOST_FILES:
        raise ChangedError(f"it has more than {MOST_BYTES >> 30} GiB or {MOST_FILES} files, which no image may have")
    layers: list[Layer] = []
    for done, part in enumerate(parts):
        on_layer(part.name, done, len(parts) + 1)
        with _layer(out, part.which, layers) as writer:
            _fill(writer, root, part, check)
    on_layer("markers and memos", len(parts), len(parts) + 1)
    index = _index(root, found, request)
    with _layer(out, {}, layers) as writer:
        _fill_index(writer, index)
    families = tuple(
        PackedFamily(
            each.family.name,
            each.key,
            dict(each.factors),
            len(each.entries),
            sum(layer.bytes for layer in layers if (layer.family, layer.key) == (each.family.name, each.key)),
        )
        for each in directories
    )
    return Packed(tuple(layers), families, tuple(tasks), tuple(omitted))


# --- what is packed --------------------------------------------------------------------------------------------------


def _markers(root: Path, paths: Collection[str]) -> tuple[dict[str, Marker], list[str]]:
    """Return the markers as they travel, by path."""
    found, omitted = {}, []
    with Tree(root) as tree:
        for path in sorted(set(paths)):
            marker = marker_files.read_in(tree, path)
            if marker is None:
                raise ChangedError(f"{printable(path)} was there, and is no marker any more")
            other = [
                name for name, claim in marker.claims.items() if toolchain.key_of(name, claim.factors) != claim.key
            ]
            if other:
                omitted.append(f"{printable(marker.label)}: its key of {other[0]} is not this program's")
            else:
                found[path] = _travelling(marker)
    return found, omitted


def _travelling(marker: Marker) -> Marker:
    """Return the marker without what is of one machine alone."""
    claims = {
        family: Claim(claim.key, claim.factors, tuple(name for name in claim.entries if _travels(FAMILY[family], name)))
        for family, claim in marker.claims.items()
    }
    known = marker.observed
    others = {name: known.others[name] for name in _KEPT if isinstance(known.others.get(name), (str, int))}
    return replace(marker, claims=claims, observed=replace(known, run=None, others=others))


def _travels(family: Family, entry: str) -> bool:
    if family.layout != "files":
        return True
    first, parts = entry.partition("/")[0], entry.split("/")
    return not (
        first in family.apart
        or matches(first, family.host_specific)
        or matches(parts[-1], LOGS)
        or any(matches(part, family.transient) for part in parts)
    )


def _task(marker: Marker) -> PackedTask:
    model = marker.coverage.get("model")
    return PackedTask(marker.label, model if isinstance(model, str) else "", marker.proof, marker.keys)


def _directories(found: Iterable[Marker]) -> list[_Directory]:
    known: dict[tuple[str, str], _Directory] = {}
    for marker in found:
        for name, claim in marker.claims.items():
            each = known.setdefault((name, claim.key), _Directory(FAMILY[name], claim.key, claim.factors))
            each.entries.update(claim.entries)
    order = [family.name for family in FAMILIES]
    return sorted(known.values(), key=lambda each: (order.index(each.family.name), each.key))


# --- family directories ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A family directory, or one part of it. files: names from there, sorted."""

    directory: _Directory
    digit: str
    files: tuple[str, ...]
    bytes: int

    @property
    def which(self) -> dict[str, str]:
        return {"family": self.directory.family.name, "key": self.directory.key, "part": self.digit}

    @property
    def place(self) -> str:
        return f"{self.directory.family.name}/{self.directory.key}"

    @property
    def name(self) -> str:
        return self.place + (f" ({self.digit})" if self.digit else "")


def _parts(root: Path, directory: _Directory, mount: str, check: Callable[[], None]) -> Iterator[_Part]:
    """Yield the parts of a family directory. Raises ChangedError for an entry that is not valid."""
    digits: dict[str, tuple[list[str], list[int]]] = {}
    family = directory.family
    with Tree(root, f"{family.name}/{directory.key}") as tree:
        for entry in sorted(directory.entries):
            check()
            if problem := inventory.check(family, tree, entry, mount=mount):
                raise ChangedError(f"{family.name}/{printable(entry)[:200]} was valid, and is not any more: {problem}")
            names, sizes = digits.setdefault(_digit(entry), ([], []))
            for name in _names(family, tree, entry):
                names.append(name)
                sizes.append(tree.lstat(name).st_size)
    total = sum(sum(sizes) for _, sizes in digits.values())
    if total <= SPLIT_ABOVE:
        every = sorted(name for names, _ in digits.values() for name in names)
        yield _Part(directory, "", tuple(every), total)
        return
    for digit, (names, sizes) in sorted(digits.items()):
        yield _Part(directory, digit, tuple(sorted(names)), sum(sizes))


def _digit(entry: str) -> str:
    return hashlib.sha256(entry.encode("utf-8", "surrogateescape")).hexdigest()[0]


def _names(family: Family, tree: Tree, entry: str) -> Iterator[str]:
    """Yield the names of an entry's files."""
    if family.layout == "files":
        yield entry
        return
    for name, item in tree.walk(entry, family.transient):
        if item is not None and item.is_file:
            yield name


def _fill(writer: LayerWriter, root: Path, part: _Part, check: Callable[[], None]) -> None:
    """Write the layer of a part: directories, files, what the key stands for, and exact times."""
    family, times = part.directory.family, {}
    for above in ("", family.name, part.place):
        writer.folder(above)
    folders = _above(part.files)
    with Tree(root, part.place) as tree:
        for name in sorted({*folders, *part.files}):
            check()
            is_file = name not in folders
            last = name.rpartition("/")[2]
            dated = not family.timeless and not (is_file and (last == _STAMP or matches(last, family.rewritten)))
            try:
                mtime = tree.lstat(name).st_mtime_ns
                if is_file:
                    _file(writer, tree, name, f"{part.place}/{name}", mtime // 10**9 if dated else CONSTANT)
                else:
                    writer.folder(f"{part.place}/{name}", mtime // 10**9 if dated else CONSTANT)
            except (FileNotFoundError, files.UnreadableError) as error:
                raise ChangedError(f"{part.place}/{printable(name)} cannot be read any more: {error}") from None
            if dated:
                times[name] = mtime
    document = {"schema": 1, "family": family.name, "key": part.directory.key, "factors": part.directory.factors}
    if part.digit in ("", "0"):
        writer.data(f"{part.place}.json", json.dumps(document, indent=1).encode("ascii") + b"\n")
    if times:
        suffix = f".{part.digit}" if part.digit else ""
        writer.data(f"{part.place}.mtime_ns{suffix}.json", encoded(times))


def _file(writer: LayerWriter, tree: Tree, name: str, path: str, mtime: int) -> None:
    descriptor, _ = tree.open_regular(name)
    try:
        writer.file(path, descriptor, mtime)
    finally:
        os.close(descriptor)


# --- markers and memos -----------------------------------------------------------------------------------------------


def _index(root: Path, found: Mapping[str, Marker], request: PackRequest) -> dict[str, bytes]:
    """Return the files of the last layer by name."""
    documents = {path: marker_format.encoded(marker) for path, marker in found.items()}
    for name, document in memos.exported(root, request.images, request.envs).items():
        documents[f"{memos.FOLDER}/{name}"] = encoded(document)
    return documents


def _above(names: Iterable[str]) -> set[str]:
    """Return the names of all directories above these files."""
    return {"/".join(parts[:end]) for name in names if (parts := name.split("/")) for end in range(1, len(parts))}


def _fill_index(writer: LayerWriter, documents: Mapping[str, bytes]) -> None:
    folders = _above(documents)
    writer.folder("")
    for name in sorted({*folders, *documents}):
        if name in folders:
            writer.folder(name)
        else:
            writer.data(name, documents[name])


@contextlib.contextmanager
def _layer(out: Path, which: Mapping[str, str], layers: list[Layer]) -> Iterator[LayerWriter]:
    """Yield the writer of one layer, and keep the layer in the directory and in the list."""
    temporary = out / f".{os.urandom(8).hex()}.tmp"
    try:
        with temporary.open("xb") as file:
            writer = LayerWriter(file)
            yield writer
            layer = writer.finish(**which)
        temporary.rename(out / blob_name(layer.digest))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    layers.append(layer)


def blob_name(digest: str) -> str:
    """Return the name of a blob's file."""
    return digest.partition(":")[2]
