"""Reads the cache root from the host: directly where possible, elsewhere through the engine.

Through the engine: one container, created and never started, whose archive endpoint reads the mounted root. So a
directory, a named volume and a remote engine are the same for all callers: a path that has the layout below it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from builder import files
from builder.beneath import Tree
from builder.cache import families, marker_files, model_store
from builder.cache.layout import RESTORED
from builder.cache.model_store import STORE_MOUNT as STORE
from builder.engine.api import MEMORY, ContainerSpec, Mount
from builder.engine.client import Engine
from builder.engine.errors import LinkLoopError, MissingSourceError, NotFoundError
from builder.engine.lease import Lease
from builder.errors import BuilderError, EngineLostError, EngineRefusedError, EngineTimeoutError, PreflightError
from builder.host import temporary
from builder.host.cancel import REMOVE_WITHIN, Cancel
from builder.manifest.load import Manifest
from builder.run.unpacking import UnpackBudget, unpack
from builder.text import printable

#: What decides whether a task is warm, besides the entries.
INDEX = ("layout.json", "images", "markers", RESTORED)

#: Seconds after which a sweep may remove a container that was created for reading.
READ_LIFETIME = 3600.0

#: Bytes of one marker or memo, and of all of them; bytes of one file of an entry. No program reads a larger one.
INDEX_FILE, INDEX_BYTES, ENTRY_FILE = 16 << 20, 1 << 30, 2 << 30
#: Of the free space for a copy, what its entries may take.
SHARE = 0.8
#: Names of a folder that are looked at to see whether this process may read them.
_NAMES = 256


def exists(manifest: Manifest, engine: Engine) -> bool:
    """Return False where the manifest's root certainly does not exist; True also for a directory on another machine."""
    root = manifest.cache.root
    if root is None:
        return engine.has_volume(str(manifest.cache.volume))
    return root.is_dir() if engine.local else True


