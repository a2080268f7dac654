"""The model store: the config.json that a task's model has in it, or what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.cache import model_store


def store_with(root: Path, *, revision: str = "main", commit: str = "0" * 40, config: bytes = b"{}") -> Path:
    model = root / "hub" / "models--org--name"
    (model / "blobs").mkdir(parents=True, exist_ok=True)
    (model / "blobs" / "aa").write_bytes(config)
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").symlink_to("../../blobs/aa")
    (model / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (model / "refs" / revision).write_text(commit)
    return model


def test_config_digest_of_hub_layout(tmp_path: Path) -> None:
    store_with(tmp_path)
    found, problem = model_store.config_digest(tmp_path, "org/name", None)
    assert problem is None
    assert found == model_store.config_digest(tmp_path, "org/name", "main")[0]
    assert found == model_store.config_digest(tmp_path, "org/name", "0" * 40)[0]
    assert len(found or "") == 64
    store_with(tmp_path, revision="refs/pr/1", commit="1" * 40, config=b"{ }")
    assert model_store.config_digest(tmp_path, "org/name", "refs/pr/1") == model_store.config_digest(
        tmp_path, "org/name", "main"
    )
    assert model_store.config_digest(tmp_path, "org/name", "main")[0] != found


def test_config_digest_of_plain_directory(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert model_store.config_digest(tmp_path, "/models/mine", None)[1] is None
    assert model_store.config_digest(tmp_path, "/models/mine/../../x", None)[0] is None
    (tmp_path / "mine" / "config.json").unlink()
    digest, problem = model_store.config_digest(tmp_path, "/models/mine", None)
    assert (digest, problem) == (None, f"{tmp_path}/mine/config.json is missing")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda model: (model / "refs" / "main").unlink(), "has no revision main in the store"),
        (lambda model: (model / "refs" / "main").write_text("../../.."), "has no revision main in the store"),
        (lambda model: (model / "refs" / "main").write_text("1" * 40), "has no revision main in the store"),
        (lambda model: (model / "blobs" / "aa").unlink(), "is missing"),
        (lambda model: (model / "blobs" / "aa").rename(model / "blobs" / "bb"), "is missing"),
        (lambda model: _relink(model, "/etc/hostname"), "is a link that leaves the store"),
        (lambda model: _relink(model, "config.json"), "config.json"),
        (lambda model: os.truncate(model / "blobs" / "aa", 17 << 20), "is too large"),
        (lambda model: model.rename(model.parent / "models--other--name"), "is not in the store"),
    ],
)
def test_config_digest_names_problems(tmp_path: Path, spoil: Callable[[Path], object], problem: str) -> None:
    spoil(store_with(tmp_path))
    digest, text = model_store.config_digest(tmp_path, "org/name", None)
    assert digest is None
    assert problem in (text or "")


def _relink(model: Path, target: str) -> None:
    link = model / "snapshots" / ("0" * 40) / "config.json"
    link.unlink()
    link.symlink_to(target)


@pytest.mark.parametrize(
    "model", ["", "a/../../b", "\0", "a\0b", "/models/\0", "/models/../etc", "x" * 5000, "é/\udcff"]
)
def test_config_digest_of_any_name_stays_in_store(tmp_path: Path, model: str) -> None:
    digest, problem = model_store.config_digest(tmp_path, model, None)
    assert digest is None
    assert problem
