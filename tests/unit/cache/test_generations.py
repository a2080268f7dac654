"""Generations: complete, valid, and unchanged by whatever happens to the root afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from builder.agent import views
from builder.beneath import Tree
from builder.cache import generations, inventory, layout, removal, view_records
from builder.cache.families import FAMILY
from builder.cache.generations import Omitted
from tests.unit.cache.test_inventory import NAME, deep_gemm_entry, elf, triton_entry

KEY = "0123456789abcdef"
HOUR = 3600.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "jit"
    layout.prepare(root)
    deep_gemm_entry(root / "deep_gemm" / KEY)
    triton_entry(root / "triton" / KEY)
    for family in ("inductor", "flashinfer", "quack", "tvm_ffi", "torch_extensions", "cuda"):
        (root / family / KEY / "ab").mkdir(parents=True)
        (root / family / KEY / "ab" / "one.so").write_bytes(elf())
        (root / family / f"{KEY}.json").write_text("{}")
    (root / "markers" / "task").mkdir()
    (root / "markers" / "task" / "keys.json").write_text("{}")
    return root


def published(root: Path) -> Path:
    generation, omitted = generations.publish(root, check=lambda: None)
    assert omitted == []
    return generations.tree(root, generation)


def held(place: Path) -> dict[str, str]:
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file()
    }


def test_generation_is_a_root_with_every_valid_entry(root: Path) -> None:
    (root / "deep_gemm" / KEY / "tmp" / "1").mkdir(parents=True)
    (root / "deep_gemm" / KEY / "tmp" / "1" / "kernel.cu").write_text("half")
    (deep_gemm_entry(root / "deep_gemm" / KEY, "cache/bad.1") / "kernel.cubin").write_bytes(b"")
    (root / "inductor" / KEY / "link.so").symlink_to("/etc/passwd")
    (root / "theirs").write_text("not ours")
    place = published(root)
    names = set(held(place))
    assert {
        f"deep_gemm/{KEY}/{NAME}/{name}" for name in ("kernel.cu", "kernel.cubin", "meta.json", ".committed")
    } <= names
    assert {f"cuda/{KEY}/ab/one.so", f"quack/{KEY}.json", "markers/task/keys.json", "layout.json"} <= names
    assert not [name for name in names if "bad" in name or "tmp" in name or "link" in name or "theirs" in name]
    for name, family in FAMILY.items():
        before, after = (inventory.scan(family, base / name / KEY) for base in (root, place))
        assert before.valid == after.valid and not after.invalid
    assert layout.prepare(place) == layout.prepare(root)


def test_publish_without_change_makes_no_generation(root: Path) -> None:
    first = published(root)
    os.utime(root / "deep_gemm" / KEY / NAME / ".committed")  # a hit
    assert published(root) == first
    deep_gemm_entry(root / "deep_gemm" / KEY, "cache/new.1")
    second = published(root)
    assert second != first
    assert generations.known(root) == [first.name, second.name]
    Tree(root).remove(f"deep_gemm/{KEY}/cache/new.1")
    assert published(root) == first
    assert generations.known(root) == [second.name, first.name], "the newest is the one that was asked for last"


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_generation_is_unchanged_by_later_writes(root: Path, family: str) -> None:
    place = published(root)
    before = held(place)
    for path in (root / family / KEY).rglob("*"):
        if path.is_file() and not FAMILY[family].renamed:
            path.write_bytes(b"other")
        elif path.is_file():  # as its maker does it
            (path.parent / "tmp.x").write_bytes(b"other")
            (path.parent / "tmp.x").rename(path)
    for marker in (root / "markers").rglob("*.json"):
        (marker.parent / "x").write_text("other")
        (marker.parent / "x").rename(marker)
    assert held(place) == before


def test_generation_shares_no_file_with_the_root(root: Path) -> None:
    """A job that has a family's directory may write into any file there, in place."""
    place = published(root)
    before = held(place)
    inodes = {path.stat().st_ino for path in place.rglob("*") if path.is_file()}
    for path in root.rglob("*"):
        if path.is_file() and place.parent not in path.parents:
            assert path.stat().st_ino not in inodes, path
            path.write_bytes(b"poison")
    assert held(place) == before


