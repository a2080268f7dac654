"""What the builder asks of an engine, and what it gets back: plain values and Protocols, without docker-py.

`client.Engine` keeps these promises with docker-py; the tests' fake keeps them by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from builder.engine.gpu_request import device_requests

#: Streams of a container, by the numbers in the engine's frames.
STDOUT, STDERR = 1, 2

#: sglang pins memory for its GPUs, and CUDA's host compilers recurse deeply.
ULIMITS: Mapping[str, int] = {"memlock": -1, "stack": 67108864}

#: What is left of the engine's default capabilities: files of any owner are read, written and given their modes, as a
#: cache root or a model store of another user needs.
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER")

#: Processes and threads of a container that compiles, and of any other.
COMPILING_PIDS, PIDS = 32768, 512

#: Bytes of memory, swap included, of a container that does not compile.
MEMORY = 2 << 30

#: File systems in memory for a container whose root file system is read-only. Programs are run in them: a probe
#: compiles.
SCRATCH: Mapping[str, str] = {"/tmp": "rw,exec,nosuid,nodev,mode=1777,size=1g"}  # noqa: S108 - the container's own

#: One log file without rotation, because rotation makes every follower lose lines. The daemon's default may rotate.
LOG_OPTIONS: Mapping[str, str] = {"max-size": "1000g", "max-file": "1"}


@dataclass(frozen=True)
class Image:
    """An image that the engine has.

    id: ``sha256:…``.
    ref: the name or id it was looked up by.
    digests: ``repository@sha256:…``, one for each registry it came from.
    layers, env, user: of its file system, in their order; its variables and USER, as its config has them.
    """

    id: str
    ref: str
    digests: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    layers: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""

    def has_digest(self, digest: str) -> bool:
        """Return whether a registry has this image under this digest."""
        return any(known.rpartition("@")[2] == digest for known in self.digests)


@dataclass(frozen=True)
class ListedImage:
    """An image in the engine's listing."""

    id: str
    tags: tuple[str, ...]
    bytes: int
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        return ", ".join(self.tags) or self.id[:19]


@dataclass(frozen=True)
class Mount:
    """A mount of a container.

    kind: ``bind``: source is a path on the engine's host that exists; ``volume``: source is a volume's name.
    """

    source: str
    target: str
    kind: Literal["bind", "volume"] = "bind"
    read_only: bool = False

    def body(self) -> dict[str, Any]:
        """Return the long form, for binds: the engine then refuses a missing source."""
        return {"Type": self.kind, "Source": self.source, "Target": self.target, "ReadOnly": self.read_only}

    def short(self) -> str:
        """Return the short form, for volumes.

        ``nocopy`` keeps an engine from filling an empty volume with the image's files at that path, which would be a
        cache of another machine. Podman supports it in this form only.
        """
        return f"{self.source}:{self.target}:nocopy{',ro' if self.read_only else ''}"


