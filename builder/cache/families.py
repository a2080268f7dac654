"""The cache families of sglang on CUDA, as data.

A family is one kind of JIT cache. The table says which variables point at it, which factors its kernels depend on,
how its entries look on disk and what a killed process leaves behind. Nothing here has behaviour beyond joining paths;
`toolchain` turns factors into keys and `inventory` reads the layouts.

What sglang keeps elsewhere, and why it is no family: FlashInfer's cubins and Hugging Face's kernels lie in the image
(FLASHINFER_CUBIN_DIR stays as it is); the allocator of symmetric memory is built in the temporary directory, which no
variable moves; outlines keeps grammars in a data base; CUDA graphs cannot be kept.

Sources: sglang 0.5.11 to 0.5.23 (``srt/environ.py``, ``kernels/jit``), sgl-deep-gemm 0.1.0 to 0.2.5, Triton 3.9
(``runtime/cache.py``, ``knobs.py``), torch 2.14 (``cpp_extension.py``, ``codecache.py``), DeepEP 2 (``csrc/jit``),
quack-kernels 0.6.5, nvidia-cutlass-dsl 4.8.0.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

#: Part of every family key: raise it when the meaning of a family's directory changes.
TABLE_VERSION = 1

#: Families that hold host ``.so`` or ``.o`` files depend on what those link against.
HOST_ABI = ("libc", "machine", "python_abi")

#: Package factors: the value is the installed content of these distributions, all that are present.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "triton": ("triton",),
    "flashinfer": ("flashinfer-python",),
    "tvm_ffi": ("apache-tvm-ffi",),
    # The distribution that people name holds nothing but a .pth file; the compiler is in the libs.
    "cutlass_dsl": (
        "nvidia-cutlass-dsl",
        "nvidia-cutlass-dsl-libs-base",
        "nvidia-cutlass-dsl-libs-cu12",
        "nvidia-cutlass-dsl-libs-cu13",
    ),
    "quack": ("quack-kernels",),
    "tilelang": ("tilelang",),
    "deep_ep": ("deep-ep",),
}

#: Compilers whose headers are among ninja's inputs: nvcc reports system headers as well.
COMPILERS = ("nvcc", "host_compiler")

#: Distributions with DeepGEMM, the first that is present counts: its wheel, upstream's, sgl-kernel (sglang <= 0.5.11).
DEEP_GEMM_PACKAGES = ("sgl-deep-gemm", "deep-gemm", "sgl-kernel")

#: Names of files and directories, at any depth, that are never entries: locks, and what is still being written.
TRANSIENT = (
    "lock",
    "locks",
    "*.lock",
    ".ninja_lock",
    "tmp",
    "*.tmp",
    "*.tmp-*",
    ".tmp*",
    ".*.tmp*",
    "tmp.*",
    ".staging-*",
    ".nfs*",
)

#: Names of files, in families whose entries are files, that a mere use writes to: FlashInfer logs every load, and ninja
#: every build that had something to do, next to what it made. Their times mean nothing.
REWRITTEN = ("*.log", ".ninja_log", ".ninja_deps")

_ABANDONED = "abandoned by a process that was killed"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of JIT cache.

    env: (variable, path below the family's directory; "" is the directory itself).
    factors: names of factors in the toolchain record.
    layout: how entries are recognised: ``deep_gemm`` | ``triton`` | ``files``.
    shared: images with equal factors may use one directory. Where not, the build of sglang is among the factors.
    sources: packages (factors of PACKAGES, or ``sglang``) and compilers (COMPILERS) whose files ninja compares the
    entries with: an entry that is older than one of them would be compiled again. Empty: entries are found by content.
    executes: it holds host code that is loaded from its files. locks: its users take lock files in it even for a hit
    (DeepGEMM through sglang from 0.5.20 on; FlashInfer, quack, tvm-ffi by flock; torch by a file).
    claimable: a task may claim it in its marker. Where not, the driver manages it and nothing in it is ever moved.
    transient: shell patterns of one path component that are never entries.
    leftovers: (pattern, why it is unsafe or useless); a pattern with a slash is matched from the family's directory
    on, component by component, one without is matched against the name at any depth.
    host_specific: names, directly in the family's directory, that are true on one host only: never entries.
    apart: names, directly in the family's directory, of what no compiler made: never entries, and copied nowhere.
    whole: patterns of directories that are published by one rename, so that they are quarantined only as a whole.
    looked_at: how many of these, the newest of one parent by their own times, a look-up reads (`leaves`); 0 for all.
    rewritten: names of files that a mere use writes anew, so that a new time is no sign of a compilation.
    renamed: every file of an entry is published by rename and never written again, so that it can be copied while a
    process compiles. Known of these: DeepGEMM renames the directory, Triton each file, sglang's JIT the leaf. Not of
    the others: ninja, quack and torch's loader write in place, and the rest was not examined.
    timeless: entries are found by content alone, at any mount path that the key allows, so that times and path do not
    travel with a cache image. Of the others, a build or a look-up compares times, or files may name others by path.
    """

    name: str
    env: tuple[tuple[str, str], ...]
    factors: tuple[str, ...]
    layout: str = "files"
    shared: bool = True
    sources: tuple[str, ...] = ()
    executes: bool = True
    locks: bool = False
    claimable: bool = True
    transient: tuple[str, ...] = TRANSIENT
    leftovers: tuple[tuple[str, str], ...] = ()
    host_specific: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    looked_at: int = 0
    rewritten: tuple[str, ...] = REWRITTEN
    renamed: bool = False
    timeless: bool = False


