"""The in-container program between warm-ups: modes sweep, verify and hold, as a process on a directory of this host."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder import events
from builder.cache import layout
from builder.cache.inventory import bad_entries
from builder.cache.layout import family_directories
from tests.program import Program

KEYS = ("0123456789abcdef", "fedcba9876543210")
YOUNG = "(it was written to just now, and may be in progress)"
OLD = (time.time() - 3600.0,) * 2


def aged(path: Path) -> Path:
    """As if nobody had written to it for an hour."""
    for below in (*path.rglob("*"), path) if path.is_dir() else (path,):
        os.utime(below, OLD)
    return path


def file(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def root(program: Program) -> Path:
    """Leftovers of a kill in two keys that no image here has, beside things of other people."""
    root = program.root
    layout.prepare(root)
    for key in KEYS:
        file(root / "deep_gemm" / key / "tmp" / "4711-dead" / "kernel.cu", b"half")
        aged(root / "deep_gemm" / key / "tmp" / "4711-dead")
    file(root / "deep_gemm" / KEYS[0] / "tmp" / "4712-alive" / "kernel.cu", b"half")
    file(root / "torch_extensions" / KEYS[0] / "ext" / "lock")
    aged(root / "torch_extensions" / KEYS[0] / "ext" / "lock")
    aged(file(root / "inductor" / KEYS[1] / "ab" / "cut.so", b"\x7fELF"))
    file(root / "inductor" / KEYS[1] / "ab" / "young.so")
    aged(file(root / "cuda" / KEYS[0] / "index", b""))
    aged(file(root / "deep_gemm" / "not-a-key" / "tmp" / "theirs" / "kernel.cu", b"x"))
    aged(file(root / "theirs" / KEYS[0] / "tmp" / "x", b""))
    (root / "triton").mkdir()
    (root / "triton" / KEYS[0]).symlink_to(root / "theirs")
    return root


def foreign(root: Path) -> list[Path]:
    return [root / "deep_gemm" / "not-a-key", root / "theirs", root / "cuda", root / "triton"]


def contents(paths: list[Path]) -> list[tuple[str, int]]:
    return [(str(below), below.lstat().st_mtime_ns) for path in paths for below in sorted([path, *path.rglob("*")])]


def test_sweep_quarantines_leftovers_and_nothing_else(program: Program, root: Path) -> None:
    before = contents(foreign(root))
    done = program.run(None, mode="sweep")
    assert done.status == 0
    assert {(event.family, event.key, event.path) for event in done.all(events.Quarantined)} == {
        ("deep_gemm", KEYS[0], "tmp/4711-dead"),
        ("deep_gemm", KEYS[1], "tmp/4711-dead"),
        ("torch_extensions", KEYS[0], "ext/lock"),
        ("inductor", KEYS[1], "ab/cut.so"),
    }
    assert (root / "deep_gemm" / KEYS[0] / "tmp" / "4712-alive" / "kernel.cu").exists()
    assert contents(foreign(root)) == before
    assert len(list((root / "aside").glob("*/*"))) == 4
    again = program.run(None, mode="sweep")
    assert (again.status, again.all(events.Quarantined), again.all(events.Removed)) == (0, [], [])


def test_sweep_deletes_old_quarantine_unless_held(program: Program, root: Path) -> None:
    program.run(None, mode="sweep")
    assert program.run(None, mode="sweep", job_max=60.0).all(events.Removed) == []
    with layout.hold_lock(root).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        done = program.run(None, mode="sweep", job_max=0.0)
        assert done.all(events.Removed) == []
        assert {event.why for event in done.all(events.Kept)} == {"a test job holds the cache"}
        assert len(done.all(events.Kept)) == 4
    done = program.run(None, mode="sweep", job_max=0.0)
    assert {event.family for event in done.all(events.Removed)} == {"deep_gemm", "torch_extensions", "inductor"}
    assert list((root / "aside").glob("*/*")) == []


@pytest.mark.parametrize("mode", ["sweep", "verify"])
def test_unusable_root_is_named(program: Program, mode: str) -> None:
    layout.prepare(program.root)
    (program.root / "layout.json").write_text('{"schema": 2, "id": "theirs"}')
    done = program.run(None, mode=mode, repair=True)
    assert done.status == 20
    assert b"has schema 2, this program knows 1" in done.stderr
    assert b"Traceback" not in done.stderr


def test_verify_names_bad_entries_and_moves_none(program: Program, root: Path) -> None:
    before = contents([root])
    done = program.run(None, mode="verify")
    assert done.status == 0
    assert {(event.family, event.key, event.entry): event.problem for event in done.all(events.BadEntry)} == {
        ("inductor", KEYS[1], "ab/cut.so"): "cut.so is cut: 4 bytes, less than an ELF header",
        ("inductor", KEYS[1], "ab/young.so"): f"young.so is empty {YOUNG}",
    }
    assert {event.family: event.entries for event in done.all(events.Checked)}["inductor"] == 2
    assert contents([root]) == before


def test_verify_repair_quarantines_and_reports_the_rest(program: Program, root: Path) -> None:
    done = program.run(None, mode="verify", repair=True)
    assert done.status == 0
    assert ("inductor", "ab/cut.so") in {(event.family, event.path) for event in done.all(events.Quarantined)}
    assert [event.entry for event in done.all(events.BadEntry)] == ["ab/young.so"]
    aged(root / "inductor" / KEYS[1] / "ab" / "young.so")
    assert program.run(None, mode="verify", repair=True).all(events.BadEntry) == []


def test_verify_judges_key_by_its_own_mount(program: Program) -> None:
    def entry(key: str, mount: str | None, recorded: str) -> None:
        place = program.root / "triton" / key
        file(place / "AAAA" / "k.ptx", b"x")
        group = {"child_paths": {"k.ptx": f"{recorded}/triton/{key}/AAAA/k.ptx"}}
        file(place / "AAAA" / "__grp__k.json", json.dumps(group).encode())
        if mount is not None:
            file(program.root / "triton" / f"{key}.json", json.dumps({"factors": {"mount": mount}}).encode())

    layout.prepare(program.root)
    entry("1" * 16, "/jit", "/jit")
    entry("2" * 16, "/other", "/other")
    entry("3" * 16, "/jit", "/other")
    entry("4" * 16, None, "/whatever")
    done = program.run(None, mode="verify")
    assert [event.key for event in done.all(events.BadEntry)] == ["3" * 16]


def test_verify_unlistable_directory_is_bad(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    (place,) = [
        place for place in family_directories(root) if place.family.name == "deep_gemm" and place.key == KEYS[0]
    ]
    (place.path / "cache").mkdir(exist_ok=True)
    assert bad_entries(place, now=0.0) == (0, {})
    monkeypatch.setattr(os, "scandir", refuse)
    problem = "is unreadable: a directory that cannot be listed"
    assert bad_entries(place, now=0.0) == (0, {".": problem, "cache": problem})


def test_hold_is_shared_and_creates_no_root(program: Program, until: Callable[..., None]) -> None:
    done = program.run(None, mode="hold")
    assert done.status == 20
    assert not program.root.exists()
    layout.prepare(program.root)
    held = [program.start(None, mode="hold") for _ in range(2)]
    for one in held:
        until(lambda one=one: one.has(events.Locked), what="the hold")
    with layout.hold_lock(program.root).open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for one in held:
            one.process.send_signal(signal.SIGTERM)
            assert one.end().status == 128 + signal.SIGTERM
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
