"""Memos: what is remembered of an image, by whichever name, on whichever machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.cache import memos, toolchain
from builder.cache.families import FAMILIES
from builder.cache.toolchain import Record
from builder.task import ServingImage

IMAGE = "sha256:" + "a" * 64
CONTENT = "sha256:" + "c" * 64
H200 = {"index": 0, "uuid": "GPU-0", "name": "NVIDIA H200", "compute_capability": "9.0", "sm_count": 132}
H100 = {**H200, "name": "NVIDIA H100"}


def record(gpu: dict[str, Any] | None = H200, driver: str = "570.1", **factors: str | None) -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    gpus = [dict(gpu), {**gpu, "index": 1, "uuid": "GPU-1"}] if gpu else []
    host = {
        "compute_capability": toolchain.distinct(gpus, "compute_capability"),
        "sm_count": toolchain.distinct(gpus, "sm_count"),
        "gpu_name": toolchain.distinct(gpus, "name"),
        "driver": driver,
        "isa": "x86-64-v4",
    }
    return {
        "schema": 2,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit", **host, **factors},
        "gpus": gpus,
        "sglang": {"version": "0.5.23", "commit": None, "sources": {"triton": "a" * 12}},
        "observed": {"driver": driver, "python": "3.12.3", "problems": []},
    }


def write(root: Path, made: Record, *, image: ServingImage | str = IMAGE, env: dict[str, str] | None = None) -> None:
    memos.write_memo(root, ServingImage(image) if isinstance(image, str) else image, made, env=env or {})


def remembered(root: Path, **seen: Any) -> Record | None:
    wanted: dict[str, Any] = {"mount": "/jit", "gpus": "NVIDIA H200", "driver": "570.1", "isa": None, "env": {}, **seen}
    image = wanted.pop("image", IMAGE)
    return memos.read_memo(root, ServingImage(image) if isinstance(image, str) else image, **wanted)


def test_memo_round_trips_record(tmp_path: Path) -> None:
    assert remembered(tmp_path) is None
    write(tmp_path, record(), env={"HF_HUB_OFFLINE": "1"})
    assert remembered(tmp_path) == record()
    assert remembered(tmp_path, env={"HF_HUB_OFFLINE": "0", "UNRELATED": "x"}) == record()
    assert sorted((tmp_path / "images").iterdir()) == [tmp_path / "images/hosts.json", memos.memo_path(tmp_path, IMAGE)]


def test_memo_holds_no_factor_of_a_machine(tmp_path: Path) -> None:
    write(tmp_path, record())
    text = memos.memo_path(tmp_path, IMAGE).read_text()
    assert not [word for word in ("H200", "570.1", "x86-64", "GPU-0", "132") if word in text]


@pytest.mark.parametrize(
    "seen",
    [
        {"mount": "/other"},
        {"gpus": "NVIDIA H100"},
        {"gpus": ""},
        {"env": {"LD_PRELOAD": "/x.so"}},
        {"image": "sha256:other"},
    ],
)
def test_memo_is_read_only_when_circumstances_equal(tmp_path: Path, seen: dict[str, Any]) -> None:
    write(tmp_path, record())
    assert remembered(tmp_path, **seen) is None


def test_memo_takes_driver_and_cpu_of_its_reader(tmp_path: Path) -> None:
    """A new driver is another family `cuda`, and nothing else."""
    write(tmp_path, record())
    now = remembered(tmp_path, driver="580.2")
    assert now is not None
    before, after = toolchain.family_keys(record()), toolchain.family_keys(now)
    assert {name for name in before if before[name] != after[name]} == {"cuda"}
    older = remembered(tmp_path, isa="x86-64-v3")
    assert older is not None
    before, after = toolchain.family_keys(record()), toolchain.family_keys(older)
    assert {name for name in before if before[name] != after[name]} == {"inductor"}


def test_memo_of_one_machine_serves_another_kind_of_gpu(tmp_path: Path) -> None:
    """As soon as any image was probed there."""
    write(tmp_path, record())
    write(tmp_path, record(H100), image="sha256:other")
    assert remembered(tmp_path, gpus="NVIDIA H100") == record(H100)
    assert remembered(tmp_path) == record()


def test_memo_of_unseen_machine_is_of_the_one_that_wrote_last(tmp_path: Path) -> None:
    write(tmp_path, record())
    write(tmp_path, record(H100), image="sha256:other")
    assert remembered(tmp_path, gpus=None, driver=None) == record(H100)
    memos.write_memo(tmp_path, ServingImage(IMAGE), record(), env={}, known=True)
    assert remembered(tmp_path, gpus=None, driver=None) == record()
    before = (tmp_path / "images/hosts.json").stat()
    memos.write_memo(tmp_path, ServingImage(IMAGE), record(), env={}, known=True)
    assert (tmp_path / "images/hosts.json").stat().st_ino == before.st_ino  # nothing is written without need


def test_memo_ignores_unseen_circumstances(tmp_path: Path) -> None:
    write(tmp_path, record())
    assert remembered(tmp_path, gpus=None, driver=None, mount="/jit/") == record()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (ServingImage(IMAGE, content=CONTENT), ServingImage("sha256:manifest", content=CONTENT)),
        (ServingImage(IMAGE, content=CONTENT), ServingImage(IMAGE)),
        (ServingImage(IMAGE, content=CONTENT, names=("sha256:manifest",)), ServingImage("sha256:manifest")),
        (ServingImage(IMAGE), ServingImage(IMAGE, content=CONTENT)),
        (ServingImage(IMAGE), ServingImage("sha256:config", content=CONTENT, names=(IMAGE,))),
    ],
    ids=["content", "id", "manifest", "seen before its layers", "digest of another store"],
)
def test_memo_is_found_by_every_name(tmp_path: Path, written: ServingImage, read: ServingImage) -> None:
    write(tmp_path, record(), image=written)
    assert remembered(tmp_path, image=read) == record()
    write(tmp_path, record(), image=read)
    (known,) = memos.known_images(tmp_path)
    assert {written.id, read.id} <= known.names


def test_memos_of_several_environments_coexist(tmp_path: Path) -> None:
    preload = {"LD_PRELOAD": "/x.so"}
    write(tmp_path, record(nvcc="a"))
    write(tmp_path, record(nvcc="b"), env=preload)
    write(tmp_path, record(nvcc="c"))
    assert remembered(tmp_path) == record(nvcc="c")
    assert remembered(tmp_path, env=preload) == record(nvcc="b")
    for number in range(40):
        write(tmp_path, record(), env={"PATH": str(number)})
    assert len(json.loads(memos.memo_path(tmp_path, IMAGE).read_text())["memos"]) == 16


@pytest.mark.parametrize(
    "spoil",
    [
        lambda memo: "",
        lambda memo: "\0" * 100,
        lambda memo: "[" * 100_000,
        lambda memo: json.dumps([memo]),
        lambda memo: json.dumps({**memo, "schema": 1}),
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
    write(tmp_path, record())
    path = memos.memo_path(tmp_path, IMAGE)
    path.write_text(spoil(json.loads(path.read_text())))
    assert remembered(tmp_path) is None
    write(tmp_path, record())
    assert remembered(tmp_path) == record()


@pytest.mark.parametrize("image", ["../../evil", "", ".", "a/b:c", "\0", "sha256:é"])
def test_memo_path_stays_in_its_folder(tmp_path: Path, image: str) -> None:
    assert memos.memo_path(tmp_path, image).parent == tmp_path / "images"
    assert not memos.memo_path(tmp_path, image).name.startswith(".")
    assert remembered(tmp_path, image=image, gpus=None, driver=None) is None


def test_memo_replaced_by_fifo_does_not_block(tmp_path: Path) -> None:
    path = memos.memo_path(tmp_path, IMAGE)
    path.parent.mkdir()
    os.mkfifo(path)
    assert remembered(tmp_path) is None
