"""This process's environment against a cache root: which image it is, and which families' kernels it would find.

A container does not show the image it was made of. It is taken from the id that was passed at its start, or from the
memo of an image with the same build commit and the same value of every other factor. Otherwise it is unknown, and so
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
from builder.cache.toolchain import Record, Sglang

#: Names, in a container, the image that its caches belong to. `warm-cache env` prints it with the image's id.
IMAGE_VARIABLE = "WARM_CACHE_IMAGE_ID"
#: The factor that families of one image alone have.
IMAGE = "image"

_ID = re.compile(r"sha256:[0-9a-f]{64}")

Row = tuple[str, str, str]


@dataclass(frozen=True)
class ImageIdentity:
    """id: the builder's on the host, or None. how: how it is known, or why it is not, for people."""

    id: str | None
    how: str
    commit: str | None = None


def named_image(root: Path, *names: str | None) -> ImageIdentity | None:
    """Return the image of the first of these names that is an id, with its commit from a memo; None without one."""
    for name in names:
        if name and _ID.fullmatch(name):
            commits = [record["sglang"]["commit"] for known, record in toolchain.known_images(root) if known == name]
            return ImageIdentity(name, "it was named", commits[0] if commits else None)
    return None


def recognised(root: Path, record: Record) -> ImageIdentity:
    """Return the only image among the memos below `root` that fits this record, which has no image."""
    commit = record["sglang"]["commit"]
    alike = sorted({name for name, known in toolchain.known_images(root) if _alike(known, record)})
    if commit is None:
        return ImageIdentity(None, "nothing here says which build of sglang this is")
    build = f"build {text.printable(commit)[:40]}"
    if not alike:
        return ImageIdentity(None, f"the cache knows no image of {build} with these packages")
    if len(alike) > 1:
        return ImageIdentity(None, f"the cache knows {len(alike)} images of {build}")
    return ImageIdentity(alike[0], f"the only one known of {build}", commit)


def of_image(record: Record, image: ImageIdentity) -> Record:
    """Return the record as it is in this image."""
    factors = {**record["factors"], IMAGE: image.id}
    sglang: Sglang = {**record["sglang"], "commit": record["sglang"]["commit"] or image.commit}
    return {**record, "factors": factors, "sglang": sglang}


def _alike(known: Record, record: Record) -> bool:
    return known["sglang"] == record["sglang"] and all(
        known["factors"].get(name) == value for name, value in record["factors"].items() if name != IMAGE
    )


@dataclass(frozen=True)
class Standing:
    """One family in this environment.

    state: ``found``: its directory exists; ``differs``: only directories of other keys do; ``absent``: there is none;
    ``unknown``: it belongs to an image, and this image is unknown. key: None where unknown.
    nearest: the key that differs least. rows: what differs from it: (factor, was, is).
    """

    family: str
    state: Literal["found", "differs", "absent", "unknown"]
    key: str | None
    nearest: str | None = None
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Described:
    """One existing family directory. written: time of its record. factors: what its key stands for, None if unknown."""

    family: str
    key: str
    written: float = 0.0
    factors: Mapping[str, Any] | None = None


def compare(known: Sequence[Described], record: Record) -> list[Standing]:
    """Return every claimable family, in the table's order, against the directories that exist."""
    return [
        _standing([each for each in known if each.family == family.name], family, record)
        for family in FAMILIES
        if family.claimable
    ]


def described(root: Path) -> Iterator[Described]:
    """Yield every directory of every claimable family, with what its key stands for."""
    # A link to a directory is one for its users.
    for directory in layout.family_directories(root, links=True):
        if directory.family.claimable:
            record = directory.record()
            yield Described(*directory.name, record.written, record.factors)


def known_keys(record: Record) -> dict[str, str]:
    """Return the key of every family; without an image, not those of families that belong to one."""
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
