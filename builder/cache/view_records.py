"""Which views exist: a record (``view.json``) for each, below ``<root>/views``.

A view is an overlay: a generation below, and ``<root>/views/<name>/upper`` above it, which takes everything that the
job writes. The engine mounts it as a volume of the paths that `agent.views` prepares.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from builder import files
from builder.beneath import Tree
from builder.cache import generations

#: Names of views: they become part of a volume's name and of mount options.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,62}")

FOLDER = "views"
SCHEMA = 1
_RECORD_LIMIT = 1 << 16


@dataclass(frozen=True)
class ViewRecord:
    """Contents of ``view.json``."""

    view: str  # its name
    generation: str  # what it lies upon
    created: float  # seconds since the epoch
    engine: str  # id of the engine that has the volume


def home(root: Path) -> Path:
    """Return the folder of all views."""
    return root / FOLDER


def records(root: Path) -> dict[str, ViewRecord | None]:
    """Return every view by its name; None for a record that cannot be read."""
    with Tree(root, FOLDER) as tree:
        names = [item.name for item in tree.listing() or () if item.is_dir and NAME.fullmatch(item.name)]
        return {name: _read(tree, name) for name in names}


def below(root: Path, path: Path) -> str | None:
    """Return the name of a view that has this file or directory of the root below it, if there is one.

    It has what its generation has under the same name, and that generation itself (or a part of it).
    """
    try:
        name = path.relative_to(root)
    except ValueError:
        return None
    for view, record in sorted(records(root).items()):
        if record is None:
            continue
        with Tree(generations.home(root), record.generation) as tree:
            if tree.exists(name.as_posix()):
                return view
        if name.parts[:2] in (("generations",), ("generations", record.generation)):
            return view
    return None


def read(root: Path, view: str) -> ViewRecord | None:
    """Return the record of a view; None if it cannot be read, or is not that view's."""
    with Tree(root, FOLDER) as tree:
        return _read(tree, view)


def _read(tree: Tree, name: str) -> ViewRecord | None:
    try:
        found = tree.read_json(f"{name}/view.json", _RECORD_LIMIT)
    except files.UnreadableError:
        return None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return None
    generation, created, engine = found.get("generation"), found.get("created"), found.get("engine")
    if (
        found.get("view") != name
        or not isinstance(generation, str)
        or not generations.ID.fullmatch(generation)
        or not isinstance(created, (int, float))
        or not isinstance(engine, str)
    ):
        return None
    return ViewRecord(name, generation, float(created), engine)


def write(root: Path, folder: str, record: ViewRecord) -> None:
    """Write the record into a view's folder, whose name may still be a temporary one. Raises OSError."""
    document = {"schema": SCHEMA, **asdict(record)}
    with Tree(root, FOLDER) as tree:
        tree.write_atomically(f"{folder}/view.json", json.dumps(document, indent=1).encode("ascii") + b"\n")