@dataclass(frozen=True, kw_only=True)
class ContainerSpec:
    """A container to create, with the power that docker/README.md states (Least power). Sizes in bytes.

    gpus: how many, -1 for all, or their ids; 0: none.
    stdin: open it; the engine closes it for good when its one client disconnects.
    stop_timeout: seconds.
    memory: limit of all processes together; None: no limit.
    tmpfs: path → mount options.
    read_only: its root file system.
    capabilities: what it keeps; all others are dropped, and none can be gained.
    pids: limit of its processes and threads together.
    cpus: the processors it may use (``0-3,8``); "": all. cpu_shares: its weight beside other containers, of 1024 by
    default; None: the engine's.
    """

    image: str
    name: str
    command: Sequence[str] = ()
    entrypoint: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    gpus: int | tuple[str, ...] = 0
    shm_size: int | None = None
    network: str = "bridge"
    ulimits: Mapping[str, int] = field(default_factory=lambda: ULIMITS)
    tmpfs: Mapping[str, str] = field(default_factory=dict)
    stop_timeout: int = 10
    workdir: str = ""
    stdin: bool = False
    memory: int | None = None
    read_only: bool = False
    capabilities: tuple[str, ...] = CAPABILITIES
    pids: int = PIDS
    cpus: str = ""
    cpu_shares: int | None = None

    def body(self, *, cdi: bool = False) -> dict[str, Any]:
        """Return the create request. Everything else is the default: not privileged, not auto-removed.

        cdi: ask for GPUs as CDI devices.
        """
        host: dict[str, Any] = {
            "Init": True,
            "IpcMode": "private",
            "NetworkMode": self.network,
            "Mounts": [mount.body() for mount in self.mounts if mount.kind == "bind"],
            "Binds": [mount.short() for mount in self.mounts if mount.kind == "volume"],
            "Tmpfs": dict(self.tmpfs),
            "Ulimits": [{"Name": name, "Soft": value, "Hard": value} for name, value in self.ulimits.items()],
            "LogConfig": {"Type": "json-file", "Config": dict(LOG_OPTIONS)},
            "CapDrop": ["ALL"],
            "CapAdd": list(self.capabilities),
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": self.read_only,
            "PidsLimit": self.pids,
        }
        if self.gpus:
            host["DeviceRequests"] = device_requests(self.gpus, cdi=cdi)
        if self.shm_size is not None:
            host["ShmSize"] = self.shm_size
        if self.memory is not None:
            host |= {"Memory": self.memory, "MemorySwap": self.memory}
        if self.cpus:
            host["CpusetCpus"] = self.cpus
        if self.cpu_shares is not None:
            host["CpuShares"] = self.cpu_shares
        body: dict[str, Any] = {
            "Image": self.image,
            "Env": [f"{name}={value}" for name, value in self.env.items()],
            "Labels": dict(self.labels),
            "StopTimeout": self.stop_timeout,
            "AttachStdout": True,
            "AttachStderr": True,
            "AttachStdin": self.stdin,
            "OpenStdin": self.stdin,
            # The engine then closes stdin for good when its one client disconnects or dies.
            "StdinOnce": self.stdin,
            "HostConfig": host,
        }
        optional = {"Cmd": list(self.command), "Entrypoint": list(self.entrypoint), "WorkingDir": self.workdir}
        return body | {name: value for name, value in optional.items() if value}


@dataclass(frozen=True)
class State:
    """A container's state by inspect.

    status: created, running, paused, restarting, removing, exited or dead.
    exit_code: only meaningful once the container is finished.
    oom_killed: also true if only a child was killed; None if the engine does not know.
    """

    status: str
    exit_code: int
    oom_killed: bool | None = False

    @property
    def finished(self) -> bool:
        """Whether the container ran and none of its processes runs any more."""
        return self.status in ("exited", "dead")


@dataclass(frozen=True)
class ListedContainer:
    """A container in the engine's listing."""

    id: str
    name: str
    status: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Volume:
    """A named volume.

    mountpoint: the path of its files on the engine's host; with options (a device, a network file system) valid only
    while a container uses it.
    """

    name: str
    driver: str
    mountpoint: str
    options: Mapping[str, str]
    labels: Mapping[str, str]


class Attachment(Protocol):
    """A connection to a container's streams that no other reader shares."""

    def readinto(self, buffer: memoryview) -> int:
        """Wait for bytes; return 0 at the end. Raises OSError if the connection breaks."""

    def close(self) -> None:
        """End the connection, also for a reader that waits in another thread. May be called twice."""


class Containers(Protocol):
    """The part of an engine that a container's life needs. Everything raises EngineLostError or EngineRefusedError."""

    @property
    def identity(self) -> str:
        """What distinguishes this engine from others."""

    def create(self, spec: ContainerSpec) -> str: ...

    def start(self, container: str) -> None: ...

    def state(self, container: str) -> State:
        """Raise NotFoundError if there is no such container."""

    def stop(self, container: str, grace: float) -> None:
        """Send SIGTERM and `grace` seconds later SIGKILL; return when the container is finished.

        Does nothing to a container that does not run.
        """

    def remove(self, container: str, *, force: bool = False) -> None:
        """Remove a container; a missing one counts as removed. force: kill it first."""

    def attach_output(self, container: str) -> Attachment:
        """Return stdout and stderr from now on, as frames. Complete if attached before the start."""

    def attach_stdin(self, container: str) -> Attachment:
        """Return the container's stdin: it gets end-of-file when this is closed or this process dies."""

    def log_frames(self, container: str, *, follow: bool, tail: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield the stored log as (stream, entry): a line with or without its newline, or 16 KiB of a longer line."""

    def containers(self, labels: Sequence[str]) -> list[ListedContainer]:
        """Return the containers, in every state, that have all these labels (``name`` or ``name=value``)."""
