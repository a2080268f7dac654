"""Compare the kernel sources of two builds: the files of sglang that kernels are made from or chosen by.

A build changes with every commit. It compiles other kernels only if one of these files changed. Each is recorded as
twelve characters (`pack`), in groups by the families that compile something of it, so that a difference can be counted
and named without a list of names: two thousand files take 25 kB.

Sources: sglang 0.5.11 to 0.5.23, what its Python files call (``load_jit``, ``triton.jit``, …) and where it keeps
C++ and CUDA (``kernels/*/csrc``, before 0.5.18 ``jit_kernel``) and tuned configurations (``…/configs/*.json``).
Left out: ``multimodal_gen``, which has other servers, tests, and other vendors' kernels.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: Folders of the package ``sglang`` that are looked through.
FOLDERS = (
    "kernels",
    "jit_kernel",
    *(f"srt/{name}" for name in ("layers", "lora", "speculative", "compilation", "batch_invariant_ops", "mem_cache")),
    "srt/models",
)

#: A Python file belongs to a family if it holds one of these words.
WORDS: Mapping[str, tuple[bytes, ...]] = {
    "triton": (b"triton.jit", b"@triton."),
    "sglang_jit": (b"load_jit",),
    "cute_dsl": (b"@cute.", b"cute.compile"),
    "quack": (b"quack",),
    "tilelang": (b"tilelang",),
    "torch_extensions": (b"load_inline", b"cpp_extension"),
    "inductor": (b"torch.compile", b"get_compiler_backend"),
    "flashinfer": (b"flashinfer.jit",),
}

#: Every other file, by its suffix and the first folder above it: (suffixes, folder, families).
FILES: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    # What decides which Ms sglang asks DeepGEMM for; Python files that hold none of the words.
    ((".py",), "srt/layers/deep_gemm_wrapper", ("deep_gemm",)),
    ((".cu", ".cuh", ".h", ".hpp", ".cpp", ".cc"), "jit_kernel", ("tvm_ffi",)),
    ((".cu", ".cuh", ".h", ".hpp", ".cpp", ".cc"), "kernels/ops/diffusion/ext", ("torch_extensions",)),
    ((".cu", ".cuh", ".h", ".hpp", ".cpp", ".cc"), "kernels", ("sglang_jit",)),
    ((".cu", ".cuh", ".h", ".hpp", ".cpp", ".cc"), "srt", ("torch_extensions",)),
    # Tuned block sizes: they choose among Triton's kernels.
    ((".json",), "", ("triton",)),
)

#: Other vendors' kernels, by a part of the path.
OTHERS = re.compile(r"gfx\d|npu|xpu|rocm|aiter|ascend|musa|(?:^|[/_])(?:hip|amd)(?=[/_.])")

#: Groups of families, joined by blanks → the packed files of the group, sorted.
Sources = Mapping[str, str]
_WIDTH, _PATH = 12, 5
#: A group's name, which messages show. Another version of the program may know other families.
_GROUP = re.compile(r"[a-z0-9_]{1,40}(?: [a-z0-9_]{1,40}){0,20}", re.ASCII)


@dataclass(frozen=True)
class Changed:
    """How the kernel sources of two builds differ. files: their number; families: that compile something of them."""

    files: int
    families: tuple[str, ...]


Relation = Literal["same", "changed", "unknown"]


def families_of(path: str, content: bytes) -> tuple[str, ...]:
    """Return the families that compile something of this file. path: below the package, with slashes."""
    if OTHERS.search(path):
        return ()
    found = {name for name, words in WORDS.items() if path.endswith(".py") and any(word in content for word in words)}
    for suffixes, folder, families in FILES:
        if path.endswith(suffixes) and (not folder or path.startswith(f"{folder}/")):
            if not path.endswith(".json") or "/configs/" in path:
                found.update(families)
            break
    return tuple(sorted(found))


def pack(path: str, content: bytes) -> str:
    """Return twelve characters: five for the path (30 bits), seven for the content."""
    return _short(path.encode("utf-8", "surrogateescape"))[:_PATH] + _short(content)[: _WIDTH - _PATH]


def _short(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode("ascii")


def is_sources(value: Any) -> bool:
    """Return whether a JSON value is sound kernel sources."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and _GROUP.fullmatch(name) and isinstance(text, str) and len(text) % _WIDTH == 0
        for name, text in value.items()
    )


def digest(sources: Sources | None) -> str | None:
    """Return 16 hex digits over these sources; None where they are unknown."""
    if not sources:
        return None
    text = "\n".join(f"{name} {packed}" for name, packed in sorted(sources.items()))
    return hashlib.sha256(text.encode("ascii", "replace")).hexdigest()[:16]


def group_digest(sources: Sources | None, family: str) -> str | None:
    """Return 16 hex digits over the files of one family; None where it has none, or they are unknown."""
    return digest({name: text for name, text in (sources or {}).items() if family in name.split()})


def changed(was: Sources, now: Sources) -> Changed:
    """Return the number of files that differ, are new or missing, and the families that they concern."""
    before, after = _files(was), _files(now)
    paths = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    families = {name for path in paths for kinds in (before, after) for name, _ in kinds.get(path, ())}
    return Changed(len(paths), tuple(sorted({family for group in families for family in group.split()})))


def _files(sources: Sources) -> dict[str, set[tuple[str, str]]]:
    """Return (group, content) by path."""
    found: dict[str, set[tuple[str, str]]] = {}
    for group, packed in sources.items():
        for at in range(0, len(packed), _WIDTH):
            one = packed[at : at + _WIDTH]
            found.setdefault(one[:_PATH], set()).add((group, one[_PATH:]))
    return found
