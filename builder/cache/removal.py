"""When something below a cache root may be removed for good, and what lies aside long enough for it.

Renaming an invalid entry or a leftover aside needs none of this: that is one rename, and whoever has the files open
keeps them. Removing takes away what another process may be about to open, so it needs proof that there is none:

- no process compiles into the family: its lock file is ours exclusively (every warm-up holds it shared until it exits);
- no test job says that it uses the cache: the hold is ours exclusively (`warm-cache hold` has it shared, and so has
  whoever keeps a view of the root, an overlay with the root below, for as long as the view lives);
- no process has touched it for as long as a job may last: jobs that say nothing are known by what they do. Touched is
  both modified and moved, by the file's own times; the latter is what tells how long something lies aside;
- no view has it below, of those that the root has a record of (their generation holds another name of every file, so
  that nothing would break, and nothing be freed either), and no overlay that is mounted here, about which the kernel
  says nothing of what it shows after a change.

The locks are held until the removal is done, so that what was true stays true: a job that starts meanwhile waits the
moment it takes. Both are tried and never waited for: a cleaner can come back.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from builder import flock
from builder.beneath import Tree
from builder.cache import inventory, layout, usage, view_records
from builder.cache.families import FAMILY, KEY
from builder.files import why

#: Names that `inventory.sweep` gives to what it moves; other files there are left alone.
_MOVED = re.compile(rf"[a-z_]+-{KEY}-[0-9a-f]{{12}}-[0-9a-f]{{32}}")
_OWNER = re.compile(rf"(?P<family>[a-z_]+)-(?P<key>{KEY})")
#: What a removal that was killed has left.
_KILLED = re.compile(r"\.[0-9a-f]{16}\.tmp")
_MOUNTS = Path("/proc/self/mountinfo")
HELD = "a test job holds the cache"


@contextlib.contextmanager
def may_remove(
    root: Path,
    family: str,
    key: str,
    *,
    job_max: float,
    now: float,
    what: Path | None = None,
    mounts: Path = _MOUNTS,
    create: bool = True,
    past_hold: bool = False,
    past_use: bool = False,
) -> Iterator[str | None]:
    """Yield why something of this family may not be removed now, or None: it may, until the context ends.

    what: the file or directory in question, by default the family's whole directory.
    job_max: seconds that a test job may last.
    now: seconds since the epoch, as file times are; a time after it counts as just now.
    create: make missing lock files; without, nothing is written, and a missing lock counts as free.
    past_hold, past_use: do not wait for a hold, or for the family's lock and touched files: `cache.blocked` says when.
    Never raises OSError.
    """
    name = f"{family}/{key}" if what is None else what.relative_to(root).as_posix()
    with contextlib.ExitStack() as locks, Tree(root) as tree:
        yield (
            _busy(locks, root, family, key, create, past_hold=past_hold, past_use=past_use)
            or (None if past_use else _used(tree, name, job_max, now))
            or _recorded(root, root / name)
            or _viewed(root, name, mounts)
        )


def is_held(root: Path) -> bool:
    """Return whether a process holds the cache now. Writes nothing."""
    with contextlib.ExitStack() as locks:
        return _refused(locks, root, layout.hold_lock(root), HELD, create=False) is not None


def clear_quarantine(root: Path, *, job_max: float, now: float) -> Iterator[tuple[str, str, str, str | None]]:
    """Remove what is in quarantine for long enough; yield (family, key, path below the root, why it stays or None).

    Younger than job_max is no refusal, so nothing is yielded for it.
    """
    for family, key, name in _quarantined(root):
        with Tree(root) as tree:
            if _used(tree, name, job_max, now) is not None:
                continue
        with may_remove(root, family, key, job_max=job_max, now=now, what=root / name) as refusal:
            stays = refusal or remove(root, name)
        yield family, key, name, stays


def clear_host_specific(root: Path, family: str, key: str) -> list[str]:
    """Remove the files that are true on this host alone, whatever their age; return their names.

    sglang writes such a file, waits for its other ranks, and reads it, and must not find it removed in between. So it
    stays while another process works in the family or holds the cache, and the last of them, or the next, removes it.
    """
    with contextlib.ExitStack() as locks:
        refusal = _busy(locks, root, family, key)
        place = Tree(root, f"{family}/{key}")
        return [] if refusal else inventory.remove_host_specific(FAMILY[family], place)


def _quarantined(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield family, key and path below the root of everything in quarantine, and of removals that were killed."""
    with Tree(root) as tree:
        for folder in tree.listing(layout.QUARANTINE) or ():
            owner = _OWNER.fullmatch(folder.last)
            if not folder.is_dir or owner is None or owner["family"] not in FAMILY:
                continue
            for item in tree.listing(folder.name) or ():
                moved = item.last.startswith(f"{folder.last}-") and _MOVED.fullmatch(item.last)
                if moved or _KILLED.fullmatch(item.last):
                    yield owner["family"], owner["key"], item.name


