"""Host-wide locks on GPUs, whatever cache a builder warms and whoever runs it: kernel locks that die with their holder.

One file per GPU, named by its UUID, in a directory that all users of the machine share. A builder locks in every such
directory that it can use: one user may have no access to the first, and another a private /tmp. All builders go through
directories and names in the same order, and so no two of them ever wait for each other.

Nothing is ever unlinked: a lock on a name that is gone excludes nobody.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from builder.flock import try_lock
from builder.host.locks import Patience

DIRECTORIES = (Path("/run/lock/warm-cache"), Path("/tmp/warm-cache-locks"))  # noqa: S108 - shared on purpose

#: Held from before `[gpus] acquire` until after `release`: what one builder takes out of service no other puts back.
SERVICE = "service"

_SHARED = 0o1777
_MAY_COME = "other builders on this machine may not be kept off its GPUs"


@contextlib.contextmanager
def locked(names: Mapping[str, str], patience: Patience, warn: Callable[[str], None]) -> Iterator[None]:
    """Holds these locks; names: of a lock → what it stands for, for people. warn: is told what cannot be locked.

    Waits for other builders, saying for whom; raises BusyError when they take too long, and then holds none.
    """
    with contextlib.ExitStack() as held:
        directories = usable() if names else []
        if names and not directories:
            warn(f"{_MAY_COME}: no access to {' or '.join(map(str, DIRECTORIES))}")
        for directory in directories:
            for name, what in sorted(names.items()):
                try:
                    descriptor = lock_file(directory, name)
                except OSError as error:
                    warn(f"{_MAY_COME}: {error.filename or directory}: {error.strerror}")
                    continue
                held.callback(os.close, descriptor)
                patience.take(descriptor, doing=f"holds {what}", busy=f"{what} is in use")
        yield


@contextlib.contextmanager
def at_once(name: str) -> Iterator[bool]:
    """Holds this lock if nobody else has it, in every directory; says whether it does."""
    with contextlib.ExitStack() as held:
        free = True
        for directory in usable():
            try:
                descriptor = lock_file(directory, name)
                held.callback(os.close, descriptor)
                free = try_lock(descriptor)
            except OSError:
                free = False
            if not free:
                break
        yield free


def usable(directories: Sequence[Path] = DIRECTORIES) -> list[Path]:
    """Those of these directories that are there, or can be made, and that this user can lock files in."""
    return [directory for directory in directories if _is_shared(directory) or _made(directory)]


def _is_shared(directory: Path) -> bool:
    """Only a real one: a link in a place where everybody writes leads wherever its maker likes."""
    try:
        is_directory = stat.S_ISDIR(directory.lstat().st_mode)
    except OSError:
        return False
    return is_directory and os.access(directory, os.R_OK | os.W_OK | os.X_OK)


def _made(directory: Path) -> bool:
    """It gets its name when its mode is right, so that nobody finds it half made. A rename never replaces a directory
    that holds a lock file.
    """
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".warm-cache-", dir=directory.parent))
        scratch.chmod(_SHARED)
        scratch.rename(directory)
    except OSError:
        if scratch is not None:
            with contextlib.suppress(OSError):
                scratch.rmdir()
    return _is_shared(directory)


def lock_file(directory: Path, name: str) -> int:
    """A descriptor of the lock file of this name, made where there is none. Whoever made it, everybody can lock it."""
    path = directory / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.lock"
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    # Without O_CREAT first: in a sticky directory the kernel may refuse it for a file of somebody else
    # (fs.protected_regular), even where nothing has to be created.
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, flags)
    # Made under another name, because the umask may keep others from opening it until its mode is right.
    made, scratch = tempfile.mkstemp(prefix=".new-", dir=directory)
    try:
        os.fchmod(made, 0o666)
        with contextlib.suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        os.close(made)
        Path(scratch).unlink()
    return os.open(path, flags)
