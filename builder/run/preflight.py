"""Problems that prevent this machine from running a manifest, all at once, each with its remedy."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from builder.cache import layout
from builder.cache.toolchain import Record
from builder.engine.client import Engine
from builder.engine.errors import GpuToolkitError, MissingSourceError, NoGpuDriverError, NoInitError, UnfitImageError
from builder.errors import CANNOT_RUN, EngineLostError, EngineRefusedError, EngineTimeoutError, PreflightError, Problem
from builder.host import gpus
from builder.host.gpus import GpuProcess, GpuSnapshot, HostGpus
from builder.manifest.load import Manifest
from builder.run import gpu_failures, image_checks
from builder.text import did_you_mean

#: Below this much free space not even one family's kernels fit (a DeepGEMM entry is about 75 kB, a serve task leaves
#: some GB).
MIN_FREE_BYTES = 512 << 20
_DIRECTORY = "Set [cache] root to a directory on a local file system."
_CREATE = "To make a new one there, pass --create."


def problems(manifest: Manifest, engine: Engine) -> Iterator[Problem]:
    """Yield every problem that is known without starting a container. The engine is connected."""
    ref = manifest.image.ref
    image = engine.image(ref)
    if image is None:
        text = f"{ref} is not on this engine."
        yield Problem("image", text, f"Run: docker pull {ref}, or: warm-cache warm --pull.")
    if engine.local:
        yield from _host(manifest, image is not None)
        if image is not None:
            yield from image_checks.user_problems(manifest, image, engine.info)


@contextlib.contextmanager
def engine_wanted(manifest: Manifest, url: str) -> Iterator[None]:
    """Raise PreflightError for an engine that cannot be used inside, with what else this machine lacks.

    One that got a request and does not answer stays an EngineTimeoutError.
    """
    try:
        yield
    except EngineTimeoutError:
        raise
    except EngineLostError as error:
        problems = [Problem("engine", f"{error.message}.".replace("..", "."))]
        if url.startswith("unix://") and manifest.tasks:
            problems += _host(manifest, False)
        raise PreflightError(CANNOT_RUN, problems) from error


def _host(manifest: Manifest, image: bool) -> Iterator[Problem]:
    """Yield the problems of this machine, on which the engine runs. image: whether the engine has the serving image."""
    yield from _gpus(manifest, image)
    yield from _cache(manifest)
    yield from _store(manifest)


def _gpus(manifest: Manifest, image: bool) -> Iterator[Problem]:
    """Yield problems that the host's driver shows; where it shows no GPU, a container of the image decides."""
    host = gpus.host_gpus()
    if manifest.gpus.count and not image and (host is None or not host.names):
        what = "no NVIDIA driver is loaded on this machine" if host is None else "the driver sees no GPU"
        yield Problem(
            "GPUs",
            f"{_wanted(manifest)} wanted, none found: {what}.",
            "Install the NVIDIA driver and nvidia-container-toolkit, then restart dockerd.",
        )
    yield from gpu_problems(manifest, host)


def gpu_problems(
    manifest: Manifest, host: HostGpus | None, record: Record | None = None, *, podman: bool = False
) -> Iterator[Problem]:
    """Yield problems of the GPUs: number and names. Every verb judges by this, each time.

    host: the GPUs that this machine's driver lists, None where it cannot be seen. record: what a probe's container was
    given, now or by its memo. podman: whether the engine is Podman.
    """
    if not manifest.gpus.count:
        return
    if host is not None and host.names:
        yield from _count_and_names(manifest, list(host.names))
    if host is not None and host.partitioned:
        named = " and ".join(f"GPU {index}" for index in host.partitioned)
        yield gpu_failures.partitioned(f"{named} in MIG mode")
    if record is None:
        return
    names = [str(gpu.get("name")) for gpu in record.get("gpus", ())]
    failures = list(gpu_failures.driver_failures(record["observed"].get("cuda_status")))
    if failures and not names:
        yield from failures
    elif podman and not names:
        text = f"{_wanted(manifest)} wanted, the container got none: Podman before 5.4 ignores the request."
        remedy = "Update Podman and make a CDI specification (nvidia-ctk cdi generate), or use a Docker Engine."
        yield Problem("GPUs", text, remedy)
    else:
        yield from _count_and_names(manifest, names)
        yield from gpu_failures.slices(names)


def _count_and_names(manifest: Manifest, names: list[str]) -> Iterator[Problem]:
    wanted = manifest.gpus
    if len(names) < wanted.count:
        yield Problem(
            "GPUs",
            f"{_wanted(manifest)} wanted, {len(names)} found"
            + (f" ({', '.join(sorted(set(names)))})." if names else "."),
            "Set [gpus] count, or run on a machine that has them.",
        )
    other = sorted({name for name in names if wanted.name and wanted.name not in name})
    if other:
        yield Problem(
            "GPUs",
            f"every GPU's name must contain {wanted.name!r}, found {', '.join(other)}.",
            "Set [gpus] name, or use the profile of this machine.",
        )


