"""One warm-up run per cache root at a time: a kernel lock that dies with its holder, on a file that is never unlinked.

Where this process can open the root's lock file it holds the lock itself. Elsewhere (a named volume, a remote engine,
a root it may not read) a small container under the run's lease holds it: when the builder dies the lease ends the
container, and the kernel the lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from builder.host.locks import open_lock
from builder.run import holder
from builder.run.container_executor import ContainerExecutor

PATH = "locks/run.lock"
#: The other lock of this kind: for whoever makes, drops or sweeps views.
VIEWS = "locks/views.lock"


@contextlib.contextmanager
def held(executor: ContainerExecutor) -> Iterator[None]:
    """Holds the run lock. Raises BusyError when another builder still has it after ``[run] lock_timeout``."""
    name, lifetime = executor.cache.name, executor.context.manifest.run.lifetime
    doing, busy = f"works on {name}", f"{name} is in use"
    with _held(executor, PATH, holder.Lock("lock", "the run lock", "another builder", doing, busy, lifetime)):
        yield


@contextlib.contextmanager
def views(executor: ContainerExecutor) -> Iterator[None]:
    """Holds the lock of all views: a view is made also while a warm-up has the run lock. Raises BusyError."""
    name, lifetime = executor.cache.name, executor.context.manifest.run.lifetime
    doing, busy = f"makes or drops a view of {name}", f"the views of {name} are in use"
    with _held(
        executor, VIEWS, holder.Lock("views", "the lock of all views", "another builder", doing, busy, lifetime)
    ):
        yield


@contextlib.contextmanager
def _held(executor: ContainerExecutor, path: str, lock: holder.Lock) -> Iterator[None]:
    root = executor.cache.direct()
    try:
        descriptor = open_lock(root / path) if root else None
    except OSError:
        descriptor = None
    if descriptor is None:
        with holder.held(executor, lock):
            yield
        return
    try:
        executor.patience().take(descriptor, doing=lock.doing, busy=lock.busy)
        yield
    finally:
        os.close(descriptor)
