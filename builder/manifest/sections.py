"""The sections of a manifest other than its tasks: what they hold, and how they are read."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from builder.errors import Problem
from builder.manifest.document import Document, Table
from builder.manifest.values import (
    a_boolean,
    a_string,
    a_variable,
    count,
    list_of,
    matching,
    one_of,
    positive,
    positive_seconds,
    seconds,
    size,
)
from builder.task import GPUS

T = TypeVar("T")
D = TypeVar("D")  # of a value that may be None

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
#: Never the cache's mount point: the image keeps files below these (kernels.lock, Hugging Face kernels).
OCCUPIED = ("/", "/root", "/root/.cache")
VOLUME = "volume:"

_MOUNT = re.compile(r"/[A-Za-z0-9._/-]*")
#: Characters of a wrong value that its message repeats.
_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """ref: the serving image, any reference the engine knows. setup: command lines of the warm-up image's build."""

    ref: str
    setup: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Either root (an absolute host directory) or volume (a named volume). job_max: seconds a test job may last.

    What `prune` and `refresh` leave: keep, so many toolchains of each task; older_than, seconds without use after which
    the rest goes (None: it never does); max_size, bytes that the root may have (None: no limit).
    """

    root: Path | None = None
    volume: str | None = None
    mount: str = "/jit"
    job_max: float = 6 * 3600.0
    keep: int = 2
    older_than: float | None = None
    max_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class RefreshSpec:
    """metrics: a file for Prometheus' textfile collector, absolute. when_idle: seconds to wait for idle GPUs."""

    metrics: Path | None = None
    when_idle: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelsSpec:
    """store: the host's HF_HOME, absolute, or None."""

    store: Path | None = None
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class ContainerSpecs:
    """shm_size and log_limit in bytes. secrets: NAMES of environment variables, passed on where they are set."""

    network: str = "bridge"
    shm_size: int = 32 << 30
    secrets: tuple[str, ...] = SECRETS
    log_limit: int = 2 << 30


@dataclass(frozen=True, kw_only=True)
class GpusSpec:
    """count: 0 = no device request. pretend: a GPU that kernels are compiled for without one (experimental). devices:
    GPU indices of a shared machine. acquire, release: command lines.

    In seconds: release_timeout: until the GPUs of a task that ended are free again. hook_timeout: for one command line.
    """

    count: int = 8
    name: str | None = None
    pretend: str | None = None
    devices: tuple[int, ...] | None = None
    acquire: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    release_timeout: float = 60.0
    hook_timeout: float = 60.0


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """All in seconds. budget: for the whole run, None = unlimited. lock_timeout: how long to wait for another builder.

    start: until a container says its first word. grace: between a stop's SIGTERM and its SIGKILL. lifetime: after
    which whatever this run left somewhere ends by itself. parallel, a number: tasks without GPUs side by side.
    """

    budget: float | None = None
    lock_timeout: float = 60.0
    start: float = 120.0
    grace: float = 8.0
    lifetime: float = 7200.0
    parallel: int = 1


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What the command line or the environment says instead of the manifest. cache: a directory, or ``volume:NAME``."""

    image: str | None = None
    cache: str | None = None
    models: str | None = None
    network: str | None = None
    budget: str | float | None = None
    timeout: str | float | None = None
    silence: str | float | None = None
    start: str | float | None = None
    grace: str | float | None = None
    lock_timeout: str | float | None = None


@dataclass(frozen=True)
class Given:
    """The overrides, read like the manifest's own values; a problem's place is the option."""

    document: Document
    overrides: Overrides

    def read(self, option: str, convert: Callable[[Any], T]) -> T | None:
        value = getattr(self.overrides, option)
        if value is None:
            return None
        try:
            return convert(value)
        except ValueError as error:
            self.document.problems.append(Problem(f"--{option.replace('_', '-')}", f"{error}."))
            return None

    def over(self, option: str, convert: Callable[[Any], T], value: D) -> T | D:
        """What the option says, else the manifest's value."""
        given = self.read(option, convert)
        return value if given is None else given


def read_image(table: Table, given: Given) -> ImageSpec:
    ref = table.read("ref", _reference, "")
    setup = table.read("setup", list_of(a_string, "command lines"), ())
    table.finish()
    image = given.over("image", _reference, ref)
    if not image and not table.has("ref") and given.overrides.image is None:
        table.blame(None, "there is no image:", 'set ref = "lmsysorg/sglang:TAG" in [image], or pass --image.')
    return ImageSpec(ref=image, setup=setup)


def read_cache(table: Table, given: Given) -> CacheSpec:
    root = table.read("root", lambda value: _own_directory(_host_directory(value)), None)
    volume = table.read("volume", _volume_name, None)
    mount = table.read("mount", _mount_point, "/jit")
    job_max = table.read("job_max", seconds, 6 * 3600.0)
    keep = table.read("keep", positive, 2)
    older_than = table.read("older_than", positive_seconds, None)
    max_size = table.read("max_size", size, None)
    table.finish()
    if table.has("root") and table.has("volume"):
        table.blame("volume", "[cache] has both root and volume:", "keep one of them.")
    place = given.read("cache", _cache_place)
    if place is not None:
        root, volume = place
    elif not (table.has("root") or table.has("volume") or given.overrides.cache is not None):
        table.blame(
            None, "there is no cache:", "set root or volume in [cache], or pass --cache DIR or --cache volume:NAME."
        )
    return CacheSpec(
        root=root,
        volume=volume,
        mount=mount,
        job_max=job_max,
        keep=keep,
        older_than=older_than,
        max_size=max_size,
    )


