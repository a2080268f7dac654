"""Toolchain records: which factors move a key, and the memo that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.cache import toolchain
from builder.cache.families import FAMILIES, FAMILY
from builder.cache.toolchain import Record

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
        "schema": 1,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit", **factors},
        "gpus": [dict(H200), {**H200, "index": 1, "uuid": "GPU-1"}],
        "sglang": {"version": "0.5.23", "commit": None},
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
    bumped["sglang"] = {"version": "0.6.0", "commit": "fff"}
    bumped["observed"]["driver"] = "999"
    assert toolchain.family_keys(bumped) == toolchain.family_keys(record())


def test_other_image_keeps_shared_family_keys() -> None:
    before, after = toolchain.family_keys(record()), toolchain.family_keys(record(image="sha256:b"))
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
    assert FAMILY["tvm_ffi"].factors == FAMILY["torch_extensions"].factors
    keys = toolchain.family_keys(record())
    assert keys["tvm_ffi"] != keys["torch_extensions"]


# Memo


def remembered(root: Path, **seen: Any) -> Record | None:
    wanted: dict[str, Any] = {"mount": "/jit", "gpus": "NVIDIA H200", "driver": "570.1", "env": {}, **seen}
    return toolchain.read_memo(root, wanted.pop("image", IMAGE), **wanted)


def test_memo_round_trips_record(tmp_path: Path) -> None:
    assert remembered(tmp_path) is None
    toolchain.write_memo(tmp_path, IMAGE, record(), env={"HF_HUB_OFFLINE": "1"})
    assert remembered(tmp_path) == record()
    assert remembered(tmp_path, env={"HF_HUB_OFFLINE": "0", "UNRELATED": "x"}) == record()
    assert toolchain.memo_path(tmp_path, IMAGE).parent == tmp_path / "images"
    assert list((tmp_path / "images").iterdir()) == [toolchain.memo_path(tmp_path, IMAGE)]


@pytest.mark.parametrize(
    "seen",
    [
        {"mount": "/other"},
        {"gpus": "NVIDIA H100"},
        {"gpus": ""},
        {"driver": "580.2"},
        {"env": {"LD_PRELOAD": "/x.so"}},
        {"image": "sha256:other"},
    ],
)
def test_memo_is_read_only_when_circumstances_equal(tmp_path: Path, seen: dict[str, Any]) -> None:
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    assert remembered(tmp_path, **seen) is None


def test_memo_ignores_unseen_circumstances(tmp_path: Path) -> None:
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    assert remembered(tmp_path, gpus=None, driver=None, mount="/jit/") == record()
    blind = record()
    blind["observed"]["driver"] = None
    blind["gpus"] = [{**H200, "name": None}]
    toolchain.write_memo(tmp_path, "sha256:blind", blind, env={})
    assert remembered(tmp_path, image="sha256:blind", driver="1", gpus="NVIDIA H200") == blind


def test_memos_of_several_environments_coexist(tmp_path: Path) -> None:
    preload = {"LD_PRELOAD": "/x.so"}
    toolchain.write_memo(tmp_path, IMAGE, record(nvcc="a"), env={})
    toolchain.write_memo(tmp_path, IMAGE, record(nvcc="b"), env=preload)
    toolchain.write_memo(tmp_path, IMAGE, record(nvcc="c"), env={})
    assert remembered(tmp_path) == record(nvcc="c")
    assert remembered(tmp_path, env=preload) == record(nvcc="b")
    for number in range(40):
        toolchain.write_memo(tmp_path, IMAGE, record(), env={"PATH": str(number)})
    assert len(json.loads(toolchain.memo_path(tmp_path, IMAGE).read_text())["memos"]) == 16


@pytest.mark.parametrize(
    "spoil",
    [
        lambda memo: "",
        lambda memo: "\0" * 100,
        lambda memo: "[" * 100_000,
        lambda memo: json.dumps([memo]),
        lambda memo: json.dumps({**memo, "schema": 2}),
        lambda memo: json.dumps({**memo, "memos": {"a": 1}}),
        lambda memo: json.dumps({**memo, "memos": [{**memo["memos"][0], "table": 99}]}),
        lambda memo: json.dumps({**memo, "memos": [{**memo["memos"][0], "record": {"schema": 1}}]}),
        lambda memo: json.dumps(
            {**memo, "memos": [None, 3, {**memo["memos"][0], "record": {**record(), "gpus": [3]}}]}
        ),
        lambda memo: json.dumps({**memo, "memos": [{**memo["memos"][0], "record": {**record(), "factors": {"a": 1}}}]}),
    ],
)
def test_memo_unreadable_is_none(tmp_path: Path, spoil: Callable[[Any], str]) -> None:
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    path = toolchain.memo_path(tmp_path, IMAGE)
    path.write_text(spoil(json.loads(path.read_text())))
    assert remembered(tmp_path) is None
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    assert remembered(tmp_path) == record()


@pytest.mark.parametrize("image", ["../../evil", "", ".", "a/b:c", "\0", "sha256:é"])
def test_memo_path_stays_in_its_folder(tmp_path: Path, image: str) -> None:
    assert toolchain.memo_path(tmp_path, image).parent == tmp_path / "images"
    assert not toolchain.memo_path(tmp_path, image).name.startswith(".")
    assert toolchain.read_memo(tmp_path, image, mount="/jit", gpus=None, driver=None, env={}) is None


def test_memo_replaced_by_fifo_does_not_block(tmp_path: Path) -> None:
    path = toolchain.memo_path(tmp_path, IMAGE)
    path.parent.mkdir()
    os.mkfifo(path)
    assert remembered(tmp_path) is None


def test_memo_without_variables_is_asked_for_again(tmp_path: Path) -> None:
    """An earlier version did not record them; a task's container would find factors that the memo lacks."""
    old = record()
    del old["variables"]
    toolchain.write_memo(tmp_path, IMAGE, old, env={})
    assert toolchain.read_memo(tmp_path, IMAGE, mount="/jit", gpus=None, driver=None, env={}) is None
    toolchain.write_memo(tmp_path, IMAGE, record(), env={}, known=True)
    assert toolchain.read_memo(tmp_path, IMAGE, mount="/jit", gpus=None, driver=None, env={}) == record()
