"""The verb `hold`: run a command under a shared lock of the cache, so that nothing is removed meanwhile.

Where this process can open the root's lock file it holds the lock itself, and needs no engine; elsewhere (a named
volume, a remote engine) a container does. A cold cache never fails a test job: if the lock cannot be taken, that is a
warning, and the command runs without it, protected by the times of the files that it touches.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from builder.cache import layout
from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.errors import BuilderError, PreflightError, ProblemsError, UsageError
from builder.flock import try_lock
from builder.host import foreground, outside
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline, poll
from builder.host.locks import open_lock
from builder.manifest.load import CacheSpec
from builder.report.console import PATIENCE, Console
from builder.run import cache_locks
from builder.run.container_executor import ContainerExecutor

#: Seconds that a removal may take before the wait is reported.
_SAY_AFTER = 0.5
#: Seconds that the engine has to answer.
_ENGINE_TIMEOUT = 10.0
#: Seconds that the root's file system has.
_FILES_TIMEOUT = 10.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HoldArgs(ManifestArgs):
    """Arguments of `hold`."""

    command: tuple[str, ...] = ()


def run(args: HoldArgs, invocation: Invocation) -> int:
    """Run the command while the cache is held. Return the command's exit status."""
    if not args.command:
        raise UsageError("which command? It follows after two dashes: warm-cache hold [option ...] -- CMD")
    manifest = None if args.cache and not args.names_manifest else invocation.manifest()
    # The signals that the job ignores: read before this program installs its handlers.
    ignored = [signum for signum in foreground.FORWARDED if signal.getsignal(signum) is signal.SIG_IGN]
    holding = held(
        manifest.cache if manifest else invocation.cache(str(args.cache)),
        here=manifest is None or (invocation.environ.get("DOCKER_HOST") or "unix://").startswith("unix://"),
        connect=(lambda: invocation.connected(invocation.context(manifest), _ENGINE_TIMEOUT)) if manifest else None,
        console=invocation.console,
        cancel=invocation.cancel,
    )
    with invocation.signals.handled(), holding:
        invocation.console.flush(PATIENCE)  # the command writes to the same stream
        return foreground.run(args.command, invocation.environ, ignored=ignored)


@contextlib.contextmanager
def held(
    cache: CacheSpec,
    *,
    here: bool,
    connect: Callable[[], AbstractContextManager[ContainerExecutor]] | None,
    console: Console,
    cancel: Cancel,
) -> Iterator[None]:
    """Hold the cache until the context ends, or report why it is not held. Raises nothing but Interrupted.

    here: the engine is on this machine, so that the root is the directory of this name.
    connect: connects to the engine, for a container that holds the lock; None where no manifest names an image for it.
    """
    with contextlib.ExitStack() as stack:
        try:
            _take(stack, cache, here, connect, console, cancel)
        except BuilderError as error:
            cancel.check()
            problems = error.problems if isinstance(error, ProblemsError) else ()
            why = "; ".join([error.message, *(f"{problem.location}: {problem.text}" for problem in problems)])
            console.say(f"warning: the cache is not held: {why}. The command runs without it.")
        yield


def _take(
    stack: contextlib.ExitStack,
    cache: CacheSpec,
    here: bool,
    connect: Callable[[], AbstractContextManager[ContainerExecutor]] | None,
    console: Console,
    cancel: Cancel,
) -> None:
    if cache.root is not None and here:
        path = layout.hold_lock(cache.root)
        root = cache.root
        try:
            descriptor = _answer(lambda: open_lock(path, root=root), root, cancel)
        except OSError as error:
            gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
            if gone and not _answer(lambda: _is_root(root), root, cancel):
                console.say(f"there is no cache at {root} yet, so there is nothing to hold")
                return
            if connect is None:
                raise PreflightError(f"{path} cannot be opened ({error.strerror})") from None
        else:
            stack.callback(os.close, descriptor)
            _lock(descriptor, str(cache.root), console, cancel)
            return
    if connect is None:
        raise PreflightError("holding it takes a container, whose image a manifest names: pass --manifest or --profile")
    executor = stack.enter_context(connect())
    if cache.volume is not None and not executor.engine.has_volume(cache.volume):
        console.say(f"there is no volume {cache.volume} yet, so there is nothing to hold")
        return
    if executor.image is None:
        raise PreflightError(
            f"{executor.context.manifest.image.ref} is not on this engine, and holding it takes a container of it"
        )
    name = executor.root_name
    lifetime = max(cache.job_max, executor.context.manifest.run.lifetime)
    lock = cache_locks.ContainerLock(
        "hold", "the hold", "a cleaner", f"removes from {name}", f"{name} is being cleaned", lifetime
    )
    stack.enter_context(cache_locks.held_by_container(executor, lock))


def _answer(ask: Callable[[], T], root: Path, cancel: Cancel) -> T:
    """Return what a file system answers. Raises PreflightError for one that hangs, and what `ask` raises."""
    try:
        return outside.call(ask, str(root), _FILES_TIMEOUT, give_up=lambda: cancel.is_set)
    except outside.StuckError:
        raise PreflightError(f"the file system of {root} does not answer") from None


def _is_root(root: Path) -> bool:
    """Return whether this is a cache root. A root of an older builder has no lock for the hold.

    True also where this process may not look.
    """
    try:
        return (root / "layout.json").is_file()
    except OSError:
        return True


def _lock(descriptor: int, name: str, console: Console, cancel: Cancel) -> None:
    """Take the lock. A removal takes moments, and is waited for without limit."""
    if poll(lambda: _try(descriptor) or cancel.is_set, Deadline(_SAY_AFTER), every=0.02):
        return cancel.check()
    console.say(f"waiting for a cleaner, which removes from {name}")
    poll(lambda: _try(descriptor) or cancel.is_set, Deadline(None), every=0.05)
    return cancel.check()


def _try(descriptor: int) -> bool:
    try:
        return try_lock(descriptor, shared=True)
    except OSError as error:
        raise PreflightError(f"its file system cannot lock files ({error.strerror})") from None
