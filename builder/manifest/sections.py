"""The sections of a manifest other than its tasks: their keys, and the checks between keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from builder import files
from builder.manifest.document import Table
from builder.manifest.fields import OverrideReader, key, read
from builder.manifest.section_values import (
    cache_option,
    cache_root,
    command_lines,
    directory,
    directory_option,
    gpu_indices,
    mount_point,
    network_name,
    reference,
    setup_lines,
    volume_name,
    when_enabled,
)
from builder.manifest.values import (
    a_boolean,
    a_string,
    a_variable,
    count,
    list_of,
    one_of,
    positive,
    positive_seconds,
    seconds,
    size,
)
from builder.task import GPUS

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """The serving image, and changes to it for the warm-up image."""

    ref: str = key(
        reference,
        "",
        "The serving image: any reference that the engine knows. Required here or as the option.",
        '"lmsysorg/sglang:v0.5.23"',
        option="image",
    )
    setup: tuple[str, ...] = key(
        setup_lines,
        (),
        "Command lines run when the warm-up image is built, so that it equals the image that the tests run in.",
        '["pip install --no-deps ./sglang"]',
    )


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Where the compiled kernels are kept, and how much of them `prune` and `refresh` leave."""

    root: Path | None = key(
        cache_root,
        None,
        "Host directory of the cache, on a local file system. One of `root`, `volume` and the option is required.",
        '"/data/sglang-jit"',
        option="cache",
        shared_option=True,
    )
    volume: str | None = key(
        volume_name,
        None,
        "Named volume of the engine that holds the cache, instead of `root`.",
        '"sglang-jit"',
        option="cache",
        shared_option=True,
    )
    mount: str = key(
        mount_point,
        "/jit",
        "Path of the cache in every container. Use the same path everywhere: Triton's files contain absolute paths.",
        '"/jit"',
    )
    job_max: float = key(
        seconds,
        6 * 3600.0,
        "The longest time a test job may take. What was used more recently than that is not removed.",
        '"6h"',
    )
    keep: int = key(
        positive,
        2,
        "How many toolchains of each task, and images of each toolchain, `prune` and `refresh` keep.",
        "3",
    )
    older_than: float | None = key(
        positive_seconds,
        None,
        "Time without use after which `prune` and `refresh` remove what `keep` does not hold; not set: never.",
        '"14d"',
    )
    pins: tuple[str, ...] = key(
        list_of(a_string, "images or manifests"),
        (),
        "Images of other branches that use this root, or manifests that name them (`.toml`, `.json`; absolute paths): "
        "what their tasks need is never removed by `prune` and `refresh`.",
        '["lmsysorg/sglang:v0.5.22", "/etc/warm-cache/release.toml"]',
    )
    max_size: int | None = key(
        size, None, "Size in bytes below which `prune` and `refresh` keep the cache; not set: no limit.", '"200g"'
    )
    view_max: int = key(
        size,
        50 << 30,
        "Size in bytes of what a job wrote in its view above which `view list` and `view audit` warn. Nothing stops "
        "the job: put the cache on a disk of its own, or a quota on the directory `views`.",
        '"50g"',
    )


@dataclass(frozen=True, kw_only=True)
class ModelsSpec:
    """Where the checkpoints are."""

    store: Path | None = key(
        directory,
        None,
        "Host directory of the model store, mounted as HF_HOME; not set: none is mounted.",
        '"/data/huggingface"',
        option="models",
        option_kind=directory_option,
    )
    writable: bool = key(a_boolean, False, "Mount the store writable, so that missing models are downloaded.", "true")


@dataclass(frozen=True, kw_only=True)
class ContainerSpecs:
    """What a warm-up container gets from the engine."""

    network: str = key(network_name, "bridge", "Network of the engine that the container joins.", '"host"')
    shm_size: int = key(size, 32 << 30, "Size in bytes of the container's own /dev/shm.", '"32g"')
    secrets: tuple[str, ...] = key(
        list_of(a_variable, "names of variables"),
        SECRETS,
        "NAMES of environment variables that are passed on where the builder's environment sets them.",
        '["HF_TOKEN"]',
    )
    log_limit: int = key(
        size, 2 << 30, "Size in bytes of a task's log at which it ends, and the task fails.", '"512MiB"'
    )


