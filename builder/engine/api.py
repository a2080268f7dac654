"""What the builder asks of an engine, and what it is told: plain values and Protocols, without the library that does
it.

`engine.Engine` keeps these promises with docker-py; a test's fake keeps them by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

#: Streams of a container, as the engine numbers them in its frames.
STDOUT, STDERR = 1, 2

#: sglang pins memory for its GPUs, and CUDA's host compilers recurse deeply.
ULIMITS: Mapping[str, int] = {"memlock": -1, "stack": 67108864}

#: Processes and threads of a confined container.
CONFINED_PIDS = 512

#: One file that is never rotated: rotation makes every follower lose lines, and a bare json-file inherits the daemon's.
LOG_OPTIONS: Mapping[str, str] = {"max-size": "1000g", "max-file": "1"}

#: Podman shows steps of its own between the engine's states.
PODMANS_STATES: Mapping[str, str] = {
    "configured": "created",
    "initialized": "created",
    "stopping": "running",
    "stopped": "exited",
}


@dataclass(frozen=True)
class Image:
    """An image the engine has. id: ``sha256:…``; ref: what it was asked for as; size in bytes."""

    id: str
    ref: str
    digests: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    size: int = 0


@dataclass(frozen=True)
class Mount:
    """kind ``bind``: source is a path on the engine's host that exists. kind ``volume``: source is a volume's name."""

    source: str
    target: str
    kind: Literal["bind", "volume"] = "bind"
    read_only: bool = False

    def body(self) -> dict[str, Any]:
        """A bind as the engine wants it: one whose source is missing is refused."""
        return {"Type": self.kind, "Source": self.source, "Target": self.target, "ReadOnly": self.read_only}

    def short(self) -> str:
        """A volume as the engine wants it. An empty one would be filled with what the image has at that path, somebody
        else's cache; Podman heeds that in this form alone.
        """
        return f"{self.source}:{self.target}:nocopy{',ro' if self.read_only else ''}"


@dataclass(frozen=True, kw_only=True)
class ContainerSpec:
    """A container to create. Sizes in bytes, durations in seconds.

    gpus: a number of them, -1 for all, or their ids; 0 asks for none. stdin: opened, and closed for good when the one
    who attached to it goes away. memory: a limit for all processes together; None is none. confined: no capabilities,
    none to be gained, a root file system that cannot be written, and at most `CONFINED_PIDS` processes and threads.
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
    confined: bool = False

    def body(self) -> dict[str, Any]:
        """The request that creates it. The rest is the default: never privileged, never auto-removed."""
        host: dict[str, Any] = {
            "Init": True,
            "IpcMode": "private",
            "NetworkMode": self.network,
            "Mounts": [mount.body() for mount in self.mounts if mount.kind == "bind"],
            "Binds": [mount.short() for mount in self.mounts if mount.kind == "volume"],
            "Tmpfs": dict(self.tmpfs),
            "Ulimits": [{"Name": name, "Soft": value, "Hard": value} for name, value in self.ulimits.items()],
            "LogConfig": {"Type": "json-file", "Config": dict(LOG_OPTIONS)},
        }
        if self.gpus:
            wanted = {"Count": self.gpus} if isinstance(self.gpus, int) else {"DeviceIDs": list(self.gpus)}
            host["DeviceRequests"] = [{"Driver": "", "Capabilities": [["gpu"]], **wanted}]
        if self.shm_size is not None:
            host["ShmSize"] = self.shm_size
        if self.memory is not None:
            host |= {"Memory": self.memory, "MemorySwap": self.memory}
        if self.confined:
            host |= {"CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"], "ReadonlyRootfs": True}
            host["PidsLimit"] = CONFINED_PIDS
        body: dict[str, Any] = {
            "Image": self.image,
            "Env": [f"{name}={value}" for name, value in self.env.items()],
            "Labels": dict(self.labels),
            "StopTimeout": self.stop_timeout,
            "AttachStdout": True,
            "AttachStderr": True,
            "AttachStdin": self.stdin,
            "OpenStdin": self.stdin,
            # What makes the engine close it for good when its one client goes, however that goes.
            "StdinOnce": self.stdin,
            "HostConfig": host,
        }
        optional = {"Cmd": list(self.command), "Entrypoint": list(self.entrypoint), "WorkingDir": self.workdir}
        return body | {name: value for name, value in optional.items() if value}


@dataclass(frozen=True)
class State:
    """What inspect says. status: created, running, paused, restarting, removing, exited or dead. exit_code only means
    something once the container is over; oom_killed is true as well when only a child was killed, and None where the
    engine does not know.
    """

    status: str
    exit_code: int
    oom_killed: bool | None = False
    error: str = ""
    pid: int = 0

    @classmethod
    def told(cls, data: Mapping[str, Any], *, knows_memory: bool = True) -> State:
        """What this ``State`` of inspect says. knows_memory: whether its no to ``OOMKilled`` means anything."""
        return cls(
            status=PODMANS_STATES.get(data["Status"], data["Status"]),
            exit_code=data.get("ExitCode") or 0,
            oom_killed=bool(data.get("OOMKilled")) or (False if knows_memory else None),
            error=data.get("Error") or "",
            pid=data.get("Pid") or 0,
        )

    @property
    def finished(self) -> bool:
        """It ran, and nothing of it runs any more."""
        return self.status in ("exited", "dead")


@dataclass(frozen=True)
class Found:
    """A container in a listing."""

    id: str
    name: str
    status: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Volume:
    """A named volume. mountpoint: where its files lie on the engine's host; with options (a device, a network file
    system) only while a container has it.
    """

    name: str
    driver: str
    mountpoint: str
    options: Mapping[str, str]
    labels: Mapping[str, str]


class Attachment(Protocol):
    """A connection to a container's streams, all its own."""

    def readinto(self, buffer: memoryview) -> int:
        """Waits for bytes; 0 at the end. Raises OSError when the connection breaks."""

    def close(self) -> None:
        """Ends it, also for a reader that waits in another thread. May be called twice."""


class Containers(Protocol):
    """The part of an engine that a container's life needs. Everything raises EngineLostError or EngineRefusedError."""

    def create(self, spec: ContainerSpec) -> str: ...

    def start(self, container: str) -> None: ...

    def state(self, container: str) -> State:
        """Raises NotFoundError when there is no such container."""

    def stop(self, container: str, grace: float) -> None:
        """SIGTERM, ``grace`` seconds later SIGKILL; returns when it is over. Nothing happens to one that does not
        run.
        """

    def remove(self, container: str, *, force: bool = False) -> None:
        """A container that is not there is removed already. force kills it first."""

    def attach_output(self, container: str) -> Attachment:
        """stdout and stderr from now on, as frames. Exact when attached before the start."""

    def attach_stdin(self, container: str) -> Attachment:
        """The container's stdin: closing it, or the death of this process, is end-of-file there."""

    def log_frames(self, container: str, *, follow: bool, tail: int | None = None) -> Iterator[tuple[int, bytes]]:
        """The stored log as (stream, entry): one line, or one piece of 16 KiB of a longer one. Not lines: an entry may
        lack its newline."""

    def containers(self, labels: Sequence[str]) -> list[Found]:
        """Containers in every state that have all these labels (``name`` or ``name=value``)."""
