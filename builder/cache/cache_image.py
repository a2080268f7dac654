"""What a cache image is: the names in its layers, and what its labels say, as both sides of a registry read it.

A cache image is an OCI image from scratch. Each of its layers holds one family directory (or a sixteenth of a large
one), the last one markers and memos, all below ``io.sglang.warm-cache/``::

    io.sglang.warm-cache/<family>/<key>/…                 the entries that the markers claim
    io.sglang.warm-cache/<family>/<key>.json              what the key stands for
    io.sglang.warm-cache/<family>/<key>.mtime_ns.json     exact times, of families in which a build compares them
    io.sglang.warm-cache/<family>/<key>.mtime_ns.<digit>.json   the same of a sixteenth
    io.sglang.warm-cache/markers/…, io.sglang.warm-cache/images/…

The labels of its config, which are the annotations of its manifest too, say what a machine has to know before it loads
a layer: one small request decides.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from builder import files
from builder.cache.families import FAMILY, is_key
from builder.typed_json import from_object

#: Begins every label, and every name in a layer.
PREFIX = "io.sglang.warm-cache"
LABEL = f"{PREFIX}.description"
LABEL_LAYER = f"{PREFIX}.layer"
ARTIFACT_TYPE = "application/vnd.sglang.warm-cache.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"

SCHEMA = 1
#: Bytes of a manifest that is read; registries take no larger one than 4 MiB.
MANIFEST_LIMIT = 4 << 20
#: Bytes of a family directory above which it is split, by the first hex digit of the digest of an entry's name.
SPLIT_ABOVE = 256 << 20
#: Bytes and files of one image above which none is made, and none restored.
MOST_BYTES, MOST_FILES = 64 << 30, 500_000
#: Folders of the last layer.
INDEX = ("markers", "images")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SLUG = re.compile(r"[^a-z0-9]+")
_TAG = re.compile(r"(?P<gpu>[a-z0-9-]{1,60})-(?P<toolchain>[0-9a-f]{16})-(?P<time>\d{8}-\d{6})(?:-\d{1,3})?")


class NotACacheImageError(Exception):
    """A document that should describe a cache image does not. The message is the reason."""


@dataclass(frozen=True)
class Layer:
    """One layer.

    digest, size: of the compressed blob. diff_id: digest of the tar. bytes, files: of the regular files in it.
    family, key: "" for the layer of markers and memos. part: a hex digit of a split family, else "".
    """

    digest: str
    size: int
    diff_id: str
    bytes: int
    files: int
    family: str = ""
    key: str = ""
    part: str = ""

    @property
    def name(self) -> str:
        """The layer for people."""
        if not self.family:
            return "markers and memos"
        return f"{self.family}/{self.key}" + (f" ({self.part})" if self.part else "")


@dataclass(frozen=True)
class PackedFamily:
    """One family directory of an image. factors: what the key stands for. bytes: of its files, not compressed."""

    family: str
    key: str
    factors: Mapping[str, Any]
    entries: int
    bytes: int


@dataclass(frozen=True)
class PackedTask:
    """A task that the image's markers make warm. keys: of the families it claims."""

    label: str
    model: str
    proof: str
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Description:
    """What a machine has to know of an image before it loads a layer.

    gpu: names of the GPU models, sorted and joined by ", "; "" for none. toolchain: digest of all family keys.
    release: of sglang. mount: the cache root as its users saw it. time: seconds since the epoch, when it was packed.
    table: version of the table of families.
    """

    gpu: str
    toolchain: str
    release: str
    mount: str
    table: int
    time: int
    families: tuple[PackedFamily, ...]
    tasks: tuple[PackedTask, ...]
    schema: int = SCHEMA

    @property
    def bytes(self) -> int:
        """Bytes of all families, not compressed."""
        return sum(family.bytes for family in self.families)


@dataclass(frozen=True)
class CacheImage:
    """An image: its description, and its layers in their order, the one of markers last."""

    description: Description
    layers: tuple[Layer, ...] = field(default=())

    @property
    def size(self) -> int:
        """Bytes of all its blobs but manifest and config."""
        return sum(layer.size for layer in self.layers)

    @property
    def index(self) -> Layer:
        """The layer of markers and memos."""
        return self.layers[-1]

    def at(self, moment: int) -> CacheImage:
        """Return the image as if it had been packed at another time."""
        return replace(self, description=replace(self.description, time=moment))

    def of(self, family: str, key: str) -> tuple[Layer, ...]:
        """Return the layers of one family directory."""
        return tuple(layer for layer in self.layers if (layer.family, layer.key) == (family, key))


def slug(gpu: str) -> str:
    """Return the name of a GPU model as a tag may have it: ``NVIDIA H200`` is ``h200``; no GPU is ``no-gpu``."""
    return _SLUG.sub("-", gpu.lower().replace("nvidia", " ")).strip("-")[:60].strip("-") or "no-gpu"


def tag(gpu: str, toolchain: str, moment: str) -> str:
    """Return the tag of an image. moment: as ``20261128-071231``."""
    return f"{slug(gpu)}-{toolchain}-{moment}"


@dataclass(frozen=True)
class TagParts:
    """What a tag of a cache image says."""

    gpu: str
    toolchain: str
    time: str


def tag_parts(name: str) -> TagParts | None:
    """Return the parts of a tag that a push made; None for any other."""
    found = _TAG.fullmatch(name)
    return TagParts(found["gpu"], found["toolchain"], found["time"]) if found else None


# --- documents -------------------------------------------------------------------------------------------------------