FAMILIES: tuple[Family, ...] = (
    Family(
        name="deep_gemm",
        executes=False,
        locks=True,
        # sglang overwrites DG_JIT_CACHE_DIR with SGLANG_DG_CACHE_DIR at import; DeepGEMM alone reads the former.
        env=(("SGLANG_DG_CACHE_DIR", ""), ("DG_JIT_CACHE_DIR", "")),
        factors=(
            "deep_gemm_format",
            "deep_gemm",
            "deep_gemm_nvcc",
            "compute_capability",
            "sm_count",
            # The old format has -I<site-packages> in every key; null for the new one, which is free of paths.
            "deep_gemm_path",
        ),
        layout="deep_gemm",
        renamed=True,
        timeless=True,
        leftovers=(("tmp/*", f"build {_ABANDONED}"),),
    ),
    Family(
        name="deep_ep",
        executes=False,
        # DeepEP's own JIT (its version 2): keyed by source and flags, with the path of its headers and without their
        # content, so that the package is a factor.
        env=(("EP_JIT_CACHE_DIR", ""),),
        factors=("deep_ep", "torch", "nvcc", "compute_capability", *HOST_ABI),
        layout="deep_gemm",
        leftovers=(("tmp/*", f"build {_ABANDONED}"),),
    ),
    Family(
        name="triton",
        # Its tuning results are entries here as well, where a task's env has TRITON_CACHE_AUTOTUNING = "1"; without it
        # every process measures anew.
        env=(("TRITON_CACHE_DIR", ""),),
        # __grp__*.json holds absolute paths, so the mount path is part of what a kernel is found by.
        factors=("triton", "ptxas", "compute_capability", "mount", *HOST_ABI),
        layout="triton",
        renamed=True,
        timeless=True,
        leftovers=(("*/tmp.pid_*", f"write {_ABANDONED}"),),
    ),
    Family(
        name="inductor",
        env=(("TORCHINDUCTOR_CACHE_DIR", ""),),
        # Its C++ is compiled for the instructions of this CPU.
        factors=("torch", "triton", "torch_cuda", "gpu_name", "isa", *HOST_ABI),
        leftovers=(("*.tmp", f"write {_ABANDONED}"), ("tmp.pid_*", f"write {_ABANDONED}")),
    ),
    Family(
        name="flashinfer",
        locks=True,
        # FlashInfer appends .cache/flashinfer to its base. Its FLASHINFER_CUBIN_DIR stays in the image on purpose.
        env=(("FLASHINFER_WORKSPACE_BASE", ""), ("TRTLLM_DG_CACHE_DIR", "trtllm_deep_gemm")),
        factors=("flashinfer", "torch", "nvcc", "compute_capability", *HOST_ABI),
        sources=("flashinfer", "torch", "tvm_ffi", *COMPILERS),
        leftovers=(("trtllm_deep_gemm/tmp/*", f"build {_ABANDONED}"), ("*.tmp", f"write {_ABANDONED}")),
    ),
    Family(
        name="sglang_jit",
        env=(("SGLANG_JIT_CACHE_DIR", ""),),
        factors=("tvm_ffi", "nvcc", "host_compiler", "compute_capability", *HOST_ABI),
        leftovers=((".staging-*", f"build {_ABANDONED}"), ("*.tmp-*", f"write {_ABANDONED}")),
        # sglang renames a finished build onto the leaf and takes "it exists" for success: half a leaf never heals.
        whole=("deps-*",),
        looked_at=100,
        renamed=True,
    ),
    Family(
        name="tvm_ffi",
        locks=True,
        env=(("TVM_FFI_CACHE_DIR", ""),),
        factors=("tvm_ffi", "sglang_csrc", "torch", "nvcc", *HOST_ABI),
        sources=("sglang", "tvm_ffi", "torch", "flashinfer", *COMPILERS),
    ),
    Family(
        name="cute_dsl",
        executes=False,
        env=(("CUTE_DSL_CACHE_DIR", ""), ("SGLANG_CUTE_AOT_CACHE_DIR", "aot")),
        factors=("cutlass_dsl", "tvm_ffi", "quack", *HOST_ABI),
        timeless=True,
        leftovers=(("*.tmp", f"write {_ABANDONED}"), (".*.tmp*", f"write {_ABANDONED}")),
    ),
    Family(
        name="quack",
        locks=True,
        env=(("QUACK_CACHE_DIR", ""),),
        factors=("cutlass_dsl", "tvm_ffi", "quack", *HOST_ABI),
        timeless=True,
    ),
    Family(
        name="tilelang",
        env=(("TILELANG_CACHE_DIR", ""),),
        factors=("tilelang", "nvcc", "compute_capability", *HOST_ABI),
        timeless=True,
        leftovers=(("tmp/*", f"build {_ABANDONED}"),),
    ),
    Family(
        name="torch_extensions",
        locks=True,
        env=(("TORCH_EXTENSIONS_DIR", ""),),
        factors=("torch", "sglang_extensions", "nvcc", *HOST_ABI),
        sources=("sglang", "torch", *COMPILERS),
        # torch's FileBaton is the file's existence, so the lock of a killed owner is waited for without end.
        leftovers=(("lock", "lock file whose owner is gone: every later loader waits for it forever"),),
    ),
    Family(
        name="sglang_cache",
        env=(("SGLANG_CACHE_DIR", ""),),
        factors=("sglang_build", "torch", "triton", "flashinfer", "gpu_name"),
        shared=False,
        leftovers=(("*.tmp", f"write {_ABANDONED}"), ("tmp.pid_*", f"write {_ABANDONED}")),
        # No caches of compilers: a table of embeddings that each boot writes anew (SGLANG_QWEN4_PLE_FILE_DIR, srt/
        # environ.py of 0.5.23), and configurations of models that runai's streamer loads.
        apart=("ple", "model_streamer"),
        # Keyed by CUDA_VISIBLE_DEVICES alone; on another host its answers are wrong.
        host_specific=("gpu_p2p_access_cache_for_*",),
        # FlashInfer's tuning results (flashinfer_autotune.py): every server saves what it has loaded.
        rewritten=(*REWRITTEN, "rank_*.json"),
    ),
    Family(
        name="cuda",
        executes=False,
        env=(("CUDA_CACHE_PATH", ""),),
        factors=("driver",),
        claimable=False,
    ),
)