def test_generation_of_an_earlier_version_is_not_linked_to(root: Path) -> None:
    """It shared files with the root."""
    first = published(root)
    name = f"deep_gemm/{KEY}/{NAME}/kernel.cubin"
    (first / name).unlink()
    os.link(root / name, first / name)
    deep_gemm_entry(root / "deep_gemm" / KEY, "cache/new.1")
    assert (published(root) / name).stat().st_ino != (root / name).stat().st_ino


def test_generation_links_unchanged_files(root: Path) -> None:
    first = published(root)
    deep_gemm_entry(root / "deep_gemm" / KEY, "cache/new.1")
    second = published(root)
    for name in (f"deep_gemm/{KEY}/{NAME}/kernel.cubin", f"flashinfer/{KEY}/ab/one.so"):
        copies = [base / name for base in (root, first, second)]
        assert len({path.stat().st_ino for path in copies}) == 2
        assert copies[1].stat().st_ino == copies[2].stat().st_ino
        assert copies[0].stat().st_mtime_ns == copies[1].stat().st_mtime_ns, "ninja compares times"


def test_publish_with_family_in_progress_uses_newest_generation(root: Path) -> None:
    with (
        layout.family_lock(root, "quack", KEY).open("w") as lock,
        layout.family_lock(root, "triton", KEY).open("w") as two,
    ):
        fcntl.flock(lock, fcntl.LOCK_SH)
        fcntl.flock(two, fcntl.LOCK_SH)
        generation, omitted = generations.publish(root, check=lambda: None)
        assert omitted == [Omitted("quack", KEY, "another process works in it, and no earlier generation has it")]
        assert not (generations.tree(root, generation) / "quack" / KEY).exists()
        assert (generations.tree(root, generation) / "triton" / KEY).exists(), "it is published by rename"
    whole = published(root)
    with layout.family_lock(root, "quack", KEY).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        (root / "quack" / KEY / "ab" / "one.so").write_bytes(b"\x7fELF half")
        deep_gemm_entry(root / "deep_gemm" / KEY, "cache/new.1")
        place = published(root)
    one = f"quack/{KEY}/ab/one.so"
    assert place != whole and (place / one).stat().st_ino == (whole / one).stat().st_ino


def test_unfinished_generation_is_none(root: Path) -> None:
    half = generations.home(root) / ".0123456789abcdef.77.tmp"
    half.mkdir(parents=True)
    (half / "layout.json").write_text("{}")
    assert generations.known(root) == []
    generations.remove_unfinished(root, generations.FOLDER)
    assert list(generations.home(root).iterdir()) == []

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generations.publish(root, check=stop)
    assert list(generations.home(root).iterdir()) == []


def test_generation_below_a_view_is_kept(root: Path) -> None:
    place = published(root)
    deep_gemm_entry(root / "deep_gemm" / ("f" * 16))
    later = time.time() + 7 * HOUR

    def refusal(family: str, key: str, what: Path | None = None) -> str | None:
        with removal.may_remove(root, family, key, job_max=HOUR, now=later, what=what) as found:
            return found

    assert refusal("triton", KEY) is None
    view = view_records.home(root) / "pr-1"
    (view / "upper").mkdir(parents=True)
    (view / "view.json").write_text(
        f'{{"schema": 1, "view": "pr-1", "generation": "{place.name}", "created": 1.5, "engine": "E"}}'
    )
    said = "the view pr-1 has it below"
    assert refusal("triton", KEY) == said
    assert refusal("triton", KEY, place) == said
    assert refusal("triton", KEY, generations.home(root)) == said
    assert refusal("deep_gemm", "f" * 16) is None, "made after the generation"
    aside = layout.quarantine(root, "triton", KEY).path
    aside.mkdir(parents=True)
    assert refusal("triton", KEY, aside) is None
    (view / "view.json").write_text("garbage")
    assert view_records.records(root) == {"pr-1": None}


