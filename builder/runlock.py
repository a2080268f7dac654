"""One warm-up run per cache root at a time: a kernel lock that dies with its holder, on a file that is never unlinked.

Where this process can open the root's lock file it holds the lock itself. Elsewhere (a named volume, a remote engine,
a root it may not read) a small container under the run's lease holds it: when the builder dies the lease ends the
container, and the kernel the lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from builder import holder
from builder.locks import open_lock
from builder.session import Session

PATH = "locks/run.lock"


@contextlib.contextmanager
def held(session: Session) -> Iterator[None]:
    """Holds the run lock. Raises BusyError when another builder still has it after ``[run] lock_timeout``."""
    root = session.cache.direct()
    try:
        descriptor = open_lock(root / PATH) if root else None
    except OSError:
        descriptor = None
    name, doing = session.cache.name, f"works on {session.cache.name}"
    if descriptor is None:
        lifetime = session.manifest.run.lifetime
        lock = holder.Lock("lock", "the run lock", "another builder", doing, f"{name} is in use", lifetime)
        with holder.held(session, lock):
            yield
        return
    try:
        session.patience().take(descriptor, doing=doing, busy=f"{name} is in use")
        yield
    finally:
        os.close(descriptor)
