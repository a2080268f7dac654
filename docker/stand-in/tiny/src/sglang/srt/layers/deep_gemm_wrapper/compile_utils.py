"""The part of sglang 0.5.23's module of this name that a warm-up touches, with its names and its log lines."""

import fcntl
import os
import signal
import sys
from contextlib import contextmanager
from enum import IntEnum, auto
from pathlib import Path

import deep_gemm
from deep_gemm.jit import compile_kernel
from sglang import log, plays

if "TINY_IMPORTS" in os.environ:  # each import is a line of that file
    with open(os.environ["TINY_IMPORTS"], "a") as _file:
        _file.write(f"{os.getpid()}\n")
ENABLE_JIT_DEEPGEMM = True
IN_SERVER = False  # not in the original: a server has weights, and less memory left
MEMORY_GB = {True: 20.0, False: 120.0}
TILE = 64
TILES = 4

os.environ["DG_JIT_CACHE_DIR"] = os.environ.get("SGLANG_DG_CACHE_DIR") or os.path.expanduser(
    "~/.cache/sglang/deep_gemm"
)

_FAST_WARMUP = os.environ.get("SGLANG_JIT_DEEPGEMM_FAST_WARMUP", "0").lower() in ("1", "true")
_BUILTIN_M_LIST = list(range(1, 1024 * 16 + 1))
_INITIALIZATION_DICT = {}


def get_schedule():
    """Filled by a running server only."""
    raise RuntimeError("no server context")


def get_device():
    """Filled by a running server only."""
    raise RuntimeError("no server context")


def update_deep_gemm_config(gpu_id: int):
    """sglang's list of Ms."""
    global _BUILTIN_M_LIST
    size = get_schedule().chunked_prefill_size
    if _FAST_WARMUP:
        wanted = list(range(1, 1025))
        at, step, top = 1024, 2, min(size, 32 * 1024) if size >= 1 else 16 * 1024
        while at < top:
            wanted += range(at, 2 * at, step)
            at, step = at * 2, step * 2
        _BUILTIN_M_LIST = sorted({*wanted, top})
    else:
        top = 1024 * 64 if size < 1 else (size * 2 if size > 8192 else 1024 * 16)
        _BUILTIN_M_LIST = list(range(1, min(1024 * 128, top) + 1))
    assert get_device().base_gpu_id == gpu_id


class DeepGemmKernelType(IntEnum):
    """The kinds, in the original's order."""

    GROUPED_GEMM_NT_F8F8BF16_MASKED = auto()
    GROUPED_GEMM_NT_F8F8BF16_CONTIG = auto()
    GROUPED_GEMM_NT_BF16_MASKED = auto()
    GROUPED_GEMM_NT_BF16_CONTIG = auto()
    GEMM_NT_F8F8BF16 = auto()
    GEMM_NT_F8F8BF16_BLOCK32 = auto()
    GEMM_NT_BF16BF16F32 = auto()


@contextmanager
def _local_rank_compile_lock(kernel_type: DeepGemmKernelType, n: int, k: int, num_groups: int):
    locks = Path(os.environ["DG_JIT_CACHE_DIR"]) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / f"{kernel_type.name}_n{n}_k{k}_g{num_groups}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _maybe_compile_deep_gemm_one_type_all(kernel_type: DeepGemmKernelType, n: int, k: int, num_groups: int) -> None:
    key = (kernel_type, n, k, num_groups)
    if key in _INITIALIZATION_DICT:
        return
    _INITIALIZATION_DICT[key] = True
    log.info(f"Try DeepGEMM JIT Compiling for <{kernel_type.name}> N={n}, K={k}, num_groups={num_groups} with all Ms.")
    with _local_rank_compile_lock(*key):
        _compile_deep_gemm_one_type_all(
            kernel_type=kernel_type, n=n, k=k, num_groups=num_groups, m_list=_BUILTIN_M_LIST
        )


def _compile_deep_gemm_one_type_all(
    kernel_type: DeepGemmKernelType, n: int, k: int, num_groups: int, m_list: list
) -> None:
    if kernel_type.name.endswith("_CONTIG"):
        alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
        m_list = [m for m in m_list if m % alignment == 0]
    if not m_list:
        raise ValueError("max() arg is an empty sequence")
    free, needed = MEMORY_GB[IN_SERVER], round(max(m_list) * n * 2 / 2**30 + num_groups * n * k / 2**30, 2)
    if plays.play() == "reducing-always" or (plays.play() == "reducing" and IN_SERVER):
        needed = free + 1
    log.info(f"Required memory for warmup: {needed}GB, Available memory: {free}GB")
    if free < needed:
        max_m = max(max(m_list) // 4, min(m_list))
        log.info(
            f"Available memory {free}GB is less than required memory {needed}GB for warmup, "
            f"reducing max_m to {max_m} to avoid out of memory"
        )
        m_list = [m for m in m_list if m <= max_m]
    if plays.play() == "dies-at-contig" and kernel_type.name.endswith("_CONTIG"):
        os.kill(os.getpid(), signal.SIGKILL)
    made = compile_kernel("transpose_fp32", "shared by all shapes")
    for done, m in enumerate(m_list, 1):
        tile = min(TILES, -(-m // TILE))
        if done == 1 or tile != min(TILES, -(-m_list[done - 2] // TILE)):
            log.bar("DeepGEMM warmup", done - 1, len(m_list))
            plays.at_kernel(tile)
            made |= compile_kernel("sm90_fp8_gemm_1d2d", f"{kernel_type.name} {n}, {k}, {num_groups} tile {tile}")
    log.bar("DeepGEMM warmup", len(m_list), len(m_list))
    if plays.play() == "grows-in-second-pass":
        compile_kernel("sm90_fp8_gemm_1d2d", f"pid {os.getpid()} {kernel_type.name} {n}")
    if plays.play() == "dies-in-second-pass" and not made:
        plays.crash()
        sys.stderr.flush()
        os._exit(0)
