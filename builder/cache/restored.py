"""Which cache images were restored into a root: ``<root>/restored.json``, the last one first.

By it a restore of the same image fetches nothing, and an image that is older than the last one is recognised.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from builder import files
from builder.beneath import Tree
from builder.cache import inventory, layout, marker_files
from builder.cache.families import FAMILY
from builder.typed_json import from_object

SCHEMA = 1
_LIMIT, _KEEP = 1 << 20, 16


@dataclass(frozen=True)
class Restored:
    """One restore. digest: of the image's manifest. source: its repository. time: by its description.

    restored: when, in seconds since the epoch. keys: digest of the family keys of the environment that it was for.
    markers: paths of those that it wrote.
    """

    digest: str
    source: str
    time: int
    restored: int
    keys: str
    markers: tuple[str, ...] = ()


def remembered(root: Path) -> list[Restored]:
    """Return the restores that are on record, the last one first; none where the record cannot be read."""
    try:
        with Tree(root) as tree:
            document = tree.read_json(layout.RESTORED, _LIMIT)
    except files.UnreadableError:
        return []
    rows = document.get("restored") if isinstance(document, dict) and document.get("schema") == SCHEMA else None
    found = []
    for row in rows if isinstance(rows, list) else ():
        try:
            found.append(from_object(Restored, row if isinstance(row, dict) else {}, "a restore"))
        except (ValueError, RecursionError):
            continue
    return found


def holds(root: Path, restored: Restored, mount: str) -> bool:
    """Return whether every marker of a restore, and every entry that these list, is there and valid."""
    with Tree(root) as tree:
        found = [marker_files.read_in(tree, path) for path in restored.markers]
    for marker in found:
        for family, claim in marker.claims.items() if marker else ():
            with Tree(root, f"{family}/{claim.key}") as place:
                if any(inventory.check(FAMILY[family], place, entry, mount=mount) for entry in claim.entries):
                    return False
    return bool(found) and None not in found


def remember(root: Path, restored: Restored) -> None:
    """Put a restore on record. Raises OSError."""
    before = [each for each in remembered(root) if (each.digest, each.keys) != (restored.digest, restored.keys)]
    rows = [asdict(each) for each in (restored, *before)][:_KEEP]
    data = json.dumps({"schema": SCHEMA, "restored": rows}, indent=1).encode("ascii") + b"\n"
    with Tree(root) as tree:
        tree.write_atomically(layout.RESTORED, data)
