"""A warm-up task, a DeepGEMM shape and the GPU models that can be simulated: what host and container share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: In a task's environment: the GPU that its kernels are compiled for, where there is none. Set by the builder alone.
PRETEND_VARIABLE = "WARM_CACHE_PRETEND"

#: The line sglang logs for every GEMM it warms (compile_utils.py of 0.5.12 to 0.5.23); `shapes` of a manifest accept
#: it as it is.
SHAPE = re.compile(
    r"<?(?P<kernel>[A-Z][A-Z0-9_]+)>?,?\s+N=(?P<n>\d{1,12}),?\s+K=(?P<k>\d{1,12}),?\s+num_groups=(?P<groups>\d{1,12})",
    re.ASCII,
)


_CHUNKED_PREFILL = ((20 << 30, 2048), (60 << 30, 4096), (160 << 30, 8192))
_LARGEST_CHUNK = 16384


@dataclass(frozen=True)
class Gpu:
    """A GPU model that can be simulated, as CUDA describes it. Sizes in bytes."""

    name: str
    capability: tuple[int, int]
    sms: int
    memory: int
    shared: int
    l2: int

    @property
    def chunked_prefill_size(self) -> int:
        """sglang's default for a server on this GPU, by its memory (0.5.23, arg_groups/memory_hook.py)."""
        return next((size for below, size in _CHUNKED_PREFILL if self.memory < below), _LARGEST_CHUNK)


#: The models that `[gpus] pretend` accepts. DeepGEMM's keys depend on capability and number of SMs alone. Names,
#: capabilities, SMs, memory and L2 are what torch prints on such GPUs (`_CudaDeviceProperties`), by public logs:
#: ``total_memory=143156MB, multi_processor_count=132, L2_cache_size=60MB`` of an H200, ``81089MB``, 132 and 50 MB of an
#: H100, ``182642MB`` (182631 on another), 148 and 126 MB of a B200; torch counts MiB. The 148 SMs are in sglang 0.5.23
#: as well (custom_all_reduce_v2.py). 232448 bytes of shared memory a block: DeepGEMM's SM90ArchSpec and SM100ArchSpec
#: (smem_capacity). None of this was measured here.
GPUS: Mapping[str, Gpu] = {
    "H200": Gpu("NVIDIA H200", (9, 0), sms=132, memory=143156 << 20, shared=232448, l2=60 << 20),
    "H100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), sms=132, memory=81089 << 20, shared=232448, l2=50 << 20),
    "B200": Gpu("NVIDIA B200", (10, 0), sms=148, memory=182642 << 20, shared=232448, l2=126 << 20),
}


@dataclass(frozen=True, order=True)
class Shape:
    """One DeepGEMM problem: kernel type, N, K and the number of groups. M is swept."""

    kernel: str
    n: int
    k: int
    groups: int = 1

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read sglang's own wording, e.g. ``GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1``. Raises ValueError."""
        found = SHAPE.fullmatch(text.strip())
        if not found:
            raise ValueError(f"{text!r} is not of the form 'GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1'")
        return cls(found["kernel"], int(found["n"]), int(found["k"]), int(found["groups"]))

    def __str__(self) -> str:
        return f"{self.kernel} N={self.n}, K={self.k}, num_groups={self.groups}"


@dataclass(frozen=True)
class ServingImage:
    """Identity of the image that the program runs in.

    id: by which an engine, or a person, names it. content: of its layers and environment, whatever the engine; None
    where nobody could see them. names: every other name of it.
    """

    id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    content: str | None = None
    names: tuple[str, ...] = ()


#: Where nothing is known of the image.
NO_IMAGE = ServingImage()


@dataclass(frozen=True)
class Recipe:
    """A way to make a task's kernels compile, as far as it is known without running it (`agent.recipes` runs it)."""

    version: int  # raised when what it compiles changes: its tasks are then cold
    settings: tuple[str, ...]  # fields of Task that change what it compiles
    server: bool = False  # runs a server with the task's argv, on the model: config.json decides about kernels
    requires: tuple[str, ...] = ()  # families that its tasks claim; empty: whatever holds an entry that they used


RECIPES: Mapping[str, Recipe] = {
    "compile-deep-gemm": Recipe(1, ("load", "layers", "m_values"), server=True, requires=("deep_gemm",)),
    "serve": Recipe(1, ("load", "layers", "requests"), server=True),
    "shapes": Recipe(1, ("shapes", "shapes_from", "m_values"), requires=("deep_gemm",)),
    "command": Recipe(1, ("success",)),
}


@dataclass(frozen=True)
class Task:
    """One warm-up. Durations in seconds."""

    label: str
    model: str
    recipe: str
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None  # of the model
    gpus: int = 0
    timeout: float = 1200.0
    silence: float = 600.0  # without output, after which it has failed
    success: str | None = None  # recipe ``command``: a regular expression that a line of its log matches
    families: tuple[str, ...] | None = None  # that it claims; None: those of its recipe
    shapes: tuple[Shape, ...] = ()
    shapes_from: tuple[str, ...] = ()  # more shapes: of ``config`` (config.json), of ``markers`` (earlier runs)
    m_values: tuple[int, ...] = ()  # empty: those of sglang
    workers: int = 0  # for shapes; 0: one per GPU, or per CPU core without GPUs
    requests: tuple[tuple[int, int], ...] = ((4, 8), (64, 8), (1024, 8))  # tokens in, tokens out
    load: str = "weights"
    layers: int | None = None  # that stay, with dummy weights; None: all
    verify: str = "second-pass"

    @property
    def claimed(self) -> tuple[str, ...] | None:
        """The families that it claims at least; None where only its run shows them."""
        return self.families if self.families is not None else RECIPES[self.recipe].requires or None