def read_refresh(table: Table) -> RefreshSpec:
    spec = RefreshSpec(
        metrics=table.read("metrics", _host_directory, None),
        when_idle=table.read("when_idle", seconds, None),
    )
    table.finish()
    return spec


def read_models(table: Table, given: Given) -> ModelsSpec:
    store = table.read("store", _host_directory, None)
    writable = table.read("writable", a_boolean, False)
    table.finish()
    return ModelsSpec(store=given.over("models", _directory_option, store), writable=writable)


def read_container(table: Table, given: Given) -> ContainerSpecs:
    network = table.read("network", _network, "bridge")
    specs = ContainerSpecs(
        network=given.over("network", _network, network),
        shm_size=table.read("shm_size", size, 32 << 30),
        secrets=table.read("secrets", list_of(a_variable, "names"), SECRETS),
        log_limit=table.read("log_limit", size, 2 << 30),
    )
    table.finish()
    return specs


def read_gpus(table: Table) -> GpusSpec:
    pretended = table.read("pretend", one_of(GPUS, "GPU to pretend"), None)
    specs = GpusSpec(
        count=table.read("count", count, 8 if pretended is None else 0),
        pretend=pretended,
        name=table.read("name", a_string, None),
        devices=table.read("devices", _devices, None),
        acquire=table.read("acquire", list_of(a_string, "command lines"), ()),
        release=table.read("release", list_of(a_string, "command lines"), ()),
        release_timeout=table.read("release_timeout", seconds, 60.0),
        hook_timeout=table.read("hook_timeout", positive_seconds, 60.0),
    )
    table.finish()
    if specs.pretend is not None and (specs.count or specs.devices):
        table.blame("pretend", "pretend is for a machine without GPUs, or whose GPUs stay free:", "set count = 0.")
    if specs.devices is not None and specs.count != len(specs.devices):
        if not table.has("count"):
            return replace(specs, count=len(specs.devices))
        table.blame("devices", f"devices names {len(specs.devices)} GPUs, and count says {specs.count}.")
    return specs


def read_run(table: Table, given: Given) -> RunSpec:
    default = RunSpec()
    budget = table.read("budget", positive_seconds, None)
    spec = RunSpec(
        budget=given.over("budget", positive_seconds, budget),
        lock_timeout=given.over("lock_timeout", seconds, table.read("lock_timeout", seconds, default.lock_timeout)),
        start=given.over("start", positive_seconds, table.read("start", positive_seconds, default.start)),
        grace=given.over("grace", seconds, table.read("grace", seconds, default.grace)),
        lifetime=table.read("lifetime", positive_seconds, default.lifetime),
        parallel=table.read("parallel", positive, default.parallel),
    )
    table.finish()
    return spec


_reference = matching(re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*"), "an image reference")
_network = matching(re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*"), "a network's name")
_volume_name = matching(re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+"), "a volume's name")


def _host_directory(value: Any) -> Path:
    text = a_string(value)
    if not text.startswith("/"):
        raise ValueError(f"an absolute path is wanted, found {text!r}")
    return Path(posixpath.normpath(text))


def _directory_option(value: Any) -> Path:
    """On the command line, a path may be relative to where the command runs."""
    text = a_string(value)
    try:
        return Path(os.path.abspath(text))
    except OSError as error:
        raise ValueError(f"{text!r} is relative to a directory that is gone ({error.strerror})") from None


def _own_directory(path: Path) -> Path:
    if path == path.parent:
        raise ValueError(f"a directory of its own is wanted, found {str(path)!r}")
    return path


def _cache_place(value: Any) -> tuple[Path | None, str | None]:
    text = a_string(value)
    if text.startswith(VOLUME):
        return None, _volume_name(text.removeprefix(VOLUME))
    return _own_directory(_directory_option(text)), None


def _mount_point(value: Any) -> str:
    text = a_string(value)
    if not _MOUNT.fullmatch(text) or posixpath.normpath(text) != (text.rstrip("/") or "/"):
        raise ValueError(f"an absolute path of letters, digits, '.', '_' and '-' is wanted, found {text!r}")
    path = posixpath.normpath(text)
    if path in OCCUPIED:
        raise ValueError(
            f"the image has files of its own in {path}, which the mount would hide; a fresh path is wanted, e.g. /jit"
        )
    return path


def _devices(value: Any) -> tuple[int, ...]:
    """``"4-7"``, ``"0,2,5"``, or a list of indices."""
    if isinstance(value, list):
        found = list(list_of(count, "GPU indices")(value))
        repeated = len(set(found)) != len(found)
    else:
        found, repeated = [], False
        for part in a_string(value).split(","):
            span = re.fullmatch(r"\s*(\d{1,3})(?:-(\d{1,3}))?\s*", part, re.ASCII)
            if not span or int(span[2] or span[1]) < int(span[1]):
                raise ValueError(f'GPU indices such as "4-7" or "0,2" are wanted, found {_short(value)}')
            found += range(int(span[1]), int(span[2] or span[1]) + 1)
            # At the first repetition: the rest of a long text may name a thousand more with every few letters.
            if repeated := len(set(found)) != len(found):
                break
    if not found or repeated:
        raise ValueError(f"every GPU once, and at least one, is wanted, found {_short(value)}")
    return tuple(found)


def _short(value: object) -> str:
    """For a message: the value, or the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"
