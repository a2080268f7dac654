"""DeepGEMM's cache keys (sgl-deep-gemm 0.2.3 and later), recomputed with the standard library alone.

From an entry's ``meta.json`` and ``kernel.cu`` and the headers of the package (``deep_gemm/include``, deep_jit's
``compiler`` sources): two 64-bit FNV-1a streams over the signature, the compiler's version text, the flags and the
source with everything that it includes. No path is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MASK = (1 << 64) - 1
_INCLUDE = re.compile(rb"^[ \t\f\v]*#[ \t\f\v]*include[ \t\f\v]*<([^>\"]+)>")


class _Digest:
    def __init__(self) -> None:
        self._streams = (0xC6A4A7935BD1E995, 0xFF51AFD7ED558CCD)

    def update(self, data: str | bytes) -> _Digest:
        """The length and then the bytes."""
        data = data.encode() if isinstance(data, str) else data
        one, other = self._streams
        for byte in len(data).to_bytes(8, "little") + data:
            one = ((one ^ byte) * 0x100000001B3) & _MASK
            other = ((other ^ byte) * 0x9E3779B97F4A7C15) & _MASK
        self._streams = one, other
        return self

    def hex(self) -> str:
        return "".join(f"{_mixed(stream):016x}" for stream in self._streams)


def _mixed(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Headers:
    """The package's headers, each digested once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._known: dict[bytes, str] = {}

    def key(self, entry: Path) -> str:
        """32 hex digits: what DeepGEMM calls this entry's kernel behind its name."""
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        config = meta["config"]
        prefixes = tuple(prefix.encode() for prefix in config["include_prefixes"])
        digest = _Digest().update(config["extra_signature"])
        digest.update(_Digest().update(meta["compiler_info"]["version"]).hex())
        digest.update(" ".join(_flags(meta["compiler_options"]))).update("")
        return digest.update(self._source((entry / "kernel.cu").read_bytes(), prefixes)).hex()

    def _source(self, code: bytes, prefixes: tuple[bytes, ...]) -> str:
        digest = _Digest().update(code)
        for line in code.split(b"\n"):
            found = _INCLUDE.match(line)
            if found and found[1].startswith(prefixes):
                digest.update(self._header(found[1], prefixes))
        return digest.hex()

    def _header(self, name: bytes, prefixes: tuple[bytes, ...]) -> str:
        if name not in self._known:
            path = next(path for folder in self._folders if (path := folder / name.decode()).exists())
            self._known[name] = self._source(path.read_bytes(), prefixes)
        return self._known[name]


def _flags(options: Mapping[str, Any]) -> list[str]:
    level = options["optimize_level"]
    return [
        f"--gpu-architecture=sm_{options['arch']}",
        f"-O{level}",
        f"--compiler-options=-O{level}",
        *(["--use_fast_math"] if options["use_fast_math"] else []),
        *(["--ptxas-options=--verbose"] if options["ptxas_verbose"] else []),
        f"--ptxas-options=--register-usage-level={options['ptxas_register_usage_level']}",
        *(["--ptxas-options=--warn-on-spills"] if options["check_no_spills"] else []),
        *(["--ptxas-options=--warn-on-local-memory-usage"] if options["check_no_local_memory"] else []),
        *(["--generate-line-info"] if options["with_line_info"] else []),
        *(options["nvcc_flags"] or []),
        *options["extra_nvcc_flags"],
    ]
