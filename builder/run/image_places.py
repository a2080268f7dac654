"""Where layers of cache images come from and where they go: a cache root here, or one that an engine's containers have.

A root that this process can read is packed by it. Any other is packed by a container, and all but the one of `--here`
is written by a container: the request and the layers go into it before it starts, or come out of it before it is
removed, by way of the engine. So directories, volumes and other machines are one case, and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from builder import events
from builder.cache import memos, packing, restore, toolchain
from builder.cache.cache_image import MOST_BYTES
from builder.cache.layer_tar import ChangedError
from builder.cache.layout import LayoutError
from builder.cache.packing import OnLayer, Packed, PackRequest
from builder.cache.restore import RefusedImageError, RestoreBusyError, RestoreRequest, RestoreResult
from builder.cache.toolchain import Record
from builder.errors import CANNOT_RUN, BusyError, PreflightError, Problem, RegistryRefusedError
from builder.host import gpus, temporary
from builder.host.deadlines import Attempt, Deadline
from builder.host.gpus import HostGpus
from builder.job import Mode
from builder.run import local_job, maintenance, preflight
from builder.run.container_executor import ContainerExecutor
from builder.run.container_job import ContainerRequest
from builder.run.executor import PROBE_TIMEOUT, Executor
from builder.run.local_executor import LocalExecutor
from builder.run.plan import probe_env
from builder.run.unpacking import UnpackBudget, unpack
from builder.task import ServingImage
from builder.typed_json import from_object

T = TypeVar("T")

#: The directory in a container, and what is in it (`agent.cache_image` has the same names).
TRANSFER = "/warm-cache-transfer"
REQUEST, LAYERS = "request.json", "layers"
_CHUNK = 1 << 20
_ID = re.compile(r"sha256:[0-9a-f]{64}")


class ImagePlace(Protocol):
    """A cache root, and a way to pack it and to restore into it."""

    @property
    def executor(self) -> Executor:
        """The way to judge tasks by it."""

    @property
    def mount(self) -> str:
        """The root as its users see it."""

    def image(self) -> ServingImage:
        """Return every name of the image that tasks run in."""

    def records(self, memos_root: Path | None) -> list[Record]:
        """Return the toolchain records of the tasks' environments: by a memo of the root, or of another, or probed."""

    def reading(self, keys: Collection[tuple[str, str]] = ()) -> AbstractContextManager[Path]:
        """Yield a directory with the root's markers and memos, and the entries of these (family, key)."""

    def require_root(self) -> None:
        """Raise PreflightError where there is no cache root to pack."""

    def pack(self, out: Path, request: PackRequest, on_layer: OnLayer) -> Packed:
        """Write the layers into a directory named ``layers``. Raises PreflightError where the root changes."""

    def prepare(self) -> None:
        """Lay out the root, where it may be made. Raises PreflightError where it cannot be written."""

    def restore(self, blobs: Path, request: RestoreRequest, limit: Deadline, on_layer: OnLayer) -> RestoreResult:
        """Restore from a directory of layers. Raises RegistryRefusedError, BusyError and PreflightError."""


