"""This process's environment against a cache root: which image it is, and which families' kernels it would find.

A container does not show the image it was made of. It is taken from the name that was passed at its start, or from the
memo of an image with the same build of sglang and the same value of every other factor. Families are found without it.
Reads only; never raises for what it finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from builder import text
from builder.cache import kernel_sources, layout, toolchain
from builder.cache.coverage import differences
from builder.cache.families import CLAIMABLE, TABLE_VERSION, Family
from builder.cache.memos import known_images
from builder.cache.toolchain import Record, Sglang

#: Names, in a container, the image that its caches belong to. `warm-cache env` prints it with the image's id.
IMAGE_VARIABLE = "WARM_CACHE_IMAGE_ID"
#: Recorded, and no factor of any family: what is in the image besides packages.
IMAGE = "image"

_ID = re.compile(r"sha256:[0-9a-f]{64}")

Row = tuple[str, str, str]

#: The bit of CAP_SYS_ADMIN in a set of capabilities (linux/capability.h).
_SYS_ADMIN = 21


def may_mount(status: Path = Path("/proc/self/status")) -> bool:
    """Return whether this process has CAP_SYS_ADMIN, with which a read-only mount of the cache is none."""
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        value = next((line.split(":")[1] for line in lines if line.startswith("CapEff:")), "0")
        return bool(int(value, 16) >> _SYS_ADMIN & 1)
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class ImageIdentity:
    """id: a name of the image, or None. how: how it is known, or why it is not, for people.

    content, commit: of the image, from its memo; None where none is there.
    """

    id: str | None
    how: str
    content: str | None = None
    commit: str | None = None


def named_image(root: Path, record: Record, *names: str | None) -> ImageIdentity | None:
    """Return the image of the first of these names that is an id, as its memo describes it; None without one."""
    for name in names:
        if name and _ID.fullmatch(name):
            memos = [memo for memo in known_images(root) if name in memo.names]
            # A checkout that was installed into the container is not the image's build.
            same = [memo for memo in memos if _build(memo.record) == _build(record)]
            commit = same[0].record["sglang"]["commit"] if same else None
            return ImageIdentity(name, "it was named", memos[0].record["factors"].get(IMAGE) if memos else None, commit)
    return None


def recognised(root: Path, record: Record) -> ImageIdentity:
    """Return the only image among the memos below `root` that fits this record, which has no image."""
    commit = record["sglang"]["commit"]
    if commit is None:
        return ImageIdentity(None, "nothing here says which build of sglang this is")
    alike = {memo.image: memo for memo in known_images(root) if _alike(memo.record, record)}
    build = f"build {text.printable(commit)[:40]}"
    if not alike:
        return ImageIdentity(None, f"the cache knows no image of {build} with these packages")
    if len(alike) > 1:
        return ImageIdentity(None, f"the cache knows {len(alike)} images of {build}")
    (name, memo), *_ = alike.items()
    return ImageIdentity(name, f"the only one known of {build}", memo.record["factors"].get(IMAGE), commit)


def of_image(record: Record, image: ImageIdentity) -> Record:
    """Return the record as it is in this image."""
    sglang: Sglang = {**record["sglang"], "commit": record["sglang"]["commit"] or image.commit}
    build = toolchain.build_name(sglang["version"], sglang["commit"])
    factors = {**record["factors"], IMAGE: image.content or image.id, "sglang_build": build}
    return {**record, "factors": factors, "sglang": sglang}


def _build(record: Record) -> tuple[object, ...]:
    sglang = record["sglang"]
    return sglang["version"], kernel_sources.digest(sglang["sources"])


def _alike(known: Record, record: Record) -> bool:
    return known["sglang"] == record["sglang"] and all(
        known["factors"].get(name) == value
        for name, value in record["factors"].items()
        if name != IMAGE and name not in toolchain.HOST_FACTORS
    )


@dataclass(frozen=True)
class Standing:
    """One family in this environment.

    state: ``found``: its directory exists; ``differs``: only directories of other keys do; ``absent``: there is none.
    nearest: the key that differs least. rows: what differs from it: (factor, was, is).
    """

    family: str
    state: Literal["found", "differs", "absent"]
    key: str
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
    return [_standing([each for each in known if each.family == family.name], family, record) for family in CLAIMABLE]


def described(root: Path) -> Iterator[Described]:
    """Yield every directory of every claimable family, with what its key stands for."""
    # A link to a directory is one for its users.
    for directory in layout.family_directories(root, links=True):
        if directory.family.claimable:
            record = directory.record()
            yield Described(*directory.name, record.written, record.factors)


def _standing(known: Sequence[Described], family: Family, record: Record) -> Standing:
    now: dict[str, Any] = dict(toolchain.family_factors(record, family.name))
    key = toolchain.family_key(record, family.name)
    if any(each.key == key for each in known):
        return Standing(family.name, "found", key)
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
    if not rows:  # equal factors under another key: the table itself changed
        rows = [("table", "another version", str(TABLE_VERSION))]
    return Standing(family.name, "differs", key, other, rows)
