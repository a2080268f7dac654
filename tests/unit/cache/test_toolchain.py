"""Toolchain records: which factors move a key, and the memo that keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from builder.cache import toolchain
from builder.cache.families import FAMILIES, FAMILY
from builder.cache.toolchain import Record
from builder.task import GPUS

IMAGE = "sha256:" + "a" * 64
H200 = {
    "index": 0,
    "uuid": "GPU-0",
    "name": "NVIDIA H200",
    "compute_capability": "9.0",
    "sm_count": 132,
    "memory_bytes": 150754820096,
}


def record(**factors: str | None) -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    return {
        "schema": 2,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit", **factors},
        "gpus": [dict(H200), {**H200, "index": 1, "uuid": "GPU-1"}],
        "sglang": {"version": "0.5.23", "commit": None, "sources": None},
        "variables": {},
        "observed": {"driver": "570.1", "python": "3.12.3", "problems": []},
    }


# Keys


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_factor_changes_keys_of_its_families_only(family: Any) -> None:
    before = toolchain.family_keys(record())
    for factor in family.factors:
        for other in (f"{factor} 2", None):
            after = toolchain.family_keys(record(**{factor: other}))
            moved = {name for name in before if before[name] != after[name]}
            assert moved == {item.name for item in FAMILIES if factor in item.factors}


def test_sglang_version_alone_changes_no_key() -> None:
    bumped = record()
    bumped["sglang"] = {"version": "0.6.0", "commit": "fff", "sources": None}
    bumped["observed"]["driver"] = "999"
    assert toolchain.family_keys(bumped) == toolchain.family_keys(record())


def test_other_image_keeps_all_family_keys() -> None:
    assert toolchain.family_keys(record()) == toolchain.family_keys(record(image="sha256:b"))


def test_other_build_of_sglang_keeps_shared_family_keys() -> None:
    before, after = toolchain.family_keys(record()), toolchain.family_keys(record(sglang_build="0.5.23 (abc)"))
    assert {name for name in before if before[name] == after[name]} == {item.name for item in FAMILIES if item.shared}


def test_keys_are_hex_and_independent_of_order() -> None:
    made = record()
    again = json.loads(json.dumps({**made, "factors": dict(reversed(made["factors"].items()))}))
    assert toolchain.family_keys(again) == toolchain.family_keys(made)
    for key in toolchain.family_keys(made).values():
        assert len(key) == 16
        assert int(key, 16) >= 0
    keys = toolchain.family_keys(made)
    assert toolchain.digest(keys) == toolchain.digest(dict(reversed(keys.items())))


def test_keys_of_families_with_equal_factors_differ() -> None:
    assert FAMILY["cute_dsl"].factors == FAMILY["quack"].factors
    keys = toolchain.family_keys(record())
    assert keys["cute_dsl"] != keys["quack"]


# The GPU


def test_gpu_of_an_older_record_gets_the_nearest_figures() -> None:
    found = toolchain.gpu_of({**record(), "gpus": [dict(H200)]})
    assert found == replace(GPUS["H200"], memory=150754820096)
    other = {**H200, "shared_bytes": 1, "l2_bytes": 2, "sm_count": 78, "name": "NVIDIA H20"}
    found = toolchain.gpu_of({**record(), "gpus": [other, other]})
    assert (found.name, found.sms, found.shared, found.l2) == ("NVIDIA H20", 78, 1, 2)


@pytest.mark.parametrize(
    ("gpus", "why"),
    [
        ([], "no GPU"),
        ([{**H200, "sm_count": None}], "cannot tell"),
        ([dict(H200), {**H200, "sm_count": 78}], "several kinds"),
    ],
)
def test_gpu_that_cannot_be_simulated_is_refused(gpus: list[Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        toolchain.gpu_of({**record(), "gpus": gpus})


@pytest.mark.parametrize(("name", "size"), [("H100", 8192), ("H200", 8192), ("B200", 16384)])
def test_chunk_of_a_server_follows_the_memory(name: str, size: int) -> None:
    assert GPUS[name].chunked_prefill_size == size