@dataclass(frozen=True, kw_only=True)
class GpusSpec:
    """The GPUs that tasks run on, and the commands that take this machine out of service for it."""

    count: int = key(
        count,
        8,
        "How many GPUs the machine gives; 0: no GPU is requested.",
        "4",
        default_text="8; the number of `devices`; 0 with `pretend`",
    )
    name: str | None = key(a_string, None, "A part of every GPU's name; other GPUs are an error.", '"H200"')
    pretend: str | None = key(
        one_of(GPUS, "GPU to pretend", guess=False),
        None,
        "Compile for this GPU on a machine without one, for `shapes` tasks (experimental). Needs `count = 0`.",
        '"H200"',
    )
    devices: tuple[int, ...] | None = key(
        gpu_indices, None, "Indices of the GPUs to use on a shared machine; not set: all.", '"4-7"'
    )
    acquire: tuple[str, ...] = key(
        command_lines,
        (),
        "Command lines (`/bin/sh`) run before the first cold task, to take this machine out of service.",
        '["drain-runner"]',
    )
    release: tuple[str, ...] = key(
        command_lines, (), "Command lines run once after `acquire`, however the run ends.", '["undrain-runner"]'
    )
    release_timeout: float = key(
        seconds, 60.0, "How long the GPUs of a task that ended may take until they are free again.", '"90s"'
    )
    hook_timeout: float = key(positive_seconds, 60.0, "How long one command line may take.", '"5m"')


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Deadlines of a run, and how many tasks run at the same time."""

    budget: float | None = key(
        positive_seconds,
        None,
        "Time for the whole run; tasks that do not fit are skipped. Not set: no limit.",
        '"55m"',
        option="budget",
    )
    lock_timeout: float = key(
        seconds,
        60.0,
        "How long to wait for other builders on this cache or these GPUs.",
        '"10m"',
        option="lock_timeout",
    )
    start: float = key(positive_seconds, 120.0, "Time a container may take until its first output.", '"3m"')
    grace: float = key(seconds, 8.0, "Time between SIGTERM and SIGKILL when a container is stopped.", '"15s"')
    lifetime: float = key(
        positive_seconds,
        7200.0,
        "Age at which a container ends by itself, even when its builder was killed.",
        '"4h"',
        default_text="2 hours, or 10 minutes more than the run can take",
    )
    parallel: int = key(positive, 1, "How many tasks without GPUs run at the same time.", "3")


@dataclass(frozen=True, kw_only=True)
class RefreshSpec:
    """The nightly `refresh`. Both keys have an option of `refresh` that replaces them."""

    metrics: Path | None = key(
        directory,
        None,
        "File written for the textfile collector of Prometheus' node exporter; not set: none is written.",
        '"/var/lib/node_exporter/warm-cache.prom"',
    )
    when_idle: float | None = key(
        seconds, None, "How long to wait until the GPUs are idle; not set: start at once.", '"30m"'
    )


@dataclass(frozen=True, kw_only=True)
class PrebuildSpec:
    """The first stage of a run: DeepGEMM's kernels compiled on all CPU cores, before any task uses a GPU."""

    enabled: bool | str = key(
        when_enabled,
        "proven",
        "Whether `warm` and `refresh` prebuild; `proven`: where a hardware proof of this GPU is recorded.",
        "true",
    )
    when: str = key(
        one_of(("idle", "always"), "time to prebuild"),
        "idle",
        "Whether it runs while other processes use a GPU. `always`: then with half the cores, and the least weight.",
        '"always"',
    )
    workers: int | None = key(
        positive, None, "How many kernels are compiled at the same time; not set: one on each core.", "32"
    )
    memory: int | None = key(
        size, None, "Size in bytes that all workers together may take; not set: what is free.", '"64g"'
    )


def read_image(table: Table, overrides: OverrideReader) -> ImageSpec:
    image = read(ImageSpec(), table, overrides)
    if not (table.has("ref") or overrides.given("image")):
        table.add_problem(None, "there is no image:", 'set ref = "lmsysorg/sglang:TAG" in [image], or pass --image.')
    return image


def read_cache(table: Table, overrides: OverrideReader) -> CacheSpec:
    cache = read(CacheSpec(), table, overrides)
    if table.has("root") and table.has("volume"):
        table.add_problem("volume", "[cache] has both root and volume:", "keep one of them.")
    location = overrides.read("cache", cache_option)
    if location is not None:
        return replace(cache, root=location[0], volume=location[1])
    if not (table.has("root") or table.has("volume") or overrides.given("cache")):
        if not overrides.needs_cache:
            return replace(cache, root=Path(files.temporary_directory()))
        table.add_problem(
            None, "there is no cache:", "set root or volume in [cache], or pass --cache DIR or --cache volume:NAME."
        )
    return cache


def read_gpus(table: Table, overrides: OverrideReader) -> GpusSpec:
    base = GpusSpec(count=0) if table.has("pretend") else GpusSpec()
    gpus = read(base, table, overrides)
    if gpus.devices is not None and not table.has("count"):
        gpus = replace(gpus, count=len(gpus.devices))
    if gpus.pretend is not None and (gpus.count or gpus.devices):
        table.add_problem("pretend", "pretend compiles without GPUs:", "set count = 0.")
    if gpus.devices is not None and gpus.count != len(gpus.devices):
        table.add_problem("devices", f"devices names {len(gpus.devices)} GPUs, and count is {gpus.count}.")
    return gpus
