"""Makes a container's own copy of the cache equal to a published one again: `here-reset`.

A long-lived container of a runner has the root, or one generation, mounted read-only, and a directory of its own where
jobs look for kernels. Whatever jobs left there is foreign: everything is compared with the source, by content, since a
job that was root could have set every time and mode. Files are replaced by a rename and never written in place, because
a job could have linked one to a file of the system.

Every directory is opened relative to the one above it, without following links, on both sides; trees are walked without
recursion. Times are those of the source, to the nanosecond, of directories too: ninja compares them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from builder.beneath import Tree
from builder.cache import generations, layout
from builder.cache.families import FAMILY, Family, is_key
from builder.files import copy_content, matches, why
from builder.text import printable

#: No kernel is so large (4 GiB), and no cache so deep: what is, was planted, and is not copied.
LARGEST = 1 << 32
DEEPEST = 64
#: Skipped names that are kept for the report.
MOST_NAMED = 20

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_CHUNK = 1 << 20


class ResetError(Exception):
    """The reset is refused, or cannot be done. The message has what was found and what to do."""


@dataclass
class Outcome:
    """What was done. skipped: names in the source that were not copied, and why, the first of them."""

    copied: int = 0
    removed: int = 0
    kept: int = 0
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.copied or self.removed)


@dataclass(frozen=True)
class _Folder:
    """A directory of both sides, by descriptors. family: None above a family's directories."""

    name: str
    source: int
    target: int
    family: Family | None
    depth: int


def reset(source: Path, target: Path, *, whatever: bool = False) -> Outcome:
    """Make `target` hold what `source` holds, and nothing else but its own locks. Raises ResetError.

    whatever: also where nothing in the target is a cache's, because all of it belongs to the cache.
    """
    began, done = time.monotonic(), Outcome()
    try:
        if target.is_dir() and not os.access(target, os.R_OK | os.X_OK):
            _unlocked(str(target), None)
        _refuse(source, target, whatever)
        if target.is_dir():
            _unlocked(str(target), None)
        target.mkdir(parents=True, exist_ok=True)
        _Reset(source, target, done).run()
        layout.prepare(target)
    except OSError as error:
        place = printable(str(error.filename or target))
        raise ResetError(
            f"{target} is not as it should be: {place}: {why(error)}. Start a new container, or give this one a "
            "directory of its own that can be written."
        ) from error
    except layout.LayoutError as error:
        raise ResetError(str(error)) from None
    done.seconds = round(time.monotonic() - began, 3)
    return done


def _refuse(source: Path, target: Path, whatever: bool) -> None:
    mine, theirs = target.resolve(), source.resolve()
    with Tree(theirs) as published, Tree(mine) as own:
        if not (published.exists(layout.LAYOUT) and stat.S_ISREG(published.lstat(layout.LAYOUT).st_mode)):
            raise ResetError(f"{source} is no cache root and no generation: it has no layout.json. Mount one there.")
        inner = [f"{generations.FOLDER}/{each}" for each in generations.known(mine)]
        if (
            mine == theirs
            or mine in theirs.parents
            or theirs in mine.parents
            or any(os.path.samestat(own.lstat(each), published.lstat("")) for each in ("", *inner) if own.exists(each))
        ):
            raise _same(source, target)
        first = own.some("", 1)
        is_cache = any(map(own.exists, (layout.LAYOUT, *layout.FOLDERS, *FAMILY)))
    if mine in Path(__file__).resolve().parents:
        raise ResetError(f"this program is in {target}, all of which would be removed. Name a directory of its own.")
    if first and not whatever and not is_cache:
        raise ResetError(
            f"{target} is not empty, and nothing in it is a cache's ({printable(first[0].last)}, …). All of it would "
            "be removed: empty it, or name another directory."
        )


def _same(source: Path, target: Path) -> ResetError:
    return ResetError(
        f"{source} and {target} are the same cache, or one is in the other. The target is a directory of the "
        "container's own."
    )


