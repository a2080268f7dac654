"""Why families are compiled anew, in plain words: the costliest family first, with the factor that moved its key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from builder.cache.coverage import brief
from builder.cache.families import PACKAGES
from builder.text import counted

#: Families by what compiling them anew costs, the costliest first, as far as it was measured or is reported:
#: deep_gemm 1.9 to 3.2 s of nvcc a kernel and hundreds of them (on 2 cores; sglang's CI: 13 min cold); flashinfer 15 to
#: 36 s a module (FlashInfer 0.7.2), about 30 min for all of a server (its issue 4884); sglang_jit 6.5 s a module;
#: torch_extensions and tvm_ffi one nvcc and one c++ a module; inductor some seconds a graph; Triton below 1 s a kernel.
#: sglang_cache is never required.
COST = (
    *("deep_gemm", "flashinfer", "deep_ep", "sglang_jit", "tvm_ffi", "torch_extensions"),
    *("inductor", "tilelang", "cute_dsl", "quack", "triton", "sglang_cache"),
)

#: Factors in the words of people, where their names are not.
_WORDS: Mapping[str, str] = {
    "deep_gemm": "sgl-deep-gemm",
    "deep_gemm_nvcc": "nvcc",
    "deep_gemm_format": "DeepGEMM's format",
    "deep_gemm_path": "DeepGEMM's folder",
    "compute_capability": "compute capability",
    "sm_count": "number of SMs",
    "gpu_name": "GPU",
    "isa": "CPU",
    "mount": "mount path",
    "host_compiler": "host compiler",
    "python_abi": "Python ABI",
    "torch_cuda": "CUDA of torch",
    "tvm_ffi": "tvm-ffi",
    "cutlass_dsl": "cutlass-dsl",
    "deep_ep": "DeepEP",
    "sglang_csrc": "CUDA sources of sglang",
    "sglang_extensions": "C++ sources of sglang",
    "sglang_build": "sglang",
}
#: Factors that are a version and a digest.
_VERSIONED = {*PACKAGES, "deep_gemm"}
_RELEASE = re.compile(r"\bV(\d[\d.]*)")

Row = tuple[str, str, str]


def rank(family: str) -> int:
    """Return the place of a family in the order of cost: 0 for the costliest one."""
    return COST.index(family) if family in COST else len(COST)


def by_cost(families: Iterable[str]) -> list[str]:
    """Return the families, the costliest first."""
    return sorted(families, key=rank)


def anew(changed: Mapping[str, Sequence[Row]], unchanged: int) -> str:
    """Return one sentence for people.

    changed: by family that is compiled anew, what differs (factor, was, is). unchanged: number of other families.
    """
    first, *more = by_cost(changed)
    text = f"{first} is compiled anew ({_difference(changed[first][0])})"
    text += f" and {len(more)} more" if more else ""
    return text + (f"; {counted(unchanged, 'family')} unchanged" if unchanged else "")


def _difference(row: Row) -> str:
    factor, was, now = row
    before, after = brief(*(_versions(factor, was, now) or (was, now)))
    name = _WORDS.get(factor, factor)
    # A package by another name is shown with that name.
    name = "" if any(value.startswith(("sgl-kernel ", "deep-gemm ")) for value in (was, now)) else name
    return " ".join(filter(None, (name[:100], before, "→", after)))


def _versions(factor: str, was: str, now: str) -> tuple[str, str] | None:
    """Return the versions without the digests behind them; None where the versions are equal or absent."""
    if factor in _VERSIONED and not any(sign in was + now for sign in ";\n"):
        pair = was.rpartition(" ")[0] or was, now.rpartition(" ")[0] or now
    elif (one := _RELEASE.search(was)) and (other := _RELEASE.search(now)):
        pair = one[1], other[1]
    else:
        return None
    return pair if pair[0] != pair[1] else None
