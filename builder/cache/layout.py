"""Names in a cache root: its layout file, locks, quarantine and family directories.

``layout.json`` names the schema of the layout and gives the root an identity; ``locks/`` holds files that are locked
with flock and never unlinked.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder import files, flock, text
from builder.beneath import Tree
from builder.cache.families import FAMILIES, FAMILY, Family, is_key

SCHEMA = 1
FOLDERS = ("images", "markers", "locks")
LAYOUT = "layout.json"
QUARANTINE = "aside"
#: Where a restore unpacks a cache image before anything of it gets its place, and its record of what was restored.
STAGING, RESTORED = "staging", "restored.json"
#: Lines of past runs (`history`).
HISTORY = "runs.jsonl"
#: Names of a directory that are looked at to see whether it is a cache root.
_NAMES = 10_000
#: Folders of what jobs write and mount. The mode keeps other users of the host from what jobs leave there, programs
#: with the set-user-ID bit of root among them; an overlay is read with the rights of the engine.
CLOSED, CLOSED_MODE = ("views", "generations", STAGING), 0o700

_RECORD_LIMIT = 1 << 20


class LayoutError(Exception):
    """The cache root cannot be used. The message has what was found and what to do."""


def prepare(root: Path) -> str:
    """Make the layout where it is missing and return the root's identity. Safe to run by several at once.

    Raises LayoutError for a root that a newer version wrote, that cannot be written, or that is another program's
    directory: a typing error in a path must not create a cache in it.
    """
    if stranger := foreign(root):
        raise LayoutError(f"{root} is no cache root, and not empty ({stranger} is in it). Use an empty directory.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with Tree(root) as tree:
            for name in FOLDERS:
                tree.make_folder(name)
            known = _read(tree)
            if known is None:
                fresh = {"schema": SCHEMA, "id": _new_id()}
                tree.create(LAYOUT, _encoded(fresh))  # of several at once the first wins
                known = _read(tree)
                if known is None:  # the file was there and is garbage
                    tree.write_atomically(LAYOUT, _encoded(fresh))
                    known = _read(tree)
            for lock in (run_lock(root), hold_lock(root), views_lock(root)):
                # Of a root that is read-only here nothing is touched.
                if not tree.exists(lock.relative_to(root).as_posix()):
                    os.close(flock.open_lock(lock, create=True, root=root))
            for name in CLOSED:
                close(tree, name)
    except OSError as error:
        place = error.filename or root
        raise LayoutError(
            f"the cache root cannot be written: {place}: {error.strerror}. Check its owner, mount and free space."
        ) from None
    if known is None:
        raise LayoutError(f"{root / 'layout.json'} cannot be read back after it was written. Check the file system.")
    if known["schema"] != SCHEMA:
        raise LayoutError(
            f"{root / 'layout.json'} has schema {known['schema']}, this program knows {SCHEMA}. "
            "Use a newer builder or another cache root."
        )
    return str(known["id"])


def close(tree: Tree, name: str, *, make: bool = False) -> None:
    """Keep other users of the host out of a folder of the root: older builders left it open.

    A folder that is missing, or cannot be changed, stays so. make: make a missing one; raises OSError.
    """
    if make:
        tree.make_folder(name, mode=CLOSED_MODE)
    with contextlib.suppress(OSError):
        tree.set_mode(name, CLOSED_MODE)


def is_current(root: Path) -> bool:
    """Return whether the layout file is a sound one of this version."""
    with Tree(root) as tree:
        known = _read(tree)
    return known is not None and known["schema"] == SCHEMA


def foreign(root: Path) -> str | None:
    """Return a name in this directory that shows that it is no cache root; None in a root or an empty directory."""
    own = {"lost+found", QUARANTINE, "used", RESTORED, HISTORY, *CLOSED, *FOLDERS, *FAMILY}
    with Tree(root) as tree:
        names = [item.name for item in tree.some("", _NAMES) or ()]
    if LAYOUT in names:
        return None
    return next(
        (text.printable(name) for name in sorted(names) if name not in own and "layout.json." not in name),
        None,
    )


def run_lock(root: Path) -> Path:
    """Return the lock of a warm-up run, one per root: the run (or a container on its behalf) holds it exclusively."""
    return root / "locks" / "run.lock"


def hold_lock(root: Path) -> Path:
    """Return the lock that `warm-cache hold` has shared, and each removal exclusively."""
    return root / "locks" / "hold.lock"


def compiling_lock(root: Path) -> Path:
    """Return the lock that concurrent tasks of a run hold shared, and a task that must be alone exclusively."""
    return root / "locks" / "compiling.lock"


def views_lock(root: Path) -> Path:
    """Return the lock for making, dropping or sweeping views: the builder (or its container) holds it exclusively."""
    return root / "locks" / "views.lock"


def generations_lock(root: Path) -> Path:
    """Return the lock of the container that makes or removes generations or views; it holds it exclusively."""
    return root / "locks" / "generations.lock"


def staging_lock(root: Path) -> Path:
    """Return the lock of the process that restores a cache image; it holds it exclusively."""
    return root / "locks" / "staging.lock"


def family_lock(root: Path, family: str, key: str) -> Path:
    """Return the lock that each compilation into this family's directory holds shared, each removal exclusively."""
    return root / "locks" / f"{family}-{key}.lock"


