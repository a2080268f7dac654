"""The builder's hold on its containers: a kernel lock that ends with the builder, whatever ends it.

The lock is on a file of our own, which every container has bind-mounted read-only. A container that gets the lock
knows that its builder is gone; so does the next builder, and it removes what was left. Never by name, image or pid.

Who may sweep what, process by process: a builder locks its file before the file has the name that labels carry, and
before any container exists. A sweeper that finds the file under its name therefore either fails to lock it (the owner
lives) or gets the lock (the owner is dead for good: nobody locks that file a second time). A file that is gone, or is
another one than the label says, proves nothing, and its container is left to its own lifetime.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builder import flock
from builder.engine.api import Containers, Found, Mount
from builder.engine.errors import NotFoundError
from builder.errors import BuilderError, PreflightError
from builder.host.hooks import PENDING_RELEASE

LABEL = "io.sglang.warm-cache."
LABEL_RUN, LABEL_LEASE, LABEL_TASK, LABEL_DEADLINE = (LABEL + name for name in ("run", "lease", "task", "deadline"))

#: Where a container finds the file.
TARGET = "/run/warm-cache-lease"

_FILE = "lease"
_NEW, _HELD = "new-", "held-"
#: A directory that never got its final name belongs to a builder that died within milliseconds. Seconds.
_NEW_AGE = 3600.0


@dataclass(frozen=True)
class Swept:
    """What became of one container of a dead owner. left: nothing was done, and why."""

    name: str
    task: str
    removed: bool
    why: str

    def __str__(self) -> str:
        return f"{'removed' if self.removed else 'left'} {self.name} ({self.task}): {self.why}"


class Lease:
    """Held while the context is; ended by the kernel at this process's end, however that comes.

    state_dir: a directory on a file system of this machine; ours becomes one below it that nobody else can enter.
    """

    target = TARGET

    def __init__(self, state_dir: Path, *, run_id: str, nonce: str | None = None) -> None:
        self.run_id = run_id
        self.nonce = nonce or os.urandom(16).hex()
        self._state_dir = state_dir
        self._descriptor = -1
        self.path = Path()
        #: Set when a container could not be removed: the file then outlives this builder, as the proof that it is dead.
        self.keep = False

    def __enter__(self) -> Lease:
        home = private_directory(self._state_dir)
        try:
            self._take(home)
        except OSError as error:
            raise PreflightError(
                f"cannot make a lease file in {home}: {error.strerror}. Free space there, or set XDG_RUNTIME_DIR to "
                "another directory"
            ) from error
        return self

    def _take(self, home: Path) -> None:
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=home))
        try:
            # Read by whatever user a container runs as; nobody on this host gets here to lock it instead of us.
            self._descriptor = os.open(new / _FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.fchmod(self._descriptor, 0o644)
            flock.lock(self._descriptor)
            os.write(self._descriptor, self.nonce.encode() + b"\n")
            held = home / (_HELD + new.name.removeprefix(_NEW))
            new.rename(held)
        except BaseException:
            self._let_go(new)
            raise
        self.path = held / _FILE

    def __exit__(self, *exc: object) -> None:
        self._let_go(self.path.parent)

    def _let_go(self, directory: Path) -> None:
        if not self.keep and not (directory / PENDING_RELEASE).exists():
            shutil.rmtree(directory, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def mount(self) -> Mount:
        """How a container gets the file: the file itself, so that it is this very inode."""
        return Mount(source=str(self.path), target=TARGET, read_only=True)

    def labels(self, task: str, lifetime: float) -> dict[str, str]:
        """For a container that ends by itself after so many seconds."""
        status = os.fstat(self._descriptor)
        return {
            LABEL_RUN: self.run_id,
            LABEL_TASK: task,
            LABEL_DEADLINE: str(int(time.time() + lifetime)),
            LABEL_LEASE: json.dumps({"path": str(self.path), "dev": status.st_dev, "ino": status.st_ino}),
        }

    def sweep(self, engine: Containers, *, grace: float = 5.0) -> list[Swept]:
        """Ends and removes containers of dead owners, and dead owners' lease files that no container refers to."""
        return sweep(engine, self._state_dir, grace=grace)


