"""Machine-wide locks on GPUs, shared by all builders and all users: kernel locks that end with their holder.

One file per GPU, named by its UUID, in a directory that all users of the machine share. A builder locks the file in
every such directory that it can use, because some users cannot access the first one and others have a private /tmp. All
builders lock directories and names in the same order, so no two of them ever wait for each other.

Nothing is ever unlinked: a lock on a name that was replaced excludes nothing. So only a directory of root or of this
user counts, with the sticky bit if others may write to it: the owner of a directory may replace what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from builder import flock
from builder.host.locks import LockWait

DIRECTORIES = (Path("/run/lock/warm-cache"), Path("/tmp/warm-cache-locks"))  # noqa: S108 - shared on purpose

#: The lock that is held from before `[gpus] acquire` until after `release`, so that no builder puts a machine back into
#: service that another one still uses.
SERVICE = "service"

#: Makes the directories as root's at every boot.
TMPFILES = "docker/systemd/warm-cache.conf"

_SHARED_MODE = 0o1777
#: How often a lock file may turn out to be replaced while it was waited for.
_REPLACED = 3
_NOT_EXCLUDED = "other builders on this machine may use its GPUs at the same time"


@contextlib.contextmanager
def locked(names: Mapping[str, str], wait: LockWait, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold these locks. Raises BusyError if another builder keeps one too long, and then holds none.

    names: lock name → what it stands for, for people.
    warn: receives one sentence about each lock that cannot be taken here; the run continues without it.
    """
    with contextlib.ExitStack() as stack:
        directories = usable_directories(warn=warn) if names else []
        if names and not directories:
            warn(f"{_NOT_EXCLUDED}: no access to {' or '.join(map(str, DIRECTORIES))}")
        for directory in directories:
            for name, description in sorted(names.items()):
                try:
                    stack.callback(os.close, _lock(directory, name, description, wait))
                except OSError as error:
                    warn(f"{_NOT_EXCLUDED}: {error.filename or directory}: {error.strerror}")
        yield


@contextlib.contextmanager
def try_lock(name: str) -> Iterator[bool]:
    """Take this lock in every directory if it is free, without waiting; yields whether it was."""
    with contextlib.ExitStack() as stack:
        free = True
        for directory in usable_directories():
            try:
                descriptor = open_lock_file(directory, name)
                stack.callback(os.close, descriptor)
                free = flock.try_lock(descriptor)
            except OSError:
                free = False
            if not free:
                break
        yield free


def _lock(directory: Path, name: str, description: str, wait: LockWait) -> int:
    """Return the descriptor of the locked file. Raises BusyError, and OSError where it cannot be had."""
    for _ in range(_REPLACED):
        descriptor = open_lock_file(directory, name)
        try:
            wait.acquire(descriptor, holder_action=f"holds {description}", busy=f"{description} is in use")
            if os.path.samestat(os.fstat(descriptor), _path(directory, name).lstat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError(errno.ESTALE, "it is replaced again and again", str(_path(directory, name)))


def usable_directories(
    directories: Sequence[Path] = DIRECTORIES, *, warn: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Return those of these directories that exist or can be made, and in which this user can lock files.

    Where others own all of them, a private one: the builders of this user then exclude each other.

    warn: receives one sentence about each directory that others could replace files in.
    """
    usable = [directory for directory in directories if _is_usable(directory) or _make(directory)]
    distrusted = {directory: why for directory in directories if (why := _distrust(directory))}
    for directory, why in distrusted.items():
        warn(f"{_NOT_EXCLUDED}: {directory} {why}. Remove it, and let {TMPFILES} make it as root's")
    if distrusted and not usable:
        private = Path(f"{directories[-1]}-{os.geteuid()}")
        with contextlib.suppress(OSError):
            private.mkdir(mode=0o700)
        usable += [private] if _is_usable(private) else []
    return usable


def _distrust(directory: Path) -> str | None:
    """Return why others may replace files in this directory; None where they may not, and for what is none."""
    try:
        status = directory.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to uid {status.st_uid}, who could replace its files"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
        return "has no sticky bit, so that other users could replace its files"
    return None


def _is_usable(directory: Path) -> bool:
    """Return whether it is a directory itself: in a world-writable place, a link leads wherever its maker likes."""
    try:
        is_directory = stat.S_ISDIR(directory.lstat().st_mode)
    except OSError:
        return False
    return is_directory and not _distrust(directory) and os.access(directory, os.R_OK | os.W_OK | os.X_OK)


def _make(directory: Path) -> bool:
    """Make the directory with its final mode; return whether it is usable then.

    It is renamed into place once its mode is right, so no process ever sees it half made. The rename cannot replace a
    directory that holds a lock file, because that one is not empty; an empty one of another user it may.
    """
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".warm-cache-", dir=directory.parent))
        scratch.chmod(_SHARED_MODE)
        scratch.rename(directory)
    except OSError:
        if scratch is not None:
            with contextlib.suppress(OSError):
                scratch.rmdir()
    return _is_usable(directory)


def open_lock_file(directory: Path, name: str) -> int:
    """Return a descriptor of the lock file of this name, which every user can lock; make the file if it is missing.

    Root takes it over from another user, which could remove it while it is locked.
    """
    path = _path(directory, name)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    # First without O_CREAT: in a sticky directory the kernel may refuse it for another user's file
    # (fs.protected_regular), even if the file exists.
    with contextlib.suppress(FileNotFoundError):
        return _taken_over(os.open(path, flags))
    # Made under another name and then linked: until fchmod, the umask may keep other users from opening it.
    made, scratch = tempfile.mkstemp(prefix=".new-", dir=directory)
    try:
        os.fchmod(made, 0o666)
        with contextlib.suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        os.close(made)
        Path(scratch).unlink()
    return _taken_over(os.open(path, flags))


def _path(directory: Path, name: str) -> Path:
    return directory / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.lock"


def _taken_over(descriptor: int) -> int:
    if os.geteuid() == 0 and os.fstat(descriptor).st_uid != 0:
        with contextlib.suppress(OSError):
            os.fchown(descriptor, 0, 0)
    return descriptor
