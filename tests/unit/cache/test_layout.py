"""layout.py: the top of a cache root."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from builder.cache import layout


def test_prepare_new_root_keeps_its_id(tmp_path: Path) -> None:
    identity = layout.prepare(tmp_path / "jit")
    assert layout.prepare(tmp_path / "jit") == identity
    assert json.loads((tmp_path / "jit" / "layout.json").read_text())["schema"] == layout.SCHEMA
    assert {path.name for path in (tmp_path / "jit").iterdir()} == {"layout.json", "images", "markers", "locks"}
    assert layout.run_lock(tmp_path / "jit").is_file()


def test_prepare_concurrently_gives_one_id(tmp_path: Path) -> None:
    found: list[str] = []
    barrier = threading.Barrier(8)

    def prepare() -> None:
        barrier.wait()
        found.append(layout.prepare(tmp_path))

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"[]", b'{"schema": "1"}', b"[" * 100_000])
def test_prepare_replaces_broken_layout_file(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "layout.json").write_bytes(garbage)
    assert layout.prepare(tmp_path) == layout.prepare(tmp_path)


def test_prepare_refuses_newer_layout_unchanged(tmp_path: Path) -> None:
    text = '{"schema": 2, "id": "theirs"}'
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(layout.LayoutError, match="schema 2"):
        layout.prepare(tmp_path)
    assert (tmp_path / "layout.json").read_text() == text


def test_prepare_of_read_only_root_is_layout_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(layout.LayoutError, match=r"cannot be written: .*file"):
        layout.prepare(tmp_path / "file")


def test_prepare_never_replaces_lock_files(tmp_path: Path) -> None:
    layout.prepare(tmp_path)
    before = layout.run_lock(tmp_path).stat().st_ino
    layout.prepare(tmp_path)
    assert layout.run_lock(tmp_path).stat().st_ino == before


def test_describe_family_writes_factors_beside_directory(tmp_path: Path) -> None:
    layout.describe_family(tmp_path, "triton", "00ff", {"triton": "3.9.0 ab", "ptxas": None})
    layout.describe_family(tmp_path, "triton", "00ff", {"triton": "another"})
    assert (tmp_path / "triton" / "00ff").is_dir()
    assert json.loads((tmp_path / "triton" / "00ff.json").read_text()) == {
        "schema": 1,
        "family": "triton",
        "key": "00ff",
        "factors": {"triton": "3.9.0 ab", "ptxas": None},
    }


@pytest.mark.parametrize("name", ["etc", "README.md", ".git", "half\nname"])
def test_prepare_refuses_foreign_directory_unchanged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "markers").mkdir()
    with pytest.raises(layout.LayoutError, match=r"no cache root, and not empty .*an empty directory") as caught:
        layout.prepare(tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {name, "markers"}
    (tmp_path / "layout.json").write_text('{"schema": 1, "id": "known"}')
    assert layout.prepare(tmp_path) == "known"


def test_prepare_accepts_fresh_volume_and_killed_first_run(tmp_path: Path) -> None:
    for name in ("lost+found", "images", "markers", "locks", "aside", "deep_gemm", "cuda"):
        (tmp_path / name).mkdir()
    (tmp_path / ".layout.json.abc.tmp").touch()
    (tmp_path / ".layout.json.abc.tmp").with_name("..layout.json.abc.tmp.def.tmp").touch()
    assert layout.prepare(tmp_path) == layout.prepare(tmp_path)


@pytest.mark.parametrize("found", ['{"schema": 99}', '{"schema": 99, "id": 7}', '{"schema": 2.5}'])
def test_prepare_layout_of_later_version_is_never_overwritten(tmp_path: Path, found: str) -> None:
    (tmp_path / "layout.json").write_text(found)
    with pytest.raises(layout.LayoutError, match="Use a newer builder or another cache root"):
        layout.prepare(tmp_path)
    assert (tmp_path / "layout.json").read_text() == found


def test_prepare_closes_folders_that_older_builders_left_open(tmp_path: Path) -> None:
    for name in layout.CLOSED:
        (tmp_path / name).mkdir(mode=0o755)
    layout.prepare(tmp_path)
    assert {(tmp_path / name).stat().st_mode & 0o7777 for name in layout.CLOSED} == {0o700}


def test_prepare_never_follows_a_link_to_close_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (tmp_path / "jit").mkdir()
    (tmp_path / "jit" / "views").symlink_to(elsewhere)
    layout.prepare(tmp_path / "jit")
    assert elsewhere.stat().st_mode & 0o7777 == 0o755