class _Reset:
    def __init__(self, source: Path, target: Path, done: Outcome) -> None:
        self._source, self._target, self._done = source, target, done
        self._trash = -1
        self._number = 0

    def run(self) -> None:
        name = f".{os.urandom(8).hex()}.tmp"
        try:
            with contextlib.ExitStack() as stack:
                source = _opened(stack, str(self._source), None)
                target = _opened(stack, str(self._target), None)
                os.mkdir(name, 0o700, dir_fd=target)
                if _exists(source, name):  # the same directory by another mount
                    os.rmdir(name, dir_fd=target)
                    raise _same(self._source, self._target)
                self._trash = _opened(stack, name, target)
                self._folder(_Folder("", source, target, None, 0), spare=name)
        finally:
            with Tree(self._target) as tree:
                if tree.is_dir(name):
                    tree.remove(name)

    def _folder(self, top: _Folder, spare: str) -> None:
        """Walk both sides, a directory's content before its times. spare: a name at the top that stays."""
        stack: list[tuple[_Folder, Iterator[str] | None]] = [(top, None)]
        try:
            while stack:
                folder, left = stack.pop()
                if left is None:
                    left = iter(self._files(folder, spare))
                    stack.append((folder, left))
                    continue
                name = next(left, None)
                if name is None:
                    self._leave(folder)
                    continue
                stack.append((folder, left))
                if (below := self._enter(folder, name)) is not None:
                    stack.append((below, None))
        finally:
            for folder, _ in stack:
                if folder.depth:
                    os.close(folder.source)
                    os.close(folder.target)

    def _files(self, folder: _Folder, spare: str) -> list[str]:
        """Make the files of a directory equal, remove what else is there, and return the directories to walk."""
        below, wanted = [], {spare} if not folder.depth else set()
        with os.scandir(folder.source) as items:
            found = sorted(items, key=lambda item: item.name)
        for item in found:
            name = f"{folder.name}/{item.name}" if folder.name else item.name
            if not _belongs(folder, item.name):
                continue
            status = item.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and folder.depth < DEEPEST:
                below.append(item.name)
            elif not folder.depth or not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                self._skip(name, "no file, too large, or too deep")
                continue
            elif not self._file(folder, item.name, name):
                continue
            wanted.add(item.name)
        if folder.depth == 0:
            # Its own identity: that of a root is no copy's.
            wanted |= {name for name in ("locks",) if _is_folder(folder.target, name)}
            wanted |= {"layout.json"} if layout.is_current(self._target) else set()
        for name in _names(folder.target):
            if name not in wanted:
                self._remove(folder, name)
        if "locks" in wanted and folder.depth == 0:
            self._locks(folder)
        return below

    def _locks(self, folder: _Folder) -> None:
        """Leave only what can be a lock: lock files are never replaced, because a process may hold one."""
        _unlocked("locks", folder.target)
        with contextlib.ExitStack() as stack:
            locks = _opened(stack, "locks", folder.target)
            for name in _names(locks):
                status = os.stat(name, dir_fd=locks, follow_symlinks=False)
                if not (stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_nlink == 1):
                    self._remove(_Folder("locks", locks, locks, None, 1), name)

    def _skip(self, name: str, reason: str) -> None:
        if len(self._done.skipped) < MOST_NAMED:
            self._done.skipped.append(f"{printable(name)} ({reason})")

    def _enter(self, folder: _Folder, name: str) -> _Folder | None:
        """Open a directory on both sides, and make it where it is missing; None where it went meanwhile."""
        try:
            source = os.open(name, _FOLDER, dir_fd=folder.source)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        try:
            if not _is_folder(folder.target, name):
                if _exists(folder.target, name):
                    self._remove(folder, name)
                os.mkdir(name, 0o700, dir_fd=folder.target)
            _unlocked(name, folder.target)
            target = os.open(name, _FOLDER, dir_fd=folder.target)
        except BaseException:
            os.close(source)
            raise
        family = folder.family or (FAMILY.get(folder.name) if folder.depth == 1 else None)
        path = f"{folder.name}/{name}" if folder.name else name
        return _Folder(path, source, target, family, folder.depth + 1)

    def _leave(self, folder: _Folder) -> None:
        if not folder.depth:
            return
        status = os.fstat(folder.source)
        os.fchmod(folder.target, stat.S_IMODE(status.st_mode) & 0o777 | 0o700)
        os.utime(folder.target, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.close(folder.source)
        os.close(folder.target)

    def _file(self, folder: _Folder, name: str, path: str) -> bool:
        """Make one file equal. Returns False where it went from the source meanwhile."""
        try:
            source = os.open(name, _READ, dir_fd=folder.source)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return False
            self._skip(path, why(error))
            return False
        try:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                return False
            if self._is_equal(folder, name, source, status):
                self._done.kept += 1
            else:
                self._copy(folder, name, source, status)
                self._done.copied += 1
        finally:
            os.close(source)
        return True

    def _is_equal(self, folder: _Folder, name: str, source: int, status: os.stat_result) -> bool:
        try:
            now = os.stat(name, dir_fd=folder.target, follow_symlinks=False)
            if not stat.S_ISREG(now.st_mode) or now.st_size != status.st_size or now.st_nlink != 1:
                return False
            if status.st_blocks * 512 + _CHUNK < status.st_size:
                return False  # a sparse one is copied in less time than its holes take to read
            target = os.open(name, _READ, dir_fd=folder.target)
        except OSError:
            return False
        try:
            # All that a process of this user can have done to it: owner and mode are part of what it is.
            if (now.st_uid, stat.S_IMODE(now.st_mode)) != (os.geteuid(), stat.S_IMODE(status.st_mode) & 0o777):
                return False
            left = status.st_size
            while left > 0:
                # No more room than the rest takes: a read of 1 MiB costs its pages, also where 1 kB is there.
                ours, theirs = (os.read(each, min(left, _CHUNK)) for each in (target, source))
                if ours != theirs or not theirs:
                    return False
                left -= len(theirs)
            if now.st_mtime_ns != status.st_mtime_ns:
                os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
            return True
        finally:
            os.close(target)

    def _copy(self, folder: _Folder, name: str, source: int, status: os.stat_result) -> None:
        new = self._new_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(new, flags, 0o600, dir_fd=self._trash)
        try:
            copy_content(source, target)
            os.fchmod(target, stat.S_IMODE(status.st_mode) & 0o777)
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(target)
        if _is_folder(folder.target, name):
            self._remove(folder, name)
        os.rename(new, name, src_dir_fd=self._trash, dst_dir_fd=folder.target)

    def _remove(self, folder: _Folder, name: str) -> None:
        """Move it into a directory that is deleted at the end: a tree of any depth is one rename."""
        if _is_folder(folder.target, name):
            _unlocked(name, folder.target)
        os.rename(name, self._new_name(), src_dir_fd=folder.target, dst_dir_fd=self._trash)
        self._done.removed += 1

    def _new_name(self) -> str:
        self._number += 1
        return str(self._number)


def _belongs(folder: _Folder, name: str) -> bool:
    """Return whether something of this name in the source is a part of the cache that jobs use."""
    if folder.depth == 0:
        return name in FAMILY or name in ("images", "markers")
    if folder.depth == 1 and folder.name in FAMILY:
        return is_key(name.removesuffix(".json"))
    if folder.family is None:  # memos, markers, and the directories of markers
        return not name.startswith(".") and (folder.name == "markers" or name.endswith(".json"))
    family = folder.family
    if folder.depth == 2 and (name in family.apart or matches(name, family.host_specific)):
        return False
    return not _is_transient(name, family.name)


@functools.lru_cache(maxsize=1 << 12)
def _is_transient(name: str, family: str) -> bool:
    """Return whether the family's table says so. Most names in a cache are the same few."""
    return matches(name, FAMILY[family].transient)


def _opened(stack: contextlib.ExitStack, path: str, above: int | None) -> int:
    descriptor = os.open(path, _FOLDER, dir_fd=above)
    stack.callback(os.close, descriptor)
    return descriptor


def _unlocked(path: str, above: int | None) -> None:
    """Let the owner of a directory into it, and move it: a job of this user could have forbidden both."""
    kind = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(path, kind if above is None else kind | os.O_NOFOLLOW, dir_fd=above)
    try:
        if os.fstat(descriptor).st_mode & 0o700 != 0o700:
            with contextlib.suppress(OSError):
                Path(f"/proc/self/fd/{descriptor}").chmod(0o700)
    finally:
        os.close(descriptor)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as items:
        return [item.name for item in items]


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_folder(folder: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
