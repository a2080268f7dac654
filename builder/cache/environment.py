"""The environment that this process runs in, compared with what lies in a cache root: which image it is, and per family
whether its kernels would be found, or what differs.

Inside a container nothing says which image it was made of. What can be known is taken: what whoever started it said, or
a memo whose image has the same build commit and the same value of every other factor. Otherwise it is unknown, and so
are the families that belong to one image. Reads only; never raises for what it finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from builder import text
from builder.cache import layout, toolchain
from builder.cache.coverage import differences
from builder.cache.families import FAMILIES, FAMILY, TABLE_VERSION, Family
from builder.cache.toolchain import Record

#: Says in a container which image's caches are its own. `warm-cache env` prints it for the image that it speaks of.
IMAGE_VARIABLE = "WARM_CACHE_IMAGE_ID"
#: The factor that families of one image alone have.
IMAGE = "image"

_ID = re.compile(r"sha256:[0-9a-f]{64}")

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Image:
    """id: as the builder on the host calls it, or None. how: by what it is known, or why it is not."""

    id: str | None
    how: str
    commit: str | None = None


def said(root: Path, *names: str | None) -> Image | None:
    """The image that somebody named by its id; None where nobody did. A memo knows what its labels say of it."""
    for name in names:
        if name and _ID.fullmatch(name):
            commits = [record["sglang"]["commit"] for known, record in toolchain.known_images(root) if known == name]
            return Image(name, "it was named", commits[0] if commits else None)
    return None


def recognised(root: Path, record: Record) -> Image:
    """The one image that the memos below `root` can mean by this record, which was made without knowing its image."""
    commit = record["sglang"]["commit"]
    alike = sorted({name for name, known in toolchain.known_images(root) if _alike(known, record)})
    if commit is None:
        return Image(None, "nothing here says which build of sglang this is")
    if not alike:
        return Image(None, f"the cache knows no image of build {text.printable(commit)[:40]} with these packages")
    if len(alike) > 1:
        return Image(None, f"the cache knows {len(alike)} images of build {text.printable(commit)[:40]}")
    return Image(alike[0], f"the only one known of build {text.printable(commit)[:40]}", commit)


def of_image(record: Record, image: Image) -> Record:
    """The record as it is in this image."""
    factors = {**record["factors"], IMAGE: image.id}
    sglang = {**record["sglang"], "commit": record["sglang"]["commit"] or image.commit}
    return {**record, "factors": factors, "sglang": sglang}


def _alike(known: Record, record: Record) -> bool:
    return known["sglang"] == record["sglang"] and all(
        known["factors"].get(name) == value for name, value in record["factors"].items() if name != IMAGE
    )


@dataclass(frozen=True)
class Standing:
    """One family in this environment.

    state: ``found``, its directory is there; ``differs``, only directories of other keys are; ``absent``, nothing of it
    is there; ``unknown``, it belongs to an image, and which one this is cannot be told. key: None where unknown.
    nearest: the key that differs least, with what differs: (factor, was, is).
    """

    family: str
    state: Literal["found", "differs", "absent", "unknown"]
    key: str | None
    nearest: str | None = None
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Described:
    """One family directory that is there. written: when what it is for was said, in seconds since the epoch; factors:
    what its key stands for, None where nothing says so.
    """

    family: str
    key: str
    written: float = 0.0
    factors: Mapping[str, Any] | None = None


def compare(known: Sequence[Described], record: Record) -> list[Standing]:
    """Every family that a task may vouch for, in the table's order, with the directories that are there."""
    return [
        _standing([each for each in known if each.family == family.name], family, record)
        for family in FAMILIES
        if family.claimable
    ]


def described(root: Path) -> Iterator[Described]:
    """Every directory of every family that a task may vouch for, and what it is for."""
    # A link to a directory is one for its users.
    for directory in layout.family_directories(root, links=True):
        if directory.family.claimable:
            record = directory.record()
            yield Described(*directory.name, record.written, record.factors)


def keys(record: Record) -> dict[str, str]:
    """The key of every family whose key is known: without the image's, those of one image are left out."""
    return {name: key for name, key in toolchain.family_keys(record).items() if not _unknown(record, FAMILY[name])}


def _unknown(record: Record, family: Family) -> bool:
    return IMAGE in family.factors and record["factors"].get(IMAGE) is None


def _standing(known: Sequence[Described], family: Family, record: Record) -> Standing:
    now: dict[str, Any] = dict(toolchain.family_factors(record, family.name))
    unknown = _unknown(record, family)
    key = None if unknown else toolchain.family_key(record, family.name)
    if any(each.key == key for each in known):
        return Standing(family.name, "found", key)
    if unknown:
        del now[IMAGE]
    nearest = None
    for each in known:
        if each.factors is None:
            continue
        rows = differences({factor: each.factors.get(factor) for factor in now}, now)
        if nearest is None or (len(rows), -each.written) < (len(nearest[1]), -nearest[2]):
            nearest = (each.key, rows, each.written)
    if nearest is None:
        return Standing(family.name, "absent", key)
    other, rows, _ = nearest
    if unknown and not rows:
        return Standing(family.name, "unknown", None, other)
    if not rows:  # equal factors under another key: the table itself changed
        rows = [("table", "another version", str(TABLE_VERSION))]
    return Standing(family.name, "differs", key, other, rows)