class LocalPlace:
    """The root of `--here`: this process writes to it itself."""

    def __init__(self, executor: LocalExecutor, image: str | None = None) -> None:
        """image: a reference or an id of the image that tasks run in, where it is known."""
        self.executor = executor
        self._named = (image or "").rpartition("@")[2]

    @property
    def mount(self) -> str:
        return str(self.executor.root)

    def image(self) -> ServingImage:
        return local_job.serving_image(self.executor.image)

    def records(self, memos_root: Path | None) -> list[Record]:
        # What restores may run in another image than the tasks, and see no GPU: then a memo alone can tell.
        if _ID.fullmatch(self._named):
            host = gpus.host_gpus()
            seen = host if host and host.names else None
            for root in (self.executor.root, memos_root) if memos_root else (self.executor.root,):
                found = _remembered(self.executor, root, ServingImage(self._named), self.mount, seen, toolchain.isa())
                if found is not None:
                    return found
        tasks, limit = self.executor.context.manifest.tasks, Deadline(PROBE_TIMEOUT)
        attempt = Attempt(lambda: list(self.executor.records(tasks).values()))
        while attempt.running and not limit.expired:
            attempt.join(0.05)
            self._check()
        return attempt.result()

    def reading(self, keys: Collection[tuple[str, str]] = ()) -> AbstractContextManager[Path]:
        return contextlib.nullcontext(self.executor.root)

    def require_root(self) -> None:
        if missing := self.executor.missing_root():
            raise PreflightError(f"there is no cache to pack: {missing}")

    def pack(self, out: Path, request: PackRequest, on_layer: OnLayer) -> Packed:
        return called(lambda: packing.pack(self.executor.root, out, request, self._check, on_layer))

    def restore(self, blobs: Path, request: RestoreRequest, limit: Deadline, on_layer: OnLayer) -> RestoreResult:
        def check() -> None:
            self._check()
            if limit.expired:
                raise late()

        return called(lambda: restore.restore(self.executor.root, blobs, request, check, on_layer))

    def prepare(self) -> None:
        self.executor.prepare()

    def _check(self) -> None:
        self.executor.context.cancel.check()