def remove(root: Path, name: str) -> str | None:
    """Delete a file or a tree of this name below the root; return why it could not be deleted, or None."""
    try:
        with Tree(root) as tree:
            tree.remove(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be removed: {why(error)}"
    return None


def _busy(
    locks: contextlib.ExitStack,
    root: Path,
    family: str,
    key: str,
    create: bool = True,
    *,
    past_hold: bool = False,
    past_use: bool = False,
) -> str | None:
    """Take both locks exclusively, or return which one is held."""
    works = _refused(locks, root, layout.family_lock(root, family, key), f"a warm-up works in {family}/{key}", create)
    if works and not past_use:
        return works
    held = _refused(locks, root, layout.hold_lock(root), HELD, create)
    return None if past_hold else held


def _refused(locks: contextlib.ExitStack, root: Path, path: Path, held: str, create: bool = True) -> str | None:
    """Take the lock exclusively, or return `held`, or why no process can take it."""
    try:
        descriptor = flock.open_lock(path, create=create, root=root)
        locks.callback(os.close, descriptor)
        return None if flock.try_lock(descriptor) else held
    except FileNotFoundError:
        return None if not create else f"{path.name} cannot be locked: its directory is gone"
    except OSError as error:
        return f"{path.name} cannot be locked: {why(error)}"


def _used(tree: Tree, name: str, job_max: float, now: float) -> str | None:
    touched = _touched(tree, name)
    if touched is None:
        return "it is not known when it was last touched"
    age = max(0.0, now - touched)
    return f"it was touched {age:.0f} s ago, and a job may last {job_max:.0f} s" if age < job_max else None


def _touched(tree: Tree, name: str) -> float | None:
    """Return the latest time at which it or anything in it was modified or moved; None where that is unknown.

    Of a file in a directory only its own time of modification counts: moving it changes the directory, and a generation
    that gives it another name, or removes one, is no use of it. What lies too deep to be a kernel does not count.
    """

    def below(status: os.stat_result) -> float:
        return status.st_ctime if stat.S_ISDIR(status.st_mode) else usage.written(status)

    # Moving changes st_ctime, and writing as well.
    return usage.newest(tree, name, lambda status: status.st_ctime, below)


def _recorded(root: Path, what: Path) -> str | None:
    view = view_records.below(root, what)
    return None if view is None else f"the view {view} has it below"


def _viewed(root: Path, name: str, mounts: Path) -> str | None:
    """Return which overlay, of those that this process can see, has it, a parent or a part of it as a lower layer."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    place = f"{os.path.realpath(root)}/{name}"
    for line in lines:
        own, _, rest = line.partition(" - ")
        kind, *more = rest.split(" ")
        if kind != "overlay" or len(own.split(" ")) < 5:
            continue
        for option in more[-1].split(","):
            name, _, value = option.partition("=")
            for lower in value.split(":") if name.startswith("lowerdir") else ():
                below = os.path.realpath(_unescaped(lower))
                if lower.startswith("/") and os.path.commonpath([place, below]) in (place, below):
                    return f"the view at {_unescaped(own.split(' ')[4])} has it below"
    return None


def _unescaped(text: str) -> str:
    """Return a path from mountinfo without the kernel's octal escapes for blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
