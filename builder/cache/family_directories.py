"""Every family directory of a cache root, of every key, whichever image it belongs to, and what is wrong in it.

Only directories with the name of a family and of a key are looked at. Whatever else lies in the root is somebody
else's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import files, text
from builder.cache import inventory
from builder.cache.families import FAMILIES, Family

_KEY = re.compile(r"[0-9a-f]{16}")
_JSON_LIMIT = 1 << 20


@dataclass(frozen=True)
class Place:
    """One family's directory. mount: the cache root as its users see it, where that is recorded."""

    family: Family
    key: str
    path: Path
    mount: str | None


def places(root: Path) -> Iterator[Place]:
    """Every directory of a family that a task may vouch for (the driver looks after its own)."""
    for family in FAMILIES:
        for item in files.listing(str(root / family.name)) or () if family.claimable else ():
            if _KEY.fullmatch(item.name) and files.is_dir(item):
                yield Place(family, item.name, Path(item.path), _mount(root, family.name, item.name))


def bad_entries(place: Place, *, now: float) -> tuple[int, dict[str, str]]:
    """How many entries there are, and the problem of each that is not valid. now: seconds since the epoch."""
    family, path = place.family, place.path
    found = inventory.scan(family, path, mount=place.mount)
    bad = dict(found.invalid)
    for name, problem in bad.items():
        if inventory.may_be_in_progress(family, path, name, problem, now=now):
            bad[name] = f"{problem} (it was written to just now, and may be in the making)"
    for name in (".", "cache") if family.layout == "deep_gemm" else (".",):
        if files.listing(str(path / name)) is None:
            bad[name] = f"{files.UNREADABLE}: a directory that cannot be listed"
    return len(found.entries), bad


def contents(root: Path) -> Iterator[dict[str, Any]]:
    """How much each directory of each family holds: family, key, entries, invalid, bytes (of the entries' files)."""
    for family in FAMILIES:
        for item in files.listing(str(root / family.name)) or ():
            if files.is_dir(item):
                found = inventory.scan(family, Path(item.path))
                yield {
                    "family": family.name,
                    "key": text.printable(item.name),
                    "entries": len(found.valid),
                    "invalid": len(found.invalid),
                    "bytes": found.bytes,
                }


def _mount(root: Path, family: str, key: str) -> str | None:
    """The mount path among the factors that the key stands for: a root may serve consumers with different ones."""
    try:
        described = files.read_json(str(root / family / f"{key}.json"), _JSON_LIMIT)
    except files.UnreadableError:
        return None
    factors = described.get("factors") if isinstance(described, dict) else None
    mount = factors.get("mount") if isinstance(factors, dict) else None
    return mount if isinstance(mount, str) and mount.startswith("/") else None
