"""Removal of what dead builders left: their containers, with the end of their logs, and their lease directories.

The proof that an owner is dead is its lease; see `builder.engine.lease`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builder import files, flock
from builder.engine.api import Containers, ListedContainer
from builder.engine.errors import NotFoundError
from builder.engine.lease import (
    FILE,
    HELD,
    LABEL_DEADLINE,
    LABEL_LEASE,
    LABEL_TASK,
    NEW,
    engine_of,
    home_directory,
    is_free,
    lease_of,
    owner_is_dead,
    private_directory,
)
from builder.engine.log_sinks import MARKS, Lines, LogFile
from builder.errors import BuilderError
from builder.host.hooks import PENDING_RELEASE

#: How many of the last entries of a leftover log are saved: the builder has written what came before.
SAVED_ENTRIES = 10_000

#: States in which no process of a container runs.
_ENDED = ("created", "exited", "dead")
#: A directory that is still named NEW after so many seconds belongs to a builder that died while it made it.
_NEW_AGE = 3600.0
#: Seconds for which the lease of a dead owner is kept for an engine other than the one that is swept. After that its
#: containers, if that engine still exists, are past their own deadlines, by which a sweep there removes them.
OTHERS_AGE = 30 * 86400.0
#: Seconds for which all leases that labels name are waited for, and each of them in any case: anybody's label may name
#: a file system that hangs.
_PATIENCE, _LEAST_PATIENCE = 3.0, 0.1
#: Dead owners' leases that one sweep removes: each takes a descriptor.
_LEASES = 256


@dataclass(frozen=True)
class Swept:
    """One container of a dead owner. removed: False if it was left alone. why: the reason, in words."""

    name: str
    task: str
    removed: bool
    why: str

    def __str__(self) -> str:
        return f"{'removed' if self.removed else 'left'} {self.name} ({self.task}): {self.why}"


def sweep(
    engine: Containers,
    state_dir: Path,
    *,
    grace: float = 5.0,
    run_release: Callable[[Path], bool] = lambda directory: False,
    save: Callable[[ListedContainer], str] = lambda container: "",
) -> list[Swept]:
    """Remove containers of dead owners, then dead owners' lease directories that no container refers to.

    A lease is removed by its own engine's sweep alone, or after OTHERS_AGE, and only if it was free before the
    containers were listed.

    grace: seconds between SIGTERM and SIGKILL.
    run_release: receives a dead owner's directory with a pending release, after its containers are removed; returns
    whether the release has run. Until then the directory stays.
    save: receives a container that has ended, before it is removed; returns a sentence about its log, or "".
    """
    swept, referred = [], set()
    with contextlib.ExitStack() as held:
        dead = _dead_leases(private_directory(state_dir), held, engine.identity)
        patience = _PATIENCE
        for container in engine.containers([LABEL_LEASE]):
            began = time.monotonic()
            proof = owner_is_dead(container.labels, max(patience, _LEAST_PATIENCE))
            patience -= time.monotonic() - began
            result = None if proof is False else _sweep_container(engine, container, proof, grace, save)
            if result is not None:
                swept.append(result)
            if result is None or not result.removed:
                referred.add(Path(str(lease_of(container.labels).get("path"))).parent)
        for directory in dead:
            if directory not in referred:
                _remove_lease(directory, engine.identity, run_release)
    return swept


def has_pending_releases(state_dir: Path) -> bool:
    """Return whether any builder of this user, dead or alive, has recorded a release that has not run yet."""
    return any(home_directory(state_dir).glob(f"{HELD}*/{PENDING_RELEASE}"))


def kept_for_others(state_dir: Path, engine: str) -> list[Path]:
    """Return the lease directories of this user that are for other engines, of dead owners."""
    found = []
    for item in files.listing(str(home_directory(state_dir))) or ():
        directory = Path(item.path)
        if files.is_dir(item) and item.name.startswith(HELD) and engine_of(directory) != engine:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                descriptor = flock.open_lock(directory / FILE)
                stack.callback(os.close, descriptor)
                if is_free(descriptor):
                    found.append(directory)
    return found


def save_log(engine: Containers, container: ListedContainer, directory: Path) -> str:
    """Write the end of a container's log to a file in this directory; return a sentence about it, "" if it is empty.

    Never raises: a log that cannot be saved does not keep the container from being removed.
    """
    file = LogFile(directory / f"swept-{container.name}.log")
    lines = {stream: Lines() for stream in MARKS}
    try:
        for stream, entry in engine.log_frames(container.id, follow=False, tail=SAVED_ENTRIES):
            if not file.is_open:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                file.open()
            if stream in lines and (region := lines[stream].feed(entry)):
                file.write(MARKS[stream], region)
        for stream, rest in lines.items():
            if region := rest.last():
                file.write(MARKS[stream], region)
    except NotFoundError:  # another client removed it first
        return ""
    except (BuilderError, OSError) as error:
        return f"the end of its log could not be saved ({error})"
    finally:
        was_open = file.is_open
        file.close()
    if file.problem:
        return file.problem
    return f"the end of its log is in {file.path}" if was_open else ""


def _sweep_container(
    engine: Containers,
    container: ListedContainer,
    dead: bool | None,
    grace: float,
    save: Callable[[ListedContainer], str],
) -> Swept:
    """Remove one container if its owner is dead. dead: None where that cannot be proven."""
    task = container.labels.get(LABEL_TASK, "?")
    why = "its builder is gone"
    if dead is None:
        if container.status not in _ENDED or not _is_past_deadline(container.labels):
            return Swept(
                container.name, task, False, "its lease file cannot be seen from here; it ends by its own lifetime"
            )
        why = "its lifetime is over, and it does not run"
    try:
        if container.status not in _ENDED:
            engine.stop(container.id, grace)
        if container.status != "created" and (log := save(container)):
            why += f"; {log}"
        engine.remove(container.id, force=True)
    except NotFoundError:
        why += "; another client removed it first"
    except BuilderError as error:
        return Swept(container.name, task, False, error.message)
    return Swept(container.name, task, True, why)


def _is_past_deadline(labels: Mapping[str, str]) -> bool:
    text = labels.get(LABEL_DEADLINE, "")
    return text.isdecimal() and len(text) < 16 and time.time() > int(text)


def _dead_leases(home: Path, held: contextlib.ExitStack, engine: str) -> list[Path]:
    """Return lease directories of dead owners, and hold their locks: they are dead before what is asked next.

    Those of other engines only where a release is pending: they stay, and do not take the place of one that may go.
    """
    found: list[Path] = []
    for item in files.listing(str(home)) or ():
        directory = Path(item.path)
        if not files.is_dir(item) or len(found) >= _LEASES:
            continue
        if item.name.startswith(NEW):
            with contextlib.suppress(OSError):
                if time.time() - directory.stat().st_mtime > _NEW_AGE:
                    shutil.rmtree(directory, ignore_errors=True)
        elif item.name.startswith(HELD):
            if not (_is_to_go(directory, engine) or (directory / PENDING_RELEASE).exists()):
                continue
            with contextlib.suppress(OSError):
                descriptor = flock.open_lock(directory / FILE)
                held.callback(os.close, descriptor)
                if is_free(descriptor):
                    found.append(directory)
    return found


def _remove_lease(directory: Path, engine: str, run_release: Callable[[Path], bool]) -> None:
    """Run a dead owner's release, and remove its lease unless containers of another engine may name it."""
    with contextlib.suppress(OSError):
        settled = not (directory / PENDING_RELEASE).exists() or run_release(directory)
        if settled and _is_to_go(directory, engine):
            shutil.rmtree(directory, ignore_errors=True)


def _is_to_go(directory: Path, engine: str) -> bool:
    """Return whether a dead owner's lease is this engine's, or older than any other engine needs it."""
    if engine_of(directory) == engine:
        return True
    try:
        return time.time() - (directory / FILE).lstat().st_mtime > OTHERS_AGE
    except OSError:
        return False