class ContainerPlace:
    """A root of an engine's containers."""

    def __init__(self, executor: ContainerExecutor) -> None:
        self.executor = executor

    @property
    def mount(self) -> str:
        return self.executor.context.manifest.cache.mount

    def image(self) -> ServingImage:
        return self.executor.serving_names

    def records(self, memos_root: Path | None) -> list[Record]:
        executor, tasks = self.executor, self.executor.context.manifest.tasks
        if memos_root is not None and not executor.remembers(tasks):
            host = gpus.host_gpus() if executor.engine.local else None
            isa = toolchain.isa() if executor.engine.local else None
            found = _remembered(executor, memos_root, executor.serving_names, self.mount, host, isa)
            if found is not None and not any(
                each for record in found for each in preflight.gpu_problems(executor.context.manifest, host, record)
            ):
                return found
        return list(executor.records(tasks).values())

    def reading(self, keys: Collection[tuple[str, str]] = ()) -> AbstractContextManager[Path]:
        return self.executor.cache.view(entries=bool(keys), keys=keys)

    def require_root(self) -> None:
        maintenance.require_root(self.executor)

    def pack(self, out: Path, request: PackRequest, on_layer: OnLayer) -> Packed:
        root, context = self.executor.direct_root(), self.executor.context
        if root is not None:
            return called(lambda: packing.pack(root, out, request, context.cancel.check, on_layer))
        engine = self.executor.engine

        def copy_out(container: str) -> None:
            bounds = UnpackBudget(MOST_BYTES, MOST_BYTES)
            unpack(engine.archive(container, f"{TRANSFER}/{LAYERS}"), LAYERS, out.parent, bounds)

        assert out.name == LAYERS, "the archive's folder has this name"
        document = self._run("pack", request, {}, Deadline(None), on_layer, after_exit=copy_out)
        return from_object(Packed, document, "what was packed")

    def prepare(self) -> None:
        self.executor.create_root()
        self.executor.start()

    def restore(self, blobs: Path, request: RestoreRequest, limit: Deadline, on_layer: OnLayer) -> RestoreResult:
        names = {f"{LAYERS}/{path.name}": path for path in sorted(blobs.iterdir())}
        document = self._run("restore", request, names, limit, on_layer)
        return from_object(RestoreResult, document, "what was restored")

    def _run(
        self,
        mode: Mode,
        request: PackRequest | RestoreRequest,
        layers: Mapping[str, Path],
        limit: Deadline,
        on_layer: OnLayer,
        after_exit: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Run a container in this mode, and return its result."""
        engine, results, name = self.executor.engine, [], ""

        def on_event(event: events.Event) -> None:
            nonlocal name
            match event:
                case events.Phase():
                    name = event.phase
                case events.Progress():
                    on_layer(name, event.done, event.total)
                case events.ImageResult():
                    results.append(event)

        document = json.dumps(asdict(request)).encode("ascii")
        before_start = functools.partial(_send, engine.upload, document, layers)
        wanted = ContainerRequest(transfer=TRANSFER, before_start=before_start, after_exit=after_exit)
        try:
            maintenance.run(self.executor, mode, on_event, wanted, timeout=min(limit.left(), maintenance.TIMEOUT))
        except PreflightError:
            if limit.expired:
                raise late() from None
            refused = next((each for each in results if each.refused), None)
            if refused is None:
                raise
            raise _failure(refused.refused, busy=refused.busy, refusal=mode == "restore") from None
        done = next((each for each in results if not each.refused), None)
        if done is None:
            raise PreflightError(f"{CANNOT_RUN}: the container that was to {mode} reported nothing")
        return dict(done.result)


def _remembered(
    executor: Executor, root: Path, image: ServingImage, mount: str, host: HostGpus | None, isa: str | None
) -> list[Record] | None:
    """Return the records of the tasks' environments by the memos of this directory; None where one is missing."""
    found = []
    for env in sorted({probe_env(task) for task in executor.context.manifest.tasks}) or [()]:
        record = memos.read_memo(
            root,
            image,
            mount=mount,
            gpus=host.model if host else None,
            driver=host.driver if host else None,
            isa=isa,
            env=dict(env),
        )
        if record is None:
            return None
        found.append(toolchain.of_task(record, dict(env)))
    return found


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a private directory with a folder for layers, removed with the context. Raises PreflightError."""
    with temporary.room("image") as made:
        (made / LAYERS).mkdir()
        yield made


def late() -> PreflightError:
    """Return the error for a restore that takes longer than it may."""
    return PreflightError("the restore took longer than it may, and was ended; what was restored so far is whole")


def _failure(why: str, *, busy: bool, refusal: bool) -> Exception:
    if busy:
        return BusyError(f"{why}; try again later")
    if refusal:
        return RegistryRefusedError(f"nothing was restored: {why}")
    return PreflightError(CANNOT_RUN, [Problem("cache", f"{why}.", "Try again when nothing works in the cache.")])


def called(call: Callable[[], T]) -> T:
    """Return what a call in this process returns, with its errors in this program's terms."""
    try:
        return call()
    except (RefusedImageError, RestoreBusyError) as error:
        raise _failure(str(error), busy=isinstance(error, RestoreBusyError), refusal=True) from None
    except ChangedError as error:
        raise _failure(str(error), busy=False, refusal=False) from None
    except (OSError, LayoutError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        problem = Problem("disk", f"{where}{why}.", "Free space there, or set TMPDIR to another directory.")
        raise PreflightError(CANNOT_RUN, [problem]) from error


def _send(
    upload: Callable[[str, str, Iterator[bytes]], None], document: bytes, layers: Mapping[str, Path], container: str
) -> None:
    upload(container, "/", _archive(document, layers))


def _archive(document: bytes, layers: Mapping[str, Path]) -> Iterator[bytes]:
    """Yield a tar of the directory in the container, never more than a piece of a layer at once."""
    folder = TRANSFER.strip("/")
    for name in ("", *([LAYERS] if layers else [])):
        info = tarfile.TarInfo(f"{folder}/{name}".rstrip("/"))
        info.type, info.mode = tarfile.DIRTYPE, 0o700
        yield info.tobuf(tarfile.GNU_FORMAT)
    yield from _file(f"{folder}/{REQUEST}", len(document), io.BytesIO(document))
    for name, path in layers.items():
        with path.open("rb") as file:
            yield from _file(f"{folder}/{name}", path.stat().st_size, file)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _file(name: str, length: int, source: Any) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = length, 0o600
    yield info.tobuf(tarfile.GNU_FORMAT)
    while data := source.read(_CHUNK):
        yield data
    if padding := -length % tarfile.BLOCKSIZE:
        yield bytes(padding)