def private_directory(state_dir: Path) -> Path:
    """A directory below this one that is ours alone. Raises PreflightError where somebody else has it."""
    home = state_dir / f"warm-cache-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PreflightError(
                f"{home} belongs to somebody else: remove it, or set XDG_RUNTIME_DIR to a directory of yours"
            )
        home.chmod(0o700)
    except OSError as error:
        raise PreflightError(
            f"cannot use {home} for lease files: {error.strerror}. Set XDG_RUNTIME_DIR to a writable directory"
        ) from error
    return home


def sweep(
    engine: Containers,
    state_dir: Path,
    *,
    grace: float = 5.0,
    run_release: Callable[[Path], bool] = lambda directory: False,
    drain: Callable[[Found], str] = lambda container: "",
) -> list[Swept]:
    """See `Lease.sweep`; for one who holds no lease. grace: seconds between SIGTERM and SIGKILL.

    run_release: called with the directory of a dead owner that has a pending release, once its containers are gone;
    returns whether it has run.
    drain: called with a container that has ended, before it is removed; what became of its log, in words.
    """
    found = engine.containers([LABEL_LEASE])
    swept, referred = [], set()
    for container in found:
        result = _sweep_one(engine, container, grace, drain)
        if result is not None:
            swept.append(result)
        if result is None or not result.removed:
            referred.add(str(_label(container.labels).get("path")))
    with contextlib.suppress(OSError):
        _remove_stale(private_directory(state_dir), referred, run_release)
    return swept


def has_pending_releases(state_dir: Path) -> bool:
    """Whether any builder of this user, dead or alive, has something to do before its lease's directory may go."""
    return any((state_dir / f"warm-cache-{os.getuid()}").glob(f"{_HELD}*/{PENDING_RELEASE}"))


def _sweep_one(engine: Containers, container: Found, grace: float, drain: Callable[[Found], str]) -> Swept | None:
    """None for a container whose owner lives."""
    task = container.labels.get(LABEL_TASK, "?")
    dead = _owner_is_dead(container.labels)
    if dead is False:
        return None
    why = "its builder is gone"
    if dead is None:
        ended = container.status in ("created", "exited", "dead")
        if not ended or not _is_past(container.labels):
            return Swept(
                container.name, task, False, "its lease file cannot be seen from here; it ends by its own lifetime"
            )
        why = "its lifetime is over, and it does not run"
    try:
        if container.status not in ("created", "exited", "dead"):
            engine.stop(container.id, grace)
        if container.status != "created" and (kept := drain(container)):
            why += f"; {kept}"
        engine.remove(container.id, force=True)
    except NotFoundError:
        why += "; somebody else was faster"
    except BuilderError as error:
        return Swept(container.name, task, False, error.message)
    return Swept(container.name, task, True, why)


def _owner_is_dead(labels: Mapping[str, str]) -> bool | None:
    """Whether the owner that these labels name is dead; None when that cannot be told from here."""
    lease = _label(labels)
    try:
        descriptor = flock.open_lock(Path(str(lease.get("path"))))
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != (lease.get("dev"), lease.get("ino")):
            return None
        return _is_free(descriptor)
    finally:
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    try:
        return flock.try_lock(descriptor, shared=True)
    except OSError:
        return False


def _label(labels: Mapping[str, str]) -> Mapping[str, object]:
    try:
        lease = json.loads(labels.get(LABEL_LEASE, ""))
    except (ValueError, RecursionError):
        return {}
    return lease if isinstance(lease, dict) else {}


def _is_past(labels: Mapping[str, str]) -> bool:
    text = labels.get(LABEL_DEADLINE, "")
    return text.isdecimal() and len(text) < 16 and time.time() > int(text)


def _remove_stale(home: Path, referred: Iterable[str], run_release: Callable[[Path], bool]) -> None:
    """Lease directories of dead owners. One that a container refers to stays: it proves that the owner is dead."""
    keep = {Path(path).parent for path in referred}
    for directory in home.iterdir():
        if directory in keep or directory.is_symlink():
            continue
        if directory.name.startswith(_NEW):
            if time.time() - directory.stat().st_mtime > _NEW_AGE:
                shutil.rmtree(directory, ignore_errors=True)
        elif directory.name.startswith(_HELD):
            try:
                descriptor = flock.open_lock(directory / _FILE)
            except OSError:
                continue
            with contextlib.closing(os.fdopen(descriptor, "rb")):
                if _is_free(descriptor) and (not (directory / PENDING_RELEASE).exists() or run_release(directory)):
                    shutil.rmtree(directory, ignore_errors=True)