def busy(
    look: GpuSnapshot, containers: Callable[[], Mapping[str, str]], remedy: str = "Stop it, set [gpus] acquire, or"
) -> Iterator[Problem]:
    """Yield a problem for each GPU in use, by process where one is known.

    containers: returns names by id; only called if needed.
    """
    remedy = f"{remedy} pass --allow-busy."
    held: dict[GpuProcess, list[int]] = {}
    for gpu in look.gpus:
        for process in gpu.processes or ():
            held.setdefault(replace(process, memory=None), []).append(gpu.index)
    for process, indices in held.items():
        is_held = f"GPU {indices[0]} is" if len(indices) == 1 else f"GPUs {', '.join(map(str, indices))} are"
        yield Problem("GPUs", f"{is_held} held by {process.describe(containers())}.", remedy)
    for gpu in look.gpus:
        if not gpu.processes and gpu.used is not None and gpu.used > gpus.IDLE_BYTES:
            text = f"GPU {gpu.index} has {gpu.used / 1e9:.1f} GB in use by a process that cannot be seen from here."
            yield Problem("GPUs", text, remedy)


def _wanted(manifest: Manifest) -> str:
    return f"{manifest.gpus.count} × {manifest.gpus.name or 'GPU'}"


def no_driver(manifest: Manifest, error: EngineRefusedError) -> Problem | None:
    """Return the problem if the engine refused a container for its GPUs, else None."""
    if isinstance(error, NoGpuDriverError):
        text = f'{_wanted(manifest)} wanted, none found: the engine knows no "gpu" device driver.'
        return Problem("GPUs", text, "Install nvidia-container-toolkit and restart dockerd.")
    if isinstance(error, GpuToolkitError):
        return Problem("GPUs", f"{_wanted(manifest)} wanted, but the container toolkit failed: {error.message}.")
    return None


def no_init(error: EngineRefusedError) -> Problem | None:
    """Return the problem if Podman refused a container for its init, else None."""
    if not isinstance(error, NoInitError):
        return None
    text = "this engine is Podman, and the init that every container gets is missing on its host."
    return Problem("engine", text, "Run there: apt-get install catatonit (or: dnf install catatonit).")


def unfit_image(manifest: Manifest, error: EngineRefusedError) -> Problem | None:
    """Return the problem if no container can be started from the image as it is, else None."""
    if not isinstance(error, UnfitImageError):
        return None
    text = f"no container of {manifest.image.ref} can be started: {error.message.rstrip('.')}."
    return Problem("image", text, "See its USER, and what it has at the cache's mount path.")


def no_source(manifest: Manifest, error: EngineRefusedError) -> Problem | None:
    """Return the problem if the engine refused to mount a directory that its host lacks, else None."""
    for place, path in (("cache", manifest.cache.root), ("models", manifest.models.store)):
        if path is not None and isinstance(error, MissingSourceError) and Path(error.source).is_relative_to(path):
            return Problem(place, f"the engine's host has no {path}.", f"Run there: mkdir -p {path}")
    return None


def missing_root(manifest: Manifest, *, creates: bool) -> Problem:
    """Return the problem of a cache root that does not exist. creates: whether the verb would make one if asked to."""
    cache = manifest.cache
    root = cache.root
    if root is None:
        return Problem("cache", f"there is no volume {cache.volume}.", _CREATE if creates else "")
    if root.exists():
        return Problem("cache", f"{root} is not a directory.", _DIRECTORY)
    if creates and not root.parent.is_dir():
        return next(_cache(manifest))
    near = did_you_mean(root.name, _directories(root.parent))
    text = f"there is no cache at {root}" + (f"; {near}" if near.startswith("did you mean") else ".")
    return Problem("cache", text, _CREATE if creates else "")


def other_content(root: str, foreign: str) -> Problem:
    """Return the problem of a directory that holds something else than a cache. foreign: a name in it."""
    text = f"{root} is no cache root, and not empty ({foreign} is in it)."
    return Problem("cache", text, "Set [cache] root to an empty directory.")


def other_root(manifest: Manifest) -> Problem:
    """Return the problem of a root whose path is another directory for the engine."""
    return Problem(
        "cache",
        f"the engine has another directory at {manifest.cache.root} than this process: a file system was mounted there "
        "that only one of them sees.",
        "Restart the engine after that mount, or set [cache] root to a directory that both see.",
    )


def _directories(parent: Path) -> list[str]:
    try:
        return sorted(path.name for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []


def _cache(manifest: Manifest) -> Iterator[Problem]:
    root = manifest.cache.root
    if root is None:
        return
    if not root.exists():
        if not root.parent.is_dir():
            yield Problem(
                "cache",
                f"{root} does not exist, and neither does {root.parent}.",
                f"Run: mkdir -p {root}, or set [cache] root.",
            )
        elif not os.access(root.parent, os.W_OK):
            yield Problem(
                "cache", f"{root} does not exist, and {root.parent} is not writable.", f"Run: sudo mkdir {root}"
            )
        return
    if not root.is_dir():
        yield Problem("cache", f"{root} is not a directory.", _DIRECTORY)
        return
    if foreign := layout.foreign(root):
        yield other_content(str(root), foreign)
    free = shutil.disk_usage(root).free
    if free < MIN_FREE_BYTES:
        yield Problem(
            "disk",
            f"{root} has {free / 1e9:.1f} GB free, at least {MIN_FREE_BYTES / 1e9:.1f} GB are needed.",
            "Free space.",
        )


def _store(manifest: Manifest) -> Iterator[Problem]:
    store = manifest.models.store
    if store is None:
        return
    if not Path(store).is_dir():
        yield Problem(
            "models",
            f"the model store {store} does not exist.",
            "Set [models] store to the host's HF_HOME, or download the models there.",
        )