def encoded(document: Mapping[str, Any]) -> bytes:
    """Return a document in the one form that it has here, so that equal ones have equal digests."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")


def labels(description: Description) -> dict[str, str]:
    """Return the labels: the whole description as one JSON document, and what people look for by itself."""
    return {
        LABEL: encoded(asdict(description)).decode("ascii"),
        f"{PREFIX}.gpu": description.gpu,
        f"{PREFIX}.toolchain": description.toolchain,
        f"{PREFIX}.release": description.release,
        f"{PREFIX}.time": str(description.time),
        f"{PREFIX}.bytes": str(description.bytes),
        f"{PREFIX}.tasks": ", ".join(task.label for task in description.tasks),
        "org.opencontainers.image.created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(description.time)),
        "org.opencontainers.image.title": "sglang warm-cache",
    }


def config_of(image: CacheImage) -> bytes:
    """Return the image's config."""
    return encoded(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": labels(image.description)},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in image.layers]},
        }
    )


def manifest_of(image: CacheImage, config_digest: str, config_size: int) -> bytes:
    """Return the image's manifest."""
    return encoded(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": config_digest, "size": config_size},
            "layers": [_descriptor(layer) for layer in image.layers],
            "annotations": labels(image.description),
        }
    )


def _descriptor(layer: Layer) -> dict[str, Any]:
    row = {name: value for name, value in asdict(layer).items() if name not in ("digest", "size")}
    return {
        "mediaType": LAYER_TYPE,
        "digest": layer.digest,
        "size": layer.size,
        "annotations": {LABEL_LAYER: encoded(row).decode("ascii")},
    }


def parsed(manifest: bytes) -> CacheImage:
    """Return the image that a manifest describes. Raises NotACacheImageError; believes nothing of it."""
    document = _object(manifest)
    if document.get("artifactType") != ARTIFACT_TYPE:
        found = document.get("artifactType") or document.get("mediaType") or "nothing"
        raise NotACacheImageError(f"it is no cache image: its type is {str(found)[:80]}")
    annotations, rows = document.get("annotations"), document.get("layers")
    if not isinstance(annotations, dict) or not isinstance(rows, list) or not rows:
        raise NotACacheImageError("it has no layers or no annotations")
    image = CacheImage(_description(annotations.get(LABEL)), tuple(map(_layer, rows)))
    _check(image)
    return image


def config_matches(config: bytes, image: CacheImage) -> bool:
    """Return whether config and manifest agree about the layers."""
    try:
        document = _object(config)
    except NotACacheImageError:
        return False
    rootfs = document.get("rootfs")
    known = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    return known == [layer.diff_id for layer in image.layers]


def _object(data: bytes) -> dict[str, Any]:
    try:
        document = files.parsed(data)
    except files.UnreadableError as error:
        raise NotACacheImageError(f"it {error}") from None
    if not isinstance(document, dict):
        raise NotACacheImageError("it is no object")
    return document


def _description(text: Any) -> Description:
    if not isinstance(text, str):
        raise NotACacheImageError(f"it has no annotation {LABEL}")
    document = _object(text.encode("utf-8", "surrogatepass"))
    schema = document.get("schema")
    if schema != SCHEMA:
        newer = " Use a newer builder." if type(schema) is int and schema > SCHEMA else ""
        raise NotACacheImageError(f"its schema is {str(schema)[:20]}, and this program knows {SCHEMA}.{newer}")
    try:
        return from_object(Description, document, "its description")
    except (ValueError, RecursionError) as error:
        raise NotACacheImageError(str(error)) from None


def _layer(row: Any) -> Layer:
    if not isinstance(row, dict) or row.get("mediaType") != LAYER_TYPE:
        raise NotACacheImageError("one of its layers is no tar that gzip packed")
    annotations = row.get("annotations")
    text = annotations.get(LABEL_LAYER) if isinstance(annotations, dict) else None
    if not isinstance(text, str):
        raise NotACacheImageError(f"one of its layers has no annotation {LABEL_LAYER}")
    known = _object(text.encode("utf-8", "surrogatepass"))
    try:
        return from_object(Layer, {**known, "digest": row.get("digest"), "size": row.get("size")}, "a layer")
    except (ValueError, RecursionError) as error:
        raise NotACacheImageError(str(error)) from None


def _check(image: CacheImage) -> None:
    """Raise NotACacheImageError unless all parts agree, and every number is one that an image can have."""
    *others, last = image.layers
    if last.family or any(not layer.family for layer in others):
        raise NotACacheImageError("its last layer, and no other, has to be that of markers and memos")
    if len({(layer.family, layer.key, layer.part) for layer in image.layers}) != len(image.layers):
        raise NotACacheImageError("two of its layers are the same part of one family")
    for layer in image.layers:
        sound = _DIGEST.fullmatch(layer.digest) and _DIGEST.fullmatch(layer.diff_id)
        if not sound or min(layer.size, layer.bytes, layer.files) < 0 or not re.fullmatch("[0-9a-f]?", layer.part):
            raise NotACacheImageError(f"its layer {layer.family[:20]} has a digest or a number that is none")
        if layer.family and not _is_directory(layer.family, layer.key):
            raise NotACacheImageError(f"its layer of {layer.family[:20]!r} is of no family that this program knows")
    known = {(family.family, family.key) for family in image.description.families}
    if known != {(layer.family, layer.key) for layer in others}:
        raise NotACacheImageError("its description names other families than its layers")
    if sum(layer.bytes for layer in image.layers) > MOST_BYTES or sum(one.files for one in image.layers) > MOST_FILES:
        raise NotACacheImageError(f"it has more than {MOST_BYTES >> 30} GiB or {MOST_FILES} files")


def _is_directory(family: str, key: str) -> bool:
    return family in FAMILY and FAMILY[family].claimable and is_key(key)
