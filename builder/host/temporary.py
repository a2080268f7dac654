"""Private temporary directories that outlive no process: the next one removes those of processes that were killed.

Each is locked by its process (flock) before it gets its name, so that one that can be locked has no owner any more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from builder import files, flock
from builder.errors import CANNOT_RUN, PreflightError

#: How names begin, with the lock and, for an instant, without.
_PREFIX, _NEW = "warm-cache-held-", "warm-cache-new-"
_OPENED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def directory(purpose: str) -> Iterator[Path]:
    """Yield a new directory that is removed with the context, or by a later process. Raises OSError.

    purpose: a part of its name, for people.
    """
    import tempfile  # a check makes none

    remove_orphans()
    new = Path(tempfile.mkdtemp(prefix=_NEW))
    with contextlib.ExitStack() as stack:
        path = new.with_name(f"{_PREFIX}{purpose}-{new.name.removeprefix(_NEW)}")
        stack.callback(shutil.rmtree, new, ignore_errors=True)
        descriptor = os.open(new, _OPENED)
        stack.callback(os.close, descriptor)
        try:
            flock.lock(descriptor)
        except OSError:  # on a file system without such locks nothing could tell it from an orphan
            yield new
            return
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        new.rename(path)
        yield path


@contextlib.contextmanager
def room(purpose: str) -> Iterator[Path]:
    """Yield a `directory` for a large copy. Raises PreflightError where none can be made."""
    with contextlib.ExitStack() as stack:
        try:
            scratch = stack.enter_context(directory(purpose))
        except OSError as error:
            raise PreflightError(f"{CANNOT_RUN}: there is no room for a copy: {error}. Set TMPDIR") from error
        yield scratch


def remove_orphans() -> None:
    """Remove the directories of this user's processes that ended without removing them. Never raises OSError."""
    with contextlib.suppress(OSError), os.scandir(files.temporary_directory()) as items:
        for item in items:
            if item.name.startswith(_PREFIX):
                with contextlib.suppress(OSError):
                    _remove_orphan(item.path)


def _remove_orphan(path: str) -> None:
    """Remove one if its owner is dead. Raises OSError where that cannot be known."""
    descriptor = os.open(path, _OPENED)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid() and flock.try_lock(descriptor):
            shutil.rmtree(path, ignore_errors=True)  # follows no link
    finally:
        os.close(descriptor)