class CacheRoot:
    """Reads one cache root. Nothing is opened before it is needed."""

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        *,
        image: str,
        lease: Callable[[], Lease],
        cancel: Cancel,
        on_skip: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """on_skip: called with what of the root is left out of a copy, and why."""
        self._manifest = manifest
        self._engine = engine
        self._image = image
        self._lease = lease
        self._cancel = cancel
        self._on_skip = on_skip

    @property
    def name(self) -> str:
        """The directory, or ``volume NAME``, for people."""
        cache = self._manifest.cache
        return printable(str(cache.root)) if cache.root else f"volume {cache.volume}"

    def mount(self) -> Mount:
        """Return the mount by which a container gets the root."""
        cache = self._manifest.cache
        if cache.root:
            return Mount(source=str(cache.root), target=cache.mount)
        return Mount(source=str(cache.volume), target=cache.mount, kind="volume")

    def direct(self) -> Path | None:
        """Return the root where this process can read it: a directory on the engine's machine, readable to us."""
        root = self._manifest.cache.root
        if root is None or not self._engine.local or not root.is_dir():
            return None
        known = [str(root / name) for name in (*INDEX, *families.FAMILY)]
        with Tree(root) as tree:
            folders = [tree.some(name, _NAMES) for name in (*INDEX[1:], *families.FAMILY)]
            inside = [str(root / item.name) for items in folders for item in items or () if item.is_dir or item.is_file]
        return None if any(map(_is_closed, (str(root), *known, *inside))) else root

    def exists(self) -> bool:
        """Return False where the root certainly does not exist; True also for a directory on another machine."""
        return exists(self._manifest, self._engine)

    def create(self) -> bool:
        """Make a missing root directory, not its parents (a typo must not become a tree); return whether it did."""
        root = self._manifest.cache.root
        if root is None or self.exists():
            return False
        try:
            root.mkdir(exist_ok=True)  # another builder may be doing so too
        except OSError as error:
            raise PreflightError(f"cannot make the cache root {root}: {error.strerror}. Set [cache] root") from error
        return True

    @contextlib.contextmanager
    def view(self, *, entries: bool = True, keys: Collection[tuple[str, str]] | None = None) -> Iterator[Path]:
        """Yield a path with layout, memos and markers below it, and the entries that the markers list.

        Direct, it is the root itself. Through the engine it is a private copy, removed with the context.
        entries: copy the family directories that markers claim; keys: only those of these (family, key).
        """
        direct = self.direct()
        if direct is not None:
            yield direct
            return
        with self._scratch() as copy, self._reader() as container:
            if container is not None:
                with self._copying():
                    self._fetch(container, INDEX, copy, UnpackBudget(INDEX_FILE, INDEX_BYTES))
                    if entries:
                        claimed = _claimed(copy)
                        if keys is not None:
                            claimed &= {f"{family}/{key}" for family, key in keys}
                        free = shutil.disk_usage(copy).free
                        self._fetch(container, sorted(claimed), copy, UnpackBudget(ENTRY_FILE, int(free * SHARE)))
            yield copy

    @contextlib.contextmanager
    def store_view(self, models: Iterable[str]) -> Iterator[Path | None]:
        """Yield the model store (HF_HOME), or a copy of these models' refs and config.json; None without a store."""
        store = self._manifest.models.store
        if store is None:
            yield None
        elif self._engine.local and os.access(store, os.R_OK | os.X_OK):
            yield store
        else:
            with self._scratch() as copy, self._reader(store=True) as container:
                with self._copying():
                    for model in models if container is not None else ():
                        self._fetch_model(str(container), model, copy)
                yield copy

    def is_shared(self) -> bool:
        """Return False where the engine has another directory at the root's path than this process.

        So it is after a mount that only one of them has: of a disk that was mounted after the engine had started in a
        mount namespace of its own, for example. Compared is layout.json, by its contents and its time.
        """
        direct = self.direct()
        if direct is None:
            return True  # everything is read through the engine
        with self._scratch() as copy, self._reader() as container:
            if container is None:
                return False
            with self._copying():
                self._fetch(container, ("layout.json",), copy, UnpackBudget(INDEX_FILE, INDEX_BYTES))
            return _is_same(_identity(copy), _identity(direct))

    def prove(self, volume: str) -> None:
        """Read through this volume, mounted as a job mounts it in place of the root.

        Raises EngineRefusedError where the engine cannot mount it, or the root is not visible in it.
        """
        with self._reader(volume=volume) as container:
            path = f"{self._manifest.cache.mount}/layout.json"
            if container is not None:
                with contextlib.closing(self._engine.archive(container, path)) as stream:
                    next(stream, None)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Yield a private directory, removed with the context."""
        with contextlib.ExitStack() as stack:
            with self._copying():
                scratch = stack.enter_context(temporary.directory("view"))
            yield scratch

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Raise PreflightError where this machine cannot hold a copy."""
        try:
            yield
        except OSError as error:
            raise PreflightError(
                f"cannot copy what is read of {self.name} to a temporary directory: {error.strerror or error}. Free "
                "space there, or set TMPDIR to another one"
            ) from error

    @contextlib.contextmanager
    def _reader(self, *, store: bool = False, volume: str | None = None) -> Iterator[str | None]:
        """Yield a created container with the root mounted read-only; None where the engine has no such directory.

        store: mount the model store instead; volume: mount this volume instead.
        """
        mount = self.mount()
        if store:
            mount = Mount(source=str(self._manifest.models.store), target=STORE)
        elif volume is not None:
            mount = Mount(source=volume, target=mount.target, kind="volume")
        mount = Mount(source=mount.source, target=mount.target, kind=mount.kind, read_only=True)
        if not store and not self.exists():
            yield None
            return
        lease = self._lease()
        spec = ContainerSpec(
            image=self._image,
            name=f"warm-cache-read-{os.getpid()}-{os.urandom(4).hex()}",
            entrypoint=["/bin/true"],
            command=[],
            labels=lease.labels("read", READ_LIFETIME),
            mounts=(mount,),
            network="none",
            read_only=True,
            memory=MEMORY,
        )
        container: str | None = None
        try:
            # No signal between the creation and the assignment of its id.
            with self._cancel.shield(), _lease_kept_unless_confirmed(lease, unless=EngineRefusedError):
                container = self._cancel.call_with_deadline(lambda: self._create(spec), f"create {spec.name}")
            self._cancel.check()
            yield container
        finally:
            if container is not None:
                with self._cancel.shield(), _lease_kept_unless_confirmed(lease):
                    remove = functools.partial(self._engine.remove, container)
                    self._cancel.call_with_deadline(remove, f"remove {spec.name}", within=REMOVE_WITHIN)

    def _create(self, spec: ContainerSpec) -> str | None:
        """Return the container; None where the engine's host has no such directory."""
        try:
            return self._engine.create(spec)
        except MissingSourceError:
            return None

    def _fetch(self, container: str, names: Iterable[str], copy: Path, bounds: UnpackBudget) -> None:
        mount = PurePosixPath(self._manifest.cache.mount)
        for name in names:
            self._unpack(container, f"{mount}/{name}", copy / PurePosixPath(name).parent, bounds)
        self._warn(bounds)

    def _warn(self, bounds: UnpackBudget) -> None:
        for text in bounds.skipped:
            self._on_skip(f"{self.name}: {text}")

    def _fetch_model(self, container: str, model: str, copy: Path) -> None:
        import tempfile  # of no use where the root can be read

        base = model_store.repository(model)
        bounds = UnpackBudget(INDEX_FILE, INDEX_BYTES)
        self._unpack(container, f"{STORE}/{base}/refs", copy / base, bounds)
        for reference in (copy / base / "refs").glob("*") if (copy / base / "refs").is_dir() else ():
            commit = reference.read_text(errors="replace").strip()
            if not model_store.is_commit(commit):
                continue
            snapshot = model_store.snapshot(model, commit)
            target = self._engine.link_target(container, f"{STORE}/{snapshot}/config.json")
            if target is None:
                continue
            source = os.path.normpath(f"{STORE}/{snapshot}/{target}") if target else f"{STORE}/{snapshot}/config.json"
            with tempfile.TemporaryDirectory(dir=copy) as blob:
                self._unpack(container, source, Path(blob), bounds)
                for file in Path(blob).iterdir():
                    (copy / snapshot).mkdir(parents=True, exist_ok=True)
                    shutil.move(str(file), copy / snapshot / "config.json")

    def _unpack(self, container: str, source: str, target: Path, bounds: UnpackBudget) -> None:
        """Unpack `source` below `target`. Regular files and directories only, no link or device."""
        try:
            stream = self._engine.archive(container, source)
        except (NotFoundError, LinkLoopError):
            return
        from tarfile import TarError  # as `tempfile`

        try:
            # Closed on every exit: the engine cannot remove the container while an archive of it is open.
            with contextlib.closing(stream):
                unpack(stream, PurePosixPath(source).name, target, bounds)
        except TarError as error:
            raise EngineLostError(f"the engine's archive of {source} broke off or is none: {error}") from error