class Free:
    """A guard that nobody stops."""

    def acquire(self, path: Path, *, exclusive: bool) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT)

    def check(self) -> None:
        return


def test_generations_without_view_are_removed_for_room(root: Path) -> None:
    used = published(root)
    deep_gemm_entry(root / "deep_gemm" / KEY, "cache/new.1")
    published(root)
    (view_records.home(root) / "pr-1").mkdir(parents=True)
    record = view_records.home(root) / "pr-1" / "view.json"
    record.write_text(f'{{"schema": 1, "view": "pr-1", "generation": "{used.name}", "created": 1.5, "engine": "E"}}')
    guard: Any = Free()
    views.remove_generations(root, guard)
    assert generations.known(root) == [used.name]
    record.write_text("garbage")
    views.remove_generations(root, guard)
    assert generations.known(root) == [used.name], "it is unknown what that view has as its lower layer"
    Tree(root).remove(str(record.parent.relative_to(root)))
    views.remove_generations(root, guard)
    assert generations.known(root) == []
    assert inventory.scan(FAMILY["deep_gemm"], root / "deep_gemm" / KEY).valid


def test_generation_does_not_count_as_use(root: Path) -> None:
    """Neither when it is made nor when it goes: what has been idle for long may go right after."""
    entry = root / "triton" / KEY
    published(root)
    for file in entry.rglob("*.cubin"):
        os.link(file, root / "other-name")
        (root / "other-name").unlink()
    status = next(entry.rglob("*.cubin")).lstat()
    assert status.st_ctime > status.st_mtime
    idle = max(path.lstat().st_mtime for path in (entry, *entry.rglob("*")))
    directories = max(path.lstat().st_ctime for path in (entry, *entry.rglob("*")) if path.is_dir())
    with removal.may_remove(root, "triton", KEY, job_max=HOUR, now=max(idle, directories) + HOUR + 0.001) as refusal:
        assert refusal is None


@pytest.mark.attack(
    "a sparse file of a terabyte lies among the kernels of a key, or a program with the set-user-ID bit of root",
    by="env",
    holds="a generation and a reset have the hole as a hole, in no time and without room, and no such bit",
)
def test_copies_of_sparse_files_are_sparse(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "source"
    target.parent.mkdir()
    with source.open("wb") as file:
        file.write(b"head")
        file.seek(1 << 30)
        file.write(b"middle")
        file.truncate(1 << 40)
    source.chmod(0o4755)
    if source.stat().st_blocks > 1 << 12:
        pytest.skip("this file system has no holes")
    listed = generations._File(source.name, Tree(tmp_path), 1 << 40, source.stat().st_mtime_ns, link=False, dated=True)
    generations._copy(listed, Tree(target.parent))
    copy = target.stat()
    assert (copy.st_size, copy.st_mode & 0o7777, copy.st_blocks <= 1 << 12) == (1 << 40, 0o755, True)
    with target.open("rb") as reader:
        assert reader.read(4) == b"head"
        reader.seek(1 << 30)
        assert reader.read(6) == b"middle"


@pytest.mark.attack(
    "a directory of an entry becomes a link while a generation is made",
    by="env",
    holds="nothing behind it is copied: the generation is made anew",
)
def test_copy_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("x")
    (tmp_path / "entry").symlink_to("elsewhere")
    (tmp_path / "new" / "entry").mkdir(parents=True)
    file = generations._File("entry/secret", Tree(tmp_path), 1, 0, link=False, dated=False)
    with pytest.raises(generations._ChangedError):
        generations._copy(file, Tree(tmp_path, "new"))
    assert list((tmp_path / "new" / "entry").iterdir()) == []
