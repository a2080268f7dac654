"""Where markers are, and whether a file there holds one.

``markers/<label>-<coverage digest>/<digest of the claimed keys>.json``. What a marker holds is in `marker_format`;
whether it makes a task warm is in `markers`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from builder import files, text
from builder.beneath import Tree
from builder.cache.coverage import coverage_digest
from builder.cache.marker_format import Marker, NotAMarkerError, parsed
from builder.task import Shape

FOLDER = "markers"
#: Bytes of a marker: of a quarter of a million entries. Markers of one directory that are read.
_LIMIT = 16 << 20
_MOST_FILES = 2000


@dataclass(frozen=True)
class MarkerFile:
    """A file where a marker should be: the marker, or why it is none.

    path: below the root, printable. folder: name of its directory. written: its mtime. newer: its schema is a later
    one, so that it may be a marker that a newer version wrote.
    """

    path: str
    folder: str
    written: float
    marker: Marker | None
    problem: str = ""
    newer: bool = False


# Finding markers


def read(path: Path) -> Marker | None:
    """Return the marker in this file; None where it holds none that this program understands."""
    with Tree(path.parent) as tree:
        return read_in(tree, path.name)


def read_in(tree: Tree, name: str) -> Marker | None:
    """Return the marker in this file of a tree, like `read`."""
    return _found(tree, name, "", 0.0).marker


def folder_name(label: str, factors: Mapping[str, object]) -> str:
    """Return the name, below ``markers/``, of the directory for a task with this label and coverage."""
    return f"{_label(label)}-{coverage_digest(factors)}"


def folder(root: Path, name: str) -> list[MarkerFile]:
    """Return every marker file of one directory, most recent first."""
    with Tree(root, FOLDER) as tree:
        return _in_folder(tree, name)


def _in_folder(tree: Tree, name: str) -> list[MarkerFile]:
    """Return every marker file of one directory of ``markers``, most recent first."""
    items = tree.some(name, _MOST_FILES + 1)
    shown = text.printable(f"{FOLDER}/{name}")
    if items is None:
        return [MarkerFile(shown, name, 0.0, None, "the directory cannot be read")]
    found = []
    for item in items[:_MOST_FILES]:
        if item.last.endswith(".json") and not item.last.startswith("."):
            try:
                written = item.stat().st_mtime
            except OSError:
                written = 0.0
            found.append(_found(tree, item.name, name, written))
    if len(items) > _MOST_FILES:
        found.append(MarkerFile(shown, name, 0.0, None, f"it holds more than {_MOST_FILES} files: not all are read"))
    return sorted(found, key=lambda item: item.written, reverse=True)


def every(root: Path) -> Iterator[MarkerFile]:
    """Yield every marker file below `root`, directory by directory."""
    with Tree(root, FOLDER) as tree:
        for item in tree.listing() or ():
            if item.is_dir:
                yield from _in_folder(tree, item.name)


def shapes_of(root: Path, models: Collection[str]) -> dict[str, tuple[Shape, ...]]:
    """Return for each of these models the shapes in its markers below `root`, whatever their toolchain and argv."""
    return _of_models(root, models, lambda marker: marker.shapes)


def missed_of(root: Path, models: Collection[str]) -> dict[str, tuple[Shape, ...]]:
    """Return for each of these models the shapes of which a prebuild missed kernels, by its markers below `root`."""
    return _of_models(root, models, lambda marker: () if marker.prebuild is None else marker.prebuild.misses)


def _of_models(
    root: Path, models: Collection[str], texts: Callable[[Marker], Iterable[str]]
) -> dict[str, tuple[Shape, ...]]:
    found: dict[str, set[Shape]] = {model: set() for model in models}
    for file in every(root) if models else ():
        model = file.marker.coverage.get("model") if file.marker is not None else None
        if file.marker is not None and isinstance(model, str) and model in found:
            for text in texts(file.marker):
                with contextlib.suppress(ValueError):
                    found[model].add(Shape.parse(text))
    return {model: tuple(sorted(shapes)) for model, shapes in found.items()}


def neighbours(root: Path, label: str) -> list[MarkerFile]:
    """Return every marker of this label, of any coverage."""
    pattern = re.compile(re.escape(_label(label)) + "-[0-9a-f]{12}")
    return [found for name in _folders(root) if pattern.fullmatch(name) for found in folder(root, name)]


def duplicates(root: Path, name: str) -> list[MarkerFile]:
    """Return the markers of other labels with the coverage of those in the directory of this name."""
    suffix = name[name.rindex("-") :]
    others = [other for other in _folders(root) if other.endswith(suffix) and other != name]
    return [found for other in others for found in folder(root, other)]


def _folders(root: Path) -> list[str]:
    with Tree(root, FOLDER) as tree:
        return [item.name for item in tree.listing() or ()]


def _label(label: str) -> str:
    """Return the label as a file name may hold it."""
    return re.sub(r"[^A-Za-z0-9._+=@-]+", "-", label).lstrip(".-")[:120] or "task"


def _found(tree: Tree, name: str, folder: str, written: float) -> MarkerFile:
    shown = text.printable(f"{FOLDER}/{folder}/{name.rpartition('/')[2]}")
    try:
        return MarkerFile(shown, folder, written, parsed(tree.read_json(name, _LIMIT)))
    except files.UnreadableError as error:
        return MarkerFile(shown, folder, written, None, f"it {error}")
    except NotAMarkerError as error:
        return MarkerFile(shown, folder, written, None, str(error), error.newer)
