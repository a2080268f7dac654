"""sglang's own look-up among the builds of one module, of which it reads the newest hundred.

Its JIT keeps each build in a directory of its own (a leaf: ``<target>/<module>/build-<key>/deps-<digest>``), sorts the
leaves of one ``build-<key>`` by the time of the directory, and compares the newest `Family.looked_at` with the sources.
A hit touches the leaf. An older one is never found: its module is compiled again by every process, and cannot be
published, because the leaf is there. Source: ``kernels/jit/utils/compile/cache.py`` of sglang 0.5.18 to 0.5.23.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from builder.beneath import Tree
from builder.cache import marker_files
from builder.cache.families import FAMILY, Family, whole
from builder.cache.layout import family_directories
from builder.files import matches
from builder.text import printable

#: Components of a leaf's name.
_DEPTH = 4


def every(family: Family, tree: Tree) -> Iterator[str]:
    """Yield the names of all leaves in a family's directory."""
    folders = [""]
    for depth in range(_DEPTH):
        folders = [item.name for above in folders for item in tree.listing(above) or () if item.is_dir]
        if depth == _DEPTH - 1:
            yield from (name for name in folders if whole(family, name) == name and matches(_last(name), family.whole))


def scopes(names: Iterable[str]) -> dict[str, list[str]]:
    """Return leaves by the directory whose leaves are compared with each other."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition("/")[0], []).append(name)
    return found


def unseen(family: Family, tree: Tree, entries: Iterable[str]) -> str:
    """Return why the look-up does not find one of these entries, or ""."""
    if not family.looked_at:
        return ""
    for scope, names in scopes({whole(family, name) for name in entries}).items():
        ranked = _ranked(family, tree, scope)
        for name in set(names).intersection(ranked[family.looked_at :]):
            return (
                f"{printable(name)[-200:]} is number {ranked.index(name) + 1} of its module's builds, and sglang looks "
                f"at the {family.looked_at} newest"
            )
    return ""


def beyond(family: Family, tree: Tree) -> Iterator[str]:
    """Yield the leaves that the look-up does not reach."""
    for scope, names in scopes(every(family, tree)).items() if family.looked_at else ():
        if len(names) > family.looked_at:
            yield from _ranked(family, tree, scope)[family.looked_at :]


def refresh(root: Path) -> list[str]:
    """Touch the leaves that markers list where the look-up does not reach all of them; return their names.

    Their order stays. Never raises OSError.
    """
    done = []
    crowded = {
        directory.name: lost
        for directory in family_directories(root)
        if (lost := set(beyond(directory.family, directory.tree())))
    }
    listed = _listed(root) if crowded else {}
    for (family, key), lost in crowded.items():
        with Tree(root, f"{family}/{key}") as tree:
            for scope, names in scopes(listed.get((family, key), ())).items():
                ranked = _ranked(FAMILY[family], tree, scope) if lost.intersection(names) else []
                # The kernel's clock for files stands still for milliseconds, and equal times have no order.
                start = time.time_ns()
                for number, name in enumerate(reversed([name for name in ranked if name in names])):
                    times, last = (start + number * 1000,) * 2, name.rpartition("/")[2]
                    with contextlib.suppress(OSError, ValueError):
                        os.utime(last, ns=times, dir_fd=tree.descriptor(scope), follow_symlinks=False)
                        done.append(f"{family}/{key}/{name}")
    return done


def most_listed(root: Path) -> tuple[int, str]:
    """Return the largest number of one module's builds that markers list, with the module's name; (0, "") for none."""
    counts = (
        (len(names), "/".join(scope.split("/")[:2]))
        for (family, _), listed in _listed(root).items()
        if FAMILY[family].looked_at
        for scope, names in scopes(listed).items()
    )
    return max(counts, default=(0, ""))


def surplus(family: Family, there: Collection[str], loose: Mapping[str, float]) -> list[str]:
    """Return the leaves to remove so that the look-up reaches all of a scope, and one more; the longest unused first.

    loose: those that may be removed, with their last use.
    """
    found = []
    for names in scopes(there).values() if family.looked_at else ():
        number = len(names) - family.looked_at + 1
        mine = sorted(loose.keys() & set(names), key=lambda name: loose[name])
        found += mine[: max(0, number)]
    return found


def _listed(root: Path) -> dict[tuple[str, str], set[str]]:
    """Return the leaves that markers list, by family and key."""
    found: dict[tuple[str, str], set[str]] = {}
    for item in marker_files.every(root):
        for name, claim in item.marker.claims.items() if item.marker else ():
            family = FAMILY.get(name)
            if family is not None and family.looked_at:
                found.setdefault((name, claim.key), set()).update(whole(family, entry) for entry in claim.entries)
    return found


def _ranked(family: Family, tree: Tree, scope: str) -> list[str]:
    """Return the leaves of one scope, the newest first; nothing where the look-up reads all."""
    names = [item.name for item in tree.listing(scope) or () if item.is_dir and matches(item.last, family.whole)]
    if len(names) <= family.looked_at:
        return []
    dated = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            dated.append((tree.lstat(name).st_mtime_ns, name))
    return [name for _, name in sorted(dated, reverse=True)]


def _last(name: str) -> str:
    return name.rpartition("/")[2]
