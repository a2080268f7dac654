"""Records of hardware proofs: on a GPU of this model, prebuilt kernels were requested, found and loaded.

`tests/gpu/prove.sh` writes a record on a machine with that GPU. ``[prebuild] enabled = "proven"`` looks for one in two
places, neither of which a container can write: the package's own folder `proofs`, and /etc/warm-cache/proofs of this
host. A file is a JSON object; what is not a whole record of this schema, failed, or is of a simulated GPU proves
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import files

SCHEMA = 1
#: What has to hold in a record. names: the same entries are requested as were prebuilt; loads: each of them loads;
#: hits: a task after a prebuild compiles none; second_pass: nor does its second pass; released: the GPU is free after.
CHECKS = ("names", "loads", "hits", "second_pass", "released")

PLACES = (Path(__file__).resolve().parents[1] / "proofs", Path("/etc/warm-cache/proofs"))
_LIMIT = 1 << 20


@dataclass(frozen=True)
class HardwareProof:
    """One record. Versions are for people: a prebuild is wrong at the cost of time alone."""

    path: Path
    gpu: str  # the name by CUDA
    kernels: int
    date: str
    sglang: str
    deep_gemm: str


def find(gpu: str, places: tuple[Path, ...] = PLACES) -> HardwareProof | None:
    """Return a record for this GPU model, or None. Never raises."""
    return next((proof for place in places for proof in _read(place) if proof.gpu == gpu), None)


def _read(place: Path) -> Iterator[HardwareProof]:
    for item in files.listing(str(place)) or ():
        if item.name.endswith(".json"):
            try:
                document = files.read_json(item.path, _LIMIT)
            except files.UnreadableError:
                continue
            if (proof := _proof(Path(item.path), document)) is not None:
                yield proof


def _proof(path: Path, document: Any) -> HardwareProof | None:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or document.get("simulated") is not False:
        return None
    checks, kernels = document.get("checks"), document.get("kernels")
    texts = [document.get(name) for name in ("gpu", "date", "sglang", "deep_gemm")]
    if document.get("complete") is not True:  # of few Ms
        return None
    if not isinstance(checks, dict) or not all(checks.get(name) is True for name in CHECKS):
        return None
    if not isinstance(kernels, int) or kernels < 1 or not all(isinstance(text, str) and text for text in texts):
        return None
    gpu, date, sglang, deep_gemm = map(str, texts)
    return HardwareProof(path, gpu, kernels, date, sglang, deep_gemm)
