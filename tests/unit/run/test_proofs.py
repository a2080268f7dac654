"""Which files prove a GPU model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.run import proofs

RECORD: dict[str, Any] = {
    "schema": 1,
    "simulated": False,
    "gpu": "NVIDIA H200",
    "kernels": 41,
    "complete": True,
    "date": "2026-11-28",
    "sglang": "0.5.23",
    "deep_gemm": "0.2.3.post2",
    "checks": dict.fromkeys(proofs.CHECKS, True),
}


def find(place: Path, document: Any, gpu: str = "NVIDIA H200") -> proofs.HardwareProof | None:
    (place / "h200.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return proofs.find(gpu, (place / "none", place))


def test_proof_is_found_by_the_name_of_the_gpu(tmp_path: Path) -> None:
    found = find(tmp_path, RECORD)
    assert found is not None and (found.kernels, found.path.name) == (41, "h200.json")
    assert find(tmp_path, RECORD, "NVIDIA B200") is None


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"simulated": True}, id="a rehearsal"),
        pytest.param({"simulated": None}, id="not told whether it was one"),
        pytest.param({"checks": {**RECORD["checks"], "loads": False}}, id="a check that failed"),
        pytest.param({"checks": {"names": True}}, id="checks that were not made"),
        pytest.param({"complete": False}, id="few Ms"),
        pytest.param({"kernels": 0}, id="nothing was prebuilt"),
        pytest.param({"kernels": "41"}, id="not a number"),
        pytest.param({"schema": 2}, id="another schema"),
        pytest.param({"sglang": None}, id="no version"),
    ],
)
def test_record_that_proves_nothing_is_ignored(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert find(tmp_path, {**RECORD, **changes}) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_garbage_is_ignored(tmp_path: Path, text: str) -> None:
    assert find(tmp_path, text) is None