FAMILY: dict[str, Family] = {family.name: family for family in FAMILIES}
#: Those that a task can claim: what tables show, and what counts as warm or cold.
CLAIMABLE = tuple(family for family in FAMILIES if family.claimable)


def directory(root: str, family: str, key: str) -> str:
    """Where the family with this key lives below the cache root: ``<root>/<family>/<key>``."""
    return posixpath.join(root, family, key)


def whole(family: Family, name: str) -> str:
    """Return the directory that is published and moved as a whole with this entry, or the entry itself."""
    parts = name.split("/")
    for depth, part in enumerate(parts, 1):
        if any(fnmatchcase(part, pattern) for pattern in family.whole):
            return "/".join(parts[:depth])
    return name


#: A family key as a regular expression.
KEY = "[0-9a-f]{16}"


def is_key(name: str) -> bool:
    """Return whether a directory of this name, below a family's name, is a family directory."""
    return re.fullmatch(KEY, name) is not None


def environment(mount: str, keys: Mapping[str, str]) -> dict[str, str]:
    """Every variable, for old and new sglang alike, that makes a process use these families.

    mount: the cache root as the process sees it. keys: family key by family; families without one are left alone.
    """
    return {
        variable: posixpath.join(directory(mount, family.name, keys[family.name]), below).rstrip("/")
        for family in FAMILIES
        if family.name in keys
        for variable, below in family.env
    }