def quarantine(root: Path, family: str, key: str) -> Tree:
    """Return the directory for leftovers of a family: on the same file system, so that moving them is one rename."""
    return Tree(root, f"{QUARANTINE}/{family}-{key}")


@dataclass(frozen=True)
class FamilyDirectory:
    """One directory of one family, of a cache root or of any other place.

    root: the cache root that it is in, where it is in one: the path is then not to be trusted.
    """

    family: Family
    key: str
    path: Path
    root: Path | None = field(default=None, compare=False)

    @property
    def name(self) -> tuple[str, str]:
        """Its family and key."""
        return self.family.name, self.key

    def tree(self) -> Tree:
        """Return the directory, for what is read and written below it."""
        return Tree(self.path) if self.root is None else Tree(self.root, f"{self.family.name}/{self.key}")

    def record(self) -> FamilyRecord:
        """Return what ``<key>.json`` next to it holds."""
        above = Tree(self.path.parent) if self.root is None else Tree(self.root, self.family.name)
        try:
            with above:
                document = above.read_json(f"{self.key}.json", _RECORD_LIMIT)
                written = above.lstat(f"{self.key}.json").st_mtime
        except (files.UnreadableError, OSError):
            return FamilyRecord()
        factors = document.get("factors") if isinstance(document, dict) else None
        return FamilyRecord(written, factors if isinstance(factors, dict) else None)

    def mount(self) -> str | None:
        """Return the cache root as its users see it, where that is recorded: users may have different mounts."""
        mount = (self.record().factors or {}).get("mount")
        return mount if isinstance(mount, str) and mount.startswith("/") else None


@dataclass(frozen=True)
class FamilyRecord:
    """What a key stands for. written: seconds since the epoch. factors: None where they are not recorded."""

    written: float = 0.0
    factors: Mapping[str, Any] | None = None


def family_directories(root: Path, *, links: bool = False) -> Iterator[FamilyDirectory]:
    """Yield every directory with the name of a family and a key, family by family. links: also links to one."""
    for family in FAMILIES:
        with Tree(root) as tree:
            items = tree.listing(family.name)
        for item in items or ():
            path = root / item.name
            if is_key(item.last) and (path.is_dir() if links else item.is_dir):
                yield FamilyDirectory(family, item.last, path, root)


def closed(place: Path) -> str:
    """Return why a job cannot compile into this family directory, here and now; "" if it can."""
    try:
        if not stat.S_ISDIR(place.lstat().st_mode):
            return f"{place} is no directory"
    except OSError:
        return "it has no directory here"
    return "" if os.access(place, os.R_OK | os.W_OK | os.X_OK) else f"{place} cannot be written here"


def claimable_directories(root: Path) -> Iterator[FamilyDirectory]:
    """Yield the family directories that a task may claim: the driver manages its own."""
    return (directory for directory in family_directories(root) if directory.family.claimable)


def describe_family(root: Path, family: str, key: str, factors: Mapping[str, str | None]) -> None:
    """Make the family's directory, and ``<key>.json`` next to it, which lists the factors. Raises OSError."""
    with Tree(root) as tree:
        tree.make_folder(f"{family}/{key}")
        if not tree.exists(f"{family}/{key}.json"):
            document = {"schema": SCHEMA, "family": family, "key": key, "factors": dict(factors)}
            tree.write_atomically(f"{family}/{key}.json", _encoded(document))


def _new_id() -> str:
    import uuid  # once in a root's life

    return str(uuid.uuid4())


def _encoded(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, indent=1).encode("ascii") + b"\n"


def _read(tree: Tree) -> dict[str, Any] | None:
    """Return the layout file; None where it is missing or garbage (a machine that lost power leaves an empty file)."""
    try:
        found = tree.read_json(LAYOUT, 1 << 16)
    except files.UnreadableError:
        return None
    if not isinstance(found, dict):
        return None
    schema = found.get("schema")
    if isinstance(schema, (int, float)) and schema > SCHEMA:
        return found  # what a later version needs besides is its own affair; it is never taken for garbage
    return found if isinstance(schema, int) and isinstance(found.get("id"), str) else None