def _identity(root: Path) -> tuple[bytes, float] | None:
    """Return contents and time of a root's layout.json; None without one."""
    try:
        with Tree(root) as tree:
            return tree.read_bytes("layout.json", 1 << 16), tree.lstat("layout.json").st_mtime
    except (files.UnreadableError, OSError):
        return None


def _is_same(one: tuple[bytes, float] | None, other: tuple[bytes, float] | None) -> bool:
    """Return whether two files are the same: an archive may have whole seconds."""
    if one is None or other is None:
        return one is other
    return one[0] == other[0] and abs(one[1] - other[1]) <= 1.0


@contextlib.contextmanager
def _lease_kept_unless_confirmed(lease: Lease, *, unless: type[BuilderError] | tuple[()] = ()) -> Iterator[None]:
    """Keep the lease's file where a creation or removal was not confirmed: the next sweep then removes the container.

    unless: errors after which no container exists.
    """
    try:
        yield
    except EngineTimeoutError as error:
        lease.keep = True
        what = f"{error.message.rstrip('.')}. The next run, or a sweep, removes it"
        raise EngineTimeoutError(what, notes=error.notes) from None
    except BuilderError as error:
        lease.keep = lease.keep or not isinstance(error, unless)
        raise


def _is_closed(path: str) -> bool:
    """Return whether something exists there that this process may not read. A dangling link does not exist."""
    try:
        folder = stat.S_ISDIR(Path(path).stat().st_mode)
    except PermissionError:
        return True
    except OSError:
        return False
    return not os.access(path, os.R_OK | (os.X_OK if folder else 0))


def _claimed(copy: Path) -> set[str]:
    """Return family directories that any readable marker claims, as ``family/key``."""
    found = set()
    for each in marker_files.every(copy):
        for family, key in each.marker.keys.items() if each.marker else ():
            if family in families.FAMILY and key.isalnum():
                found.add(f"{family}/{key}")
    return found
