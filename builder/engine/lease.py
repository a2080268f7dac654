"""The builder's hold on its containers: a kernel lock that ends with the builder, whatever ends it.

The lock is on a file of our own, which every container has bind-mounted read-only. A container that gets the lock
knows that its builder is dead; so does the next builder, and it removes what was left. Never by name, image or pid.

Which process may sweep what, process by process: a builder locks its file before the file has the name that labels
carry, and before any container exists. A sweeper that finds the file under its name therefore either fails to lock it
(the owner lives) or gets the lock (the owner is dead for good: no process locks that file a second time). A file that
is missing, or is another one than the label names, proves nothing, and its container is left to its own lifetime.

So the file of a dead owner is kept for as long as a container may name it. It is removed only by a sweeper that had
its lock first, listed the containers of the very engine that the lease is for after that, and found none that names it:
the owner made no container after its death, and no other engine's list says anything. A lease for an engine that no
sweep reaches any more is named by each sweep, and goes after a month: containers that name it are past their lifetime.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from builder import files, flock
from builder.engine.api import Mount
from builder.errors import PreflightError
from builder.host import outside
from builder.host.hooks import PENDING_RELEASE

LABEL = "io.sglang.warm-cache."
LABEL_RUN, LABEL_LEASE, LABEL_MODE, LABEL_TASK, LABEL_DEADLINE = (
    LABEL + name for name in ("run", "lease", "mode", "task", "deadline")
)

#: Path of the lease file in a container.
TARGET = "/run/warm-cache-lease"

#: Name of the lease file, and prefixes of its directory while it is being made and once it is held.
FILE = "lease"
#: Name of the file next to it that has the identity of the lease's engine.
ENGINE = "engine"
NEW, HELD = "new-", "held-"

#: A lease's path, see `home_directory`; and characters of a label that may hold one.
_PATH = re.compile(rf"/(?:[^/\0]+/)*warm-cache-\d+/{HELD}[^/\0]+/{FILE}")
_LABEL_LIMIT = 8192


class Lease:
    """Held while the context lasts; the kernel ends it when this process ends, however that happens.

    Raises PreflightError if no lease file can be made.

    state_dir: a directory on a local file system; the lease gets a directory in it that no other user can enter.
    engine: identity of the engine whose containers it is for.
    """

    target = TARGET

    def __init__(self, state_dir: Path, *, run_id: str, engine: str = "", nonce: str | None = None) -> None:
        self.run_id = run_id
        self._engine = engine
        self.nonce = nonce or os.urandom(16).hex()
        self._state_dir = state_dir
        self._descriptor = -1
        self.path = Path()
        #: Set when a container could not be removed: the file then outlives this builder, to prove that it is dead.
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
        import tempfile  # a check takes no lease

        new = Path(tempfile.mkdtemp(prefix=NEW, dir=home))
        try:
            # Readable by every user that a container may run as; no other user of this host can enter the directory.
            self._descriptor = os.open(new / FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.fchmod(self._descriptor, 0o644)
            flock.lock(self._descriptor)
            os.write(self._descriptor, self.nonce.encode() + b"\n")
            (new / ENGINE).write_text(self._engine, encoding="utf-8", errors="backslashreplace")
            held = home / (HELD + new.name.removeprefix(NEW))
            new.rename(held)
        except BaseException:
            self._release(new)
            raise
        self.path = held / FILE

    def __exit__(self, *exc: object) -> None:
        self._release(self.path.parent)

    def _release(self, directory: Path) -> None:
        if not self.keep and not (directory / PENDING_RELEASE).exists():
            shutil.rmtree(directory, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def mount(self) -> Mount:
        """Return the mount of the file itself, so that a container sees this very inode."""
        return Mount(source=str(self.path), target=TARGET, read_only=True)

    def labels(self, task: str, lifetime: float) -> dict[str, str]:
        """Return the labels of a container that ends by itself after `lifetime` seconds."""
        status = os.fstat(self._descriptor)
        return {
            LABEL_RUN: self.run_id,
            LABEL_TASK: task,
            LABEL_DEADLINE: str(int(time.time() + lifetime)),
            LABEL_LEASE: json.dumps({"path": str(self.path), "dev": status.st_dev, "ino": status.st_ino}),
        }


def home_directory(state_dir: Path) -> Path:
    """Return this user's directory for leases below `state_dir`, which may not exist."""
    return state_dir / f"warm-cache-{os.getuid()}"


def private_directory(state_dir: Path) -> Path:
    """Make and return `home_directory`. Raises PreflightError if it cannot be made or belongs to another user."""
    home = home_directory(state_dir)
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PreflightError(
                f"{home} belongs to another user: remove it, or set XDG_RUNTIME_DIR to a directory of yours"
            )
        home.chmod(0o700)
    except OSError as error:
        raise PreflightError(
            f"cannot use {home} for lease files: {error.strerror}. Set XDG_RUNTIME_DIR to a writable directory"
        ) from error
    return home


def lease_of(labels: Mapping[str, str]) -> Mapping[str, object]:
    """Return path, device and inode of the lease file that a container's labels name; empty if they name none.

    Labels may be an image's, so any user's: a path counts only if it has the form of one of ours, and is never opened
    before the file is known to be a regular one.
    """
    text = labels.get(LABEL_LEASE, "")
    try:
        lease = json.loads(text) if len(text) <= _LABEL_LIMIT else None
    except (ValueError, RecursionError):
        return {}
    if not isinstance(lease, dict):
        return {}
    path = lease.get("path")
    return lease if isinstance(path, str) and _PATH.fullmatch(path) else {}


def owner_is_dead(labels: Mapping[str, str], patience: float) -> bool | None:
    """Return whether the owner that these labels name is dead; None if that cannot be proven from here.

    patience: seconds to wait for the file system of the path, which the labels' author has chosen, and which may hang.
    """
    try:
        return outside.call(lambda: _owner_is_dead(lease_of(labels)), "the lease", patience)
    except outside.StuckError:
        return None


def _owner_is_dead(lease: Mapping[str, object]) -> bool | None:
    try:
        descriptor = flock.open_lock(Path(str(lease.get("path"))))
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != (lease.get("dev"), lease.get("ino")):
            return None
        return is_free(descriptor)
    finally:
        os.close(descriptor)


def engine_of(directory: Path) -> str | None:
    """Return the identity of the engine that a lease's directory is for; None where it does not say."""
    try:
        return files.read_bytes(str(directory / ENGINE), 4096).decode("utf-8", "replace")
    except files.UnreadableError:
        return None


def is_free(descriptor: int) -> bool:
    """Return whether no process holds this lease file's lock."""
    try:
        return flock.try_lock(descriptor, shared=True)
    except OSError:
        return False
