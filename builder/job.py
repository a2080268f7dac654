"""The job: what the host asks the in-container program to do, as one JSON document in ``WARM_CACHE_JOB``.

It never holds a secret.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from builder.errors import UsageError
from builder.task import NO_IMAGE, Gpu, ServingImage, Shape, Task
from builder.typed_json import from_object

JOB_VARIABLE = "WARM_CACHE_JOB"

#: Linux takes no longer string in an environment (MAX_ARG_STRLEN, 32 pages), name and terminator included.
MAX_JOB = 131072 - len(JOB_VARIABLE) - 2
SCHEMA = 1

#: What the program is to do. ``probe``: find out the toolchain, prepare the root, write the memo. ``toolchain``: find
#: it out, and write nothing. ``run``: warm one task. ``lock``, ``views``, ``hold``: hold one lock until the end.
#: ``record``: record what test files launch. ``plan``: name the kernels of shapes. ``prebuild``: compile named kernels.
#: ``pack``, ``restore``: layers of a cache image out of a root, and into one. The others work on a whole cache root.
Mode = Literal[
    "probe", "toolchain", "run", "lock", "views", "hold", "record", "plan", "prebuild",
    "sweep", "verify", "prune", "status", "families",
    "survey", "pack", "restore", "view-create", "view-drop", "view-list", "view-audit",
]  # fmt: skip

#: Where a container that audits a view has it mounted.
MERGED = "/run/warm-cache-view"

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class RunOrigin:
    """The origin of a run. A task's marker records it."""

    host: str
    builder: str  # version of this program
    image: str  # reference, as people name it
    run: str  # id


@dataclass(frozen=True)
class ViewRequest:
    """The object of the modes of views, and of ``sweep``."""

    name: str = ""  # of the view; "" in mode ``view-list``: all of them
    engine: str = ""  # id of the engine that has, or gets, its volume
    keep: tuple[str, ...] | None = None  # mode ``sweep``: names of views that have a volume; None: sweep no views


@dataclass(frozen=True)
class PrunePolicy:
    """What may be removed from a cache root (mode ``prune``)."""

    keep: int = 2  # toolchains of each task that stay
    older_than: float | None = None  # seconds without use after which a toolchain is removed; None: never
    max_size: int | None = None  # bytes of the root; None: no limit
    image: str = ""  # identity of the manifest's image, which stays
    keys: tuple[Mapping[str, str], ...] = ()  # its family keys, for each environment of its tasks; they stay
    folders: tuple[str, ...] = ()  # folders of its tasks' markers; they stay
    tasks: tuple[str, ...] = ()  # labels of tasks with unknown folders: their model is not there
    pins: tuple[str, ...] = ()  # names of images of other manifests; their markers and toolchains stay
    dry_run: bool = False


@dataclass(frozen=True)
class PlannedShape:
    """A shape, the Ms to compile it for, and after the plan pass which M makes which entries.

    m_values: empty for sglang's own, made from `chunked_prefill_size`; None there: the default of the GPU.
    every: each M up to `chunked_prefill_size` instead, because an earlier list missed kernels.
    """

    shape: Shape
    m_values: tuple[int, ...] = ()
    chunked_prefill_size: int | None = None
    kernels: tuple[tuple[int, tuple[str, ...]], ...] = ()
    every: bool = False


@dataclass(frozen=True)
class PrebuildRequest:
    """The object of the modes ``plan`` and ``prebuild``, on a simulated GPU.

    models: tasks whose shapes sglang's own code tells. key: of deep_gemm, where the GPU stage looks for entries.
    modules: of sglang's own JIT, as a walk named them; jit_key: of sglang_jit.
    workers: the most at the same time. memory: bytes for all workers together; None: what is available.
    cpus: the processors to use; empty: all. gentle: give way to whatever else runs here.
    """

    gpu: Gpu
    shapes: tuple[PlannedShape, ...] = ()
    models: tuple[Task, ...] = ()
    key: str = ""
    modules: tuple[str, ...] = ()
    jit_key: str = ""
    workers: int = 0  # 0: one for each processor
    memory: int | None = None
    cpus: tuple[int, ...] = ()
    gentle: bool = False


@dataclass(frozen=True)
class Job:
    """Everything that the in-container program needs for one mode. Durations in seconds."""

    mode: Mode
    nonce: str  # of this run's event lines; printable ASCII
    mount: str  # the cache root inside the container
    image: ServingImage = NO_IMAGE
    task: Task | None = None
    lease: str | None = None  # path of the lease file; None: stdin is the lease, if it is attached
    lifetime: float = 7200.0  # after which the container ends by itself
    grace: float = 8.0  # between SIGTERM and the end of all children
    log_limit: int = 2 << 30  # bytes of log after which the task is ended
    gpus: tuple[int, ...] = ()  # indices of the task's GPUs on the machine, as far as they are known, for the history
    workdir: str = "/"  # where children start: the image's own
    secrets: tuple[str, ...] = ()  # NAMES of environment variables with values that are never printed
    job_max: float = 6 * 3600.0  # a test job may last so long, and use the cache without a lock (``sweep``, ``prune``)
    repair: bool = False  # mode ``verify``: quarantine bad entries
    concurrent: bool = False  # other tasks of this run may compile into the root at the same time
    prune: PrunePolicy | None = None
    view: ViewRequest = ViewRequest()
    transfer: str = ""  # modes ``pack`` and ``restore``: a directory with the request, and layers of a cache image
    record: str = ""  # mode ``record``: path of a `recording.RecordingRequest`
    prebuild: PrebuildRequest | None = None
    prebuilt: Mapping[str, str] = field(default_factory=dict)  # mode ``run``: keys, by family, of a complete prebuild
    simulate: Gpu | None = None  # mode ``toolchain``: as on this GPU, where there is none
    observed: RunOrigin | None = None

    def to_json(self) -> str:
        """The document for ``WARM_CACHE_JOB``: valid UTF-8, and short, because Linux takes no environment string above
        128 KiB. Only what cannot be UTF-8 (half a surrogate pair) is escaped."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

    def variable(self) -> dict[str, str]:
        """Return ``WARM_CACHE_JOB`` with its value. Raises UsageError if it is longer than Linux takes."""
        document = self.to_json()
        if len(document.encode()) > MAX_JOB:
            raise UsageError(
                f"{self.task.label if self.task else self.mode}: its argv, env and shapes make a job of "
                f"{len(document.encode())} bytes, and the kernel's limit for one variable is {MAX_JOB}. Put long "
                "values into a file in the image."
            )
        return {JOB_VARIABLE: document}

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Raises ValueError with one sentence when the document is not a job of this schema."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
                raise ValueError(f"schema {SCHEMA} expected")
            job = from_object(cls, data, "job", floats=(0.0, threading.TIMEOUT_MAX))
            if not re.fullmatch(r"[!-~]+", job.nonce):
                raise ValueError("nonce is not of printable ASCII characters")
        except RecursionError:
            raise ValueError(f"{JOB_VARIABLE} does not hold a job: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{JOB_VARIABLE} does not hold a job: {error}") from None
        return job
