"""Entries on disk, sound and damaged, and whatever else may lie in a cache root."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.beneath import Tree
from builder.cache import inventory
from builder.cache.entries import MISSING, EntryProblem, ProblemKind, file_problem, problem_of
from builder.cache.families import FAMILIES, FAMILY, Family

DEEP_GEMM, TRITON, INDUCTOR = FAMILY["deep_gemm"], FAMILY["triton"], FAMILY["inductor"]
HASH = "26919c501dcd7178482780b19909a352"
NAME = f"cache/sm90_fp8_gemm_1d2d.{HASH}"
KEY = "T32MIOZEMOB77T7YLOYO2H74KX47NJXKEGJG75KQVAKWSMNJ6VZA"


def elf(size: int = 4096) -> bytes:
    """An ELF file of this size: contents, one section over them and a blank one, then the tables."""
    header, section, segment, count = 64, 64, 56, 2
    sections_at, segments_at = size - count * section - segment, size - segment
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    counts = (0, header, segment, 1, section, count, 1)
    head = ident + struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, segments_at, sections_at, *counts)
    body = sections_at - header
    table = bytes(section) + struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, header, body, 0, 0, 1, 0)
    made = head + bytes(body) + table + struct.pack("<IIQQQQQQ", 1, 5, header, 0, 0, body, 0, 0)
    assert len(made) == size
    return made


def deep_gemm_entry(directory: Path, name: str = NAME, *, old: bool = False) -> Path:
    entry = directory / name
    entry.mkdir(parents=True)
    (entry / "kernel.cu").write_text("// source")
    (entry / "kernel.cubin").write_bytes(elf())
    if not old:
        (entry / "meta.json").write_text('{"config": {}}')
        (entry / ".committed").touch()
    return entry


def triton_entry(directory: Path, key: str = KEY, *, place: str | None = None) -> Path:
    entry = directory / key
    entry.mkdir(parents=True)
    children = {"mm.ttir": b"module {}", "mm.ptx": b".version", "mm.cubin": elf(), "mm.json": b'{"name": "mm"}'}
    for name, data in children.items():
        (entry / name).write_bytes(data)
    where = place if place is not None else str(entry)
    (entry / "__grp__mm.json").write_text(json.dumps({"child_paths": {name: f"{where}/{name}" for name in children}}))
    return entry


def problem(family: Family, directory: Path, name: str) -> str | None:
    """By `check`, which has to say what `scan` says."""
    found = inventory.check(family, directory, name)
    listed = inventory.scan(family, directory).entries.get(name)
    assert found == (MISSING if listed is None else listed.problem)
    return text_of(found)


def text_of(found: EntryProblem | None) -> str | None:
    return None if found is None else found.text


def invalid(family: Family, directory: Path) -> dict[str, str]:
    """The text of each problem."""
    return {name: found.text for name, found in inventory.scan(family, directory).invalid.items()}


# ELF


def test_elf_problem_names_the_fault(tmp_path: Path) -> None:
    path, data = tmp_path / "kernel.cubin", elf(32768)
    assert text_of(file_problem(Tree(path.parent), path.name)) == "kernel.cubin is missing"
    expected = {
        b"": "kernel.cubin is empty",
        b"\x7fELF": "kernel.cubin is cut: 4 bytes, less than an ELF header",
        b"not a cubin": "kernel.cubin is not ELF",
        data[:4096]: f"kernel.cubin is cut: 4096 of {32768 - 56} bytes",
        bytes(4096): "kernel.cubin is not ELF",
        # What a machine that crashed leaves of a file that was not fsynced: the right size, zeros behind.
        data[:4096] + bytes(32768 - 4096): "kernel.cubin is damaged: its section table is blank",
        data[: 32768 - 56] + bytes(56): "kernel.cubin is damaged: its segment table is blank",
        data[:32] + bytes(32): "kernel.cubin is damaged: it has neither sections nor segments",
    }
    for content, text in expected.items():
        path.write_bytes(content)
        assert text_of(file_problem(Tree(path.parent), path.name)) == text


# DeepGEMM


def test_deep_gemm_entry_is_valid(tmp_path: Path) -> None:
    entry = deep_gemm_entry(tmp_path)
    os.utime(entry / ".committed", ns=(5, 1234567891))
    found = inventory.scan(DEEP_GEMM, tmp_path)
    assert found.valid == {NAME}
    assert found.entries[NAME].used_ns == 1234567891
    assert found.bytes == sum(file.stat().st_size for file in entry.iterdir())
    assert problem(DEEP_GEMM, tmp_path, NAME) is None


def test_deep_gemm_old_format_needs_no_stamp(tmp_path: Path) -> None:
    name = f"cache/kernel.fp8_gemm.{HASH}"
    entry = deep_gemm_entry(tmp_path, name, old=True)
    assert inventory.scan(DEEP_GEMM, tmp_path).entries[name].used_ns == 0
    assert problem(DEEP_GEMM, tmp_path, name) is None
    (entry / "kernel.cubin").unlink()
    assert problem(DEEP_GEMM, tmp_path, name) == "kernel.cubin is missing"


Damage = Callable[[Path], None]


def _drop(*names: str) -> Damage:
    def damage(entry: Path) -> None:
        for name in names:
            (entry / name).unlink()

    return damage


def _write(name: str, data: bytes) -> Damage:
    def damage(entry: Path) -> None:
        (entry / name).write_bytes(data)

    return damage


def _replace(name: str, make: Damage) -> Damage:
    def damage(entry: Path) -> None:
        (entry / name).unlink()
        make(entry / name)

    return damage


def _bind(path: Path) -> None:
    # A path may be longer than what a socket's address holds, so it is bound by a relative name.
    before = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_drop(".committed"), "no .committed"),
        (_drop("kernel.cubin"), "kernel.cubin is missing"),
        (_drop(".committed", "kernel.cubin"), "no .committed; kernel.cubin is missing"),
        (_write("kernel.cubin", b""), "kernel.cubin is empty"),
        (_write("kernel.cubin", elf()[:512]), f"kernel.cubin is cut: 512 of {4096 - 56} bytes"),
        (_write("kernel.cubin", bytes(4096)), "kernel.cubin is not ELF"),
        (_drop("kernel.cu"), "kernel.cu is missing"),
        (_write("kernel.cu", b""), "kernel.cu is empty"),
        (_drop("meta.json"), "meta.json is missing"),
        (_write("meta.json", b""), "meta.json is empty"),
        (_write("meta.json", b'{"config": '), "meta.json is not JSON: JSONDecodeError"),
        (_write("meta.json", b"\x80abc"), "meta.json is not JSON: UnicodeDecodeError"),
        (_write("meta.json", b"[" * 200_000), "meta.json is not JSON: RecursionError"),
        (_write("meta.json", b"[]"), "meta.json is not an object"),
        (_replace("kernel.cubin", os.mkfifo), "kernel.cubin is not a regular file"),
        (_replace("kernel.cubin", lambda path: path.mkdir()), "kernel.cubin is not a regular file"),
        (_replace("kernel.cubin", lambda path: path.symlink_to(path)), "kernel.cubin is a symbolic link"),
        (_replace("kernel.cubin", lambda path: path.symlink_to("/etc/passwd")), "kernel.cubin is a symbolic link"),
        (_replace("meta.json", os.mkfifo), "meta.json is not a regular file"),
        (_replace("kernel.cu", os.mkfifo), "kernel.cu is not a regular file"),
        (_replace(".committed", lambda path: path.mkdir()), "no .committed"),
    ],
)
def test_deep_gemm_damage_is_named(tmp_path: Path, damage: Damage, text: str) -> None:
    damage(deep_gemm_entry(tmp_path))
    assert problem(DEEP_GEMM, tmp_path, NAME) == text
    assert invalid(DEEP_GEMM, tmp_path) == {NAME: text}


def test_deep_gemm_socket_in_entry_is_invalid(tmp_path: Path) -> None:
    _replace("kernel.cubin", _bind)(deep_gemm_entry(tmp_path))
    assert problem(DEEP_GEMM, tmp_path, NAME) == "kernel.cubin is not a regular file"


def test_scan_ignores_files_beside_entries(tmp_path: Path) -> None:
    deep_gemm_entry(tmp_path)
    (tmp_path / "tmp" / "uuid").mkdir(parents=True)
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "GEMM_n1_k2_g1.lock").touch()
    (tmp_path / "cache" / "lost+found").mkdir()
    (tmp_path / "cache" / "file.txt").touch()
    (tmp_path / "cache" / f"link.{HASH}").symlink_to(tmp_path / NAME)
    os.mkfifo(tmp_path / "cache" / "fifo.x")
    assert set(inventory.scan(DEEP_GEMM, tmp_path).entries) == {NAME}


def test_check_of_500_entries_reads_little(tmp_path: Path) -> None:
    cubin = elf(1 << 20)
    entry = deep_gemm_entry(tmp_path)
    (entry / "kernel.cubin").write_bytes(cubin)
    begun = time.process_time()
    for _ in range(500):
        assert inventory.check(DEEP_GEMM, tmp_path, NAME) is None
    # Reading the cubins would be half a gigabyte; the aim is 50 ms, the bound leaves room for a busy machine.
    assert time.process_time() - begun < 0.5


# Names from markers


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        ".",
        "..",
        "cache",
        "cache/",
        "cache/..",
        "cache/../cache",
        "/etc/passwd",
        "cache//x",
        "a/b",
        "cache/a/b",
        "cache/\0",
    ],
)
def test_check_refuses_names_outside_the_directory(tmp_path: Path, name: str) -> None:
    deep_gemm_entry(tmp_path)
    if name != "cache":  # as a link it is an entry of its own
        assert text_of(inventory.check(DEEP_GEMM, tmp_path, name)) == "not a name of an entry"
    if name not in ("cache", "a/b", "cache/a/b"):
        assert text_of(inventory.check(INDUCTOR, tmp_path, name)) == "not a name of an entry"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_scan_of_missing_directory_is_empty(tmp_path: Path, family: Family) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for name in ("gone", "file", "fifo"):
        assert inventory.scan(family, tmp_path / name).entries == {}
        assert inventory.sweep(family, tmp_path / name, tmp_path / "aside", now=1e12, older_than=0) == []


# Triton


def test_triton_entry_is_valid(tmp_path: Path) -> None:
    triton_entry(tmp_path)
    assert inventory.scan(TRITON, tmp_path).valid == {KEY}
    assert problem(TRITON, tmp_path, KEY) is None


def test_triton_paths_are_compared_with_the_mount(tmp_path: Path) -> None:
    directory = tmp_path / "triton" / "0123456789abcdef"
    triton_entry(directory, place=f"/jit/triton/0123456789abcdef/{KEY}")
    # From the host, or through the engine, the root lies elsewhere than where the container has it.
    assert inventory.check(TRITON, directory, KEY) is None
    assert inventory.check(TRITON, directory, KEY, mount="/jit/") is None
    assert "another mount path" in (text_of(inventory.check(TRITON, directory, KEY, mount="/cache")) or "")
    assert inventory.scan(TRITON, directory, mount="/cache").valid == frozenset()


def test_triton_relocated_group_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "triton" / "0123456789abcdef"
    triton_entry(directory, place=f"/root/.triton/cache/{KEY}")
    found = problem(TRITON, directory, KEY)
    assert found == (
        f"__grp__mm.json points to /root/.triton/cache/{KEY}/mm.ttir, not here: it was made under another mount path"
    )


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_drop("mm.cubin"), "mm.cubin is missing"),
        (_write("mm.cubin", b""), "mm.cubin is empty"),
        (_write("mm.cubin", elf()[:900]), f"mm.cubin is cut: 900 of {4096 - 56} bytes"),
        (_write("mm.ptx", b""), "mm.ptx is empty"),
        (_drop("__grp__mm.json"), "no __grp__ file"),
        (_write("__grp__mm.json", b"{"), "__grp__mm.json is not JSON: JSONDecodeError"),
        (_write("__grp__mm.json", b"[1]"), "__grp__mm.json has no child_paths"),
        (_write("__grp__mm.json", b'{"child_paths": {}}'), "__grp__mm.json has no child_paths"),
        (_write("__grp__mm.json", b'{"child_paths": {"a": 3}}'), "__grp__mm.json has no path for a"),
        (_write("__grp__mm.json", b'{"child_paths": {"../a": "/a"}}'), "__grp__mm.json has no path for ../a"),
        (_replace("__grp__mm.json", os.mkfifo), "__grp__mm.json is not a regular file"),
        (_replace("mm.ptx", os.mkfifo), "mm.ptx is not a regular file"),
        (_write("launcher.so", b"\x7fELF"), "launcher.so is cut: 4 bytes, less than an ELF header"),
    ],
)
def test_triton_damage_is_named(tmp_path: Path, damage: Damage, text: str) -> None:
    damage(triton_entry(tmp_path))
    assert problem(TRITON, tmp_path, KEY) == text


def elf_bomb(path: Path, sections: int) -> None:
    """A sparse file of 4 kB whose header claims so many sections, and that is as long as they would be."""
    header = bytearray(64)
    header[:16] = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header[0x28:0x30] = (4096).to_bytes(8, "little")
    header[0x3A:0x3C] = (64).to_bytes(2, "little")  # the number is in section 0
    section = bytearray(64)
    section[0x20:0x28] = sections.to_bytes(8, "little")
    path.write_bytes(bytes(header).ljust(4096, b"\0") + bytes(section))
    os.truncate(path, 4096 + sections * 64)


@pytest.mark.attack(
    "an ELF file of 4 kB on disk claims up to 2^33 sections", by="view", holds="it is damaged, in no time and memory"
)
@pytest.mark.parametrize("sections", [16_385, 33_554_430, 1 << 33])
def test_elf_bomb_is_damaged_and_costs_nothing(tmp_path: Path, sections: int) -> None:
    elf_bomb(tmp_path / "kernel.so", sections)
    begun = time.process_time()
    text = problem(INDUCTOR, tmp_path, "kernel.so")
    assert text == f"kernel.so is damaged: its section table has {sections * 64} bytes"
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize("digits", [401, 200_000])
def test_json_number_without_end_is_no_json(tmp_path: Path, digits: int) -> None:
    (deep_gemm_entry(tmp_path) / "meta.json").write_text('{"a": ' + "1" * digits + "}")
    begun = time.process_time()
    assert problem(DEEP_GEMM, tmp_path, NAME) == "meta.json is not JSON: ValueError"
    assert time.process_time() - begun < 0.5


def test_json_file_larger_than_one_ever_is_is_not_read(tmp_path: Path) -> None:
    entry = deep_gemm_entry(tmp_path)
    os.truncate(entry / "meta.json", 1 << 40)
    assert problem(DEEP_GEMM, tmp_path, NAME) == f"meta.json is too large: {1 << 40} bytes"


@pytest.mark.attack(
    "`cache` of DeepGEMM's folder is a link to the markers, or to another job's view",
    by="env",
    holds="nothing behind it is moved; the link itself is quarantined and named",
)
@pytest.mark.parametrize("target", ["markers", "views", "elsewhere"])
def test_linked_folder_of_entries_is_quarantined_itself(tmp_path: Path, target: str) -> None:
    place = tmp_path / "root" / "deep_gemm" / "0123456789abcdef"
    place.mkdir(parents=True)
    behind = tmp_path / "root" / target / "DeepSeek-V3.2-x"
    behind.mkdir(parents=True)
    (place / "cache").symlink_to(behind.parent)
    tree = Tree(tmp_path / "root", "deep_gemm/0123456789abcdef")
    aside = Tree(tmp_path / "root", "aside")
    (moved,) = inventory.sweep(DEEP_GEMM, tree, aside, now=time.time(), older_than=600)
    assert (moved.name, moved.why) == ("cache", "it is a symbolic link, which is not followed")
    assert behind.is_dir() and not (place / "cache").is_symlink()
    assert [path.is_symlink() for path in (tmp_path / "root" / "aside").iterdir()] == [True]


def test_entry_behind_a_linked_key_is_invalid_and_named(tmp_path: Path) -> None:
    deep_gemm_entry(tmp_path / "outside")
    (tmp_path / "root" / "deep_gemm").mkdir(parents=True)
    (tmp_path / "root" / "deep_gemm" / "0123456789abcdef").symlink_to(tmp_path / "outside")
    found = inventory.check(DEEP_GEMM, Tree(tmp_path / "root", "deep_gemm/0123456789abcdef"), NAME)
    assert found is not None and found.text == "it is a symbolic link, which is not followed"


def test_entry_nested_too_deeply_is_quarantined_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "files" / "/".join(["d"] * 300)).mkdir(parents=True)
    (tmp_path / "files" / "good.py").write_text("x")
    moved = inventory.sweep(INDUCTOR, tmp_path / "files", tmp_path / "aside", now=time.time() + 9, older_than=1)
    assert [each.why for each in moved] == ["is nested too deeply"]
    assert set(inventory.scan(INDUCTOR, tmp_path / "files").entries) == {"good.py"}


def test_entry_with_files_without_end_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.cache.entries._FILES", 20)
    entry = triton_entry(tmp_path)
    for number in range(21):
        (entry / f"{number}.json").write_text("{}")
    assert problem(TRITON, tmp_path, KEY) == "it holds more than 20 files"


#: Families of whose programs it is not known that they leave such a file.
OTHERS = [each for each in FAMILIES if each.claimable and "*.tmp" not in dict(each.leftovers)]


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_temporary_file_older_than_any_job_is_a_leftover(tmp_path: Path, family: Family) -> None:
    place, hour = tmp_path / "family", 3600.0
    (place / "fp").mkdir(parents=True)
    (place / "fp" / "sha.o.tmp").write_text("half")
    (place / "fp" / "x.lock").touch()

    def swept(later: float, job_max: float | None) -> list[str]:
        now = time.time() + later
        found = inventory.sweep(family, place, tmp_path / "aside", now=now, older_than=600, job_max=job_max)
        return [each.name for each in found]

    assert swept(5 * hour, 6 * hour) == [] == swept(7 * hour, None)
    assert swept(7 * hour, 6 * hour) == ["fp/sha.o.tmp"]
    assert (place / "fp" / "x.lock").exists()


PRETENDERS = ("is unreadable", "missing", "no __grp__ file")


@pytest.mark.parametrize("name", PRETENDERS)
def test_problem_is_invalid_whatever_its_file_is_called(tmp_path: Path, name: str) -> None:
    """A job may name a file like the text of another state: it is quarantined all the same, and at once."""
    entry = triton_entry(tmp_path)
    (entry / f"{name}.so").write_bytes(elf()[:99])
    (entry / f"__grp__{name}.json").write_bytes(b"{")
    found = inventory.check(TRITON, tmp_path, KEY)
    assert found is not None and found.kind is ProblemKind.INVALID and name in found.text
    assert not inventory.may_be_in_progress(TRITON, tmp_path, KEY, found, now=time.time())
    assert inventory.sweep(TRITON, tmp_path, tmp_path.parent / "aside", now=time.time(), older_than=600)


@pytest.mark.parametrize("name", PRETENDERS)
def test_file_entry_is_quarantined_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / f"{name}.so").write_bytes(elf()[:99])
    moved = inventory.sweep(INDUCTOR, tmp_path / "files", tmp_path / "aside", now=time.time() + 9, older_than=1)
    assert [each.name for each in moved] == [f"{name}.so"]


def test_triton_launcher_needs_no_group(tmp_path: Path) -> None:
    for name, file, data in (("LAUNCHER", "__triton_launcher.so", elf()), ("TUNED", "mm.autotune.json", b"{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(data)
    assert inventory.scan(TRITON, tmp_path).valid == {"LAUNCHER", "TUNED"}
    (tmp_path / "LAUNCHER" / "__triton_launcher.so").write_bytes(elf()[:100])
    assert set(inventory.scan(TRITON, tmp_path).invalid) == {"LAUNCHER"}


def test_triton_key_in_progress_is_no_entry(tmp_path: Path) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BEGUN" / "tmp.pid_7_abc").mkdir(parents=True)
    (tmp_path / "BEGUN" / "tmp.pid_7_abc" / "mm.ttir").touch()
    assert inventory.scan(TRITON, tmp_path).entries == {}
    assert problem(TRITON, tmp_path, "BEGUN") == MISSING.text


# Plain files


def test_scan_tells_entries_from_other_files(tmp_path: Path) -> None:
    good = {"fxgraph/ab/abcd": b"x", "ab/mod.py": b"x", "ab/k.so": elf(), "o/k.o": elf(2048), "g/plain-elf": elf()}
    for name, data in good.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for name in (
        "a.lock",
        "lock",
        "locks/x",
        "tmp/y",
        ".1.2.tmp",
        ".staging-x/k.so",
        "ab/tmp.pid_1/x",
        ".nfs0001",
        ".x.tmp.o",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "file").symlink_to(tmp_path / "ab" / "mod.py")
    os.mkfifo(tmp_path / "fifo")
    _bind(tmp_path / "socket")
    assert inventory.scan(INDUCTOR, tmp_path).valid == set(good)
    assert invalid(INDUCTOR, tmp_path) == {}
    assert inventory.scan(INDUCTOR, tmp_path).bytes == sum(map(len, good.values()))


def test_file_entry_damage_is_named(tmp_path: Path) -> None:
    damaged = {"empty.py": b"", "a/cut.so": elf()[:99], "cut-elf": elf()[:2000], "text.o": b"int main"}
    for name, data in damaged.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert invalid(INDUCTOR, tmp_path) == {
        "empty.py": "empty.py is empty",
        "a/cut.so": f"cut.so is cut: 99 of {4096 - 56} bytes",
        "cut-elf": f"cut-elf is cut: 2000 of {4096 - 56} bytes",
        "text.o": "text.o is not ELF",
    }
    for name in damaged:
        assert problem(INDUCTOR, tmp_path, name) is not None


def test_scan_handles_undecodable_names(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9\xff.so"
    Path(os.fsdecode(raw)).write_bytes(elf()[:70])
    (found,) = inventory.scan(INDUCTOR, tmp_path).entries.values()
    assert os.fsencode(found.name) == b"caf\xe9\xff.so"
    assert (text_of(found.problem) or "").encode() == f"caf\\udce9\\udcff.so is cut: 70 of {4096 - 56} bytes".encode()
    # Through a marker's JSON and back.
    name = json.loads(json.dumps(found.name))
    assert problem(INDUCTOR, tmp_path, name) == text_of(found.problem)
    assert inventory.sweep(INDUCTOR, tmp_path, tmp_path / "aside", now=time.time() + 9, older_than=1)
    assert not Path(os.fsdecode(raw)).exists()


def test_unreadable_directory_is_one_invalid_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.py").write_text("x")
    (tmp_path / "closed" / "x.py").write_text("x")
    real = os.scandir

    def refusing(fd: int) -> object:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("closed"):  # noqa: PTH115
            raise PermissionError(13, "Permission denied")
        return real(fd)

    monkeypatch.setattr(os, "scandir", refusing)
    found = inventory.scan(INDUCTOR, tmp_path)
    assert found.valid == {"open.py"}
    assert invalid(INDUCTOR, tmp_path) == {"closed": "is unreadable: a directory that cannot be listed"}
    # Nobody can tell how old it is, nor that it is bad.
    assert inventory.sweep(INDUCTOR, tmp_path, tmp_path.parent / "aside", now=1e12, older_than=0) == []


def test_unreadable_files_are_invalid_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep_gemm_entry(tmp_path)

    real = os.open

    def refusing(path: str, *arguments: Any, **options: Any) -> int:
        if path.startswith("/proc/self/fd/"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert problem(DEEP_GEMM, tmp_path, NAME) == (
        "kernel.cubin is unreadable: Permission denied; meta.json is unreadable: Permission denied"
    )
    assert inventory.sweep(DEEP_GEMM, tmp_path, tmp_path / "aside", now=1e12, older_than=0) == []


# Differences


def test_added_and_used_entries_by_stamp(tmp_path: Path) -> None:
    names = [f"cache/k.{number:032x}" for number in range(4)]
    for name in names[:3]:
        os.utime(deep_gemm_entry(tmp_path, name) / ".committed", ns=(1, 1))
    (tmp_path / names[2] / "kernel.cubin").unlink()
    before = inventory.scan(DEEP_GEMM, tmp_path)
    os.utime(tmp_path / names[1] / ".committed", ns=(2, 2))  # a hit
    (tmp_path / names[2] / "kernel.cubin").write_bytes(elf())  # healed
    deep_gemm_entry(tmp_path, names[3])
    after = inventory.scan(DEEP_GEMM, tmp_path)
    assert inventory.added(before, after) == {names[2], names[3]}
    assert inventory.used(before, after) == {names[1], names[2], names[3]}
    assert inventory.added(after, after) == inventory.used(after, after) == set()


def test_recompiled_entry_differs_and_hit_does_not(tmp_path: Path) -> None:
    places = {DEEP_GEMM: tmp_path / "deep_gemm", TRITON: tmp_path / "triton", FAMILY["flashinfer"]: tmp_path / "fi"}
    kernel, group = deep_gemm_entry(places[DEEP_GEMM]), triton_entry(places[TRITON])
    cached = places[FAMILY["flashinfer"]] / "cached_ops" / "page"
    cached.mkdir(parents=True)
    for name in ("page.ptx", "build.ninja", ".ninja_log", ".ninja_deps"):
        (cached / name).write_text("x")
    (cached.parents[1] / "flashinfer_jit.log").write_text("x")
    before = {family: inventory.scan(family, place) for family, place in places.items()}

    def again(*touched: Path) -> set[str]:
        for path in touched:
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
        found = {family: inventory.scan(family, place) for family, place in places.items()}
        return {name for family in places for name in inventory.recompiled(before[family], found[family])}

    (group / "mm.json.lock").touch()
    assert again() == set()
    traces = (cached / ".ninja_log", cached / ".ninja_deps", cached.parents[1] / "flashinfer_jit.log")
    assert again(kernel / ".committed", kernel, group, group / "mm.json.lock", *traces) == set()
    assert again(cached / "page.ptx") == {"cached_ops/page/page.ptx"}
    assert again(kernel / "kernel.cubin", group / "mm.cubin") == {"cached_ops/page/page.ptx", NAME, KEY}


def test_saved_tunings_are_not_recompiled(tmp_path: Path) -> None:
    path = tmp_path / "flashinfer" / "autotune" / "rank_tp0_pp0_dp0.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    before = inventory.scan(FAMILY["sglang_cache"], tmp_path)
    os.utime(path, ns=(1, 1))
    assert before.valid
    assert inventory.recompiled(before, inventory.scan(FAMILY["sglang_cache"], tmp_path)) == set()


def test_used_entries_without_stamps_are_all_valid_ones(tmp_path: Path) -> None:
    triton_entry(tmp_path)
    triton_entry(tmp_path, "BROKEN").joinpath("mm.cubin").unlink()
    found = inventory.scan(TRITON, tmp_path)
    assert inventory.added(found, found) == set()
    assert inventory.used(found, found) == {KEY}


# The sweep


def swept(family: Family, directory: Path, *, age: float = 100.0, older_than: float = 10.0) -> dict[str, str]:
    found = inventory.sweep(family, directory, directory.parent / "aside", now=time.time() + age, older_than=older_than)
    return {each.name: f"{each.why} ({each.stays})" if each.stays else each.why for each in found}


def test_sweep_quarantines_leftovers_and_bad_entries(tmp_path: Path) -> None:
    directory = tmp_path / "key"
    deep_gemm_entry(directory)
    bad = f"cache/bad.{HASH}"
    deep_gemm_entry(directory, bad).joinpath(".committed").unlink()
    (directory / "tmp" / "1234").mkdir(parents=True)
    (directory / "tmp" / "1234" / "kernel.cu").write_text("x")
    (directory / "locks").mkdir()
    (directory / "locks" / "x.lock").touch()
    assert swept(DEEP_GEMM, directory) == {
        bad: "no .committed",
        "tmp/1234": "build abandoned by a process that was killed",
    }
    assert inventory.scan(DEEP_GEMM, directory).valid == {NAME}
    assert not (directory / "tmp" / "1234").exists()
    assert (directory / "locks" / "x.lock").exists()
    # Nothing is deleted: both lie aside, whole.
    assert sorted(len(list(kept.iterdir())) for kept in (tmp_path / "aside").iterdir()) == [1, 3]
    assert swept(DEEP_GEMM, directory) == {}


def test_sweep_keeps_entry_in_progress(tmp_path: Path) -> None:
    directory = tmp_path / "key"
    build = directory / "tmp" / "1234"
    build.mkdir(parents=True)
    (build / "kernel.cu").write_text("x")
    now = time.time()
    for path in (build, build.parent):
        os.utime(path, (now - 1000, now - 1000))
    # The directory is old, the file in it is new.
    assert inventory.sweep(DEEP_GEMM, directory, tmp_path / "aside", now=now, older_than=100) == []
    os.utime(build / "kernel.cu", (now - 1000, now - 1000))
    assert len(inventory.sweep(DEEP_GEMM, directory, tmp_path / "aside", now=now, older_than=100)) == 1
    assert not (tmp_path / "aside" / "kernel.cu").exists()


def test_sweep_quarantines_damage_at_once_if_published_whole(tmp_path: Path) -> None:
    directory = tmp_path / "key"
    deep_gemm_entry(directory / "d").joinpath("kernel.cubin").write_bytes(b"")  # a hit, so that its stamp stays fresh
    triton_entry(directory / "t").joinpath("mm.cubin").write_bytes(elf()[:99])
    leaf = directory / "j" / "cuda" / "mod" / "build-1" / "deps-2"
    leaf.mkdir(parents=True)
    (leaf / "mod.so").write_bytes(b"")
    for family, place in ((DEEP_GEMM, "d"), (TRITON, "t"), (FAMILY["sglang_jit"], "j")):
        assert len(swept(family, directory / place, age=0.0, older_than=600.0)) == 1, family.name


def test_sweep_quarantines_in_place_damage_only_when_old(tmp_path: Path) -> None:
    directory = tmp_path / "key"
    triton_entry(directory / "t").joinpath("__grp__mm.json").unlink()
    (directory / "f").mkdir()
    (directory / "f" / "op.so").write_bytes(elf()[:99])
    for family, place in ((TRITON, "t"), (FAMILY["flashinfer"], "f")):
        assert swept(family, directory / place, age=0.0, older_than=600.0) == {}, family.name
        assert len(swept(family, directory / place, age=700.0, older_than=600.0)) == 1, family.name


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("triton", "KEY/tmp.pid_1_x/mm.ttir"),
        ("inductor", "ab/.1.2.tmp"),
        ("inductor", "triton/0/tmp.pid_1_x/mm.ttir"),
        ("flashinfer", "trtllm_deep_gemm/tmp/x/kernel.cu"),
        ("sglang_jit", "cuda/mod/build-1/.staging-x/mod.so"),
        ("cute_dsl", "aot/v/.abc.tmp.o"),
        ("tilelang", "tmp/x/kernel.cu"),
        ("torch_extensions", "py312_cu130/ext/lock"),
        ("sglang_cache", "torch_compile_cache/h/rank_0_0/x.tmp"),
        # Written in place, killed half-way.
        ("flashinfer", ".cache/flashinfer/0.7.2/90a/cached_ops/op/op.so"),
        ("tvm_ffi", "mod_0/main.o"),
        ("quack", "fp/sha.o"),
    ],
)
def test_sweep_of_each_family_removes_its_leftovers(tmp_path: Path, family: str, path: str) -> None:
    file = tmp_path / "key" / path
    file.parent.mkdir(parents=True)
    file.write_bytes(elf()[:100])
    assert len(swept(FAMILY[family], tmp_path / "key")) == 1
    assert not file.exists()


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("flashinfer", ".cache/flashinfer/0/90a/cached_ops/tmp/op.lock"),
        ("tvm_ffi", "mod_0/lock"),
        ("quack", "fp/sha.lock"),
    ],
)
def test_sweep_never_moves_lock_files(tmp_path: Path, family: str, path: str) -> None:
    file = tmp_path / "key" / path
    file.parent.mkdir(parents=True)
    file.touch()
    assert swept(FAMILY[family], tmp_path / "key") == {}
    assert inventory.scan(FAMILY[family], tmp_path / "key").entries == {}


def test_sweep_moves_published_leaf_whole(tmp_path: Path) -> None:
    leaf = tmp_path / "key" / "cuda_90a" / "mod" / "build-1" / "deps-2"
    leaf.mkdir(parents=True)
    (leaf / "mod.so").write_bytes(elf()[:100])
    (leaf / "sgl_deps.json").write_text("[]")
    moved = swept(FAMILY["sglang_jit"], tmp_path / "key")
    assert moved == {"cuda_90a/mod/build-1/deps-2": f"mod.so: mod.so is cut: 100 of {4096 - 56} bytes"}
    assert not leaf.exists()


def test_sweep_leaves_driver_cache_alone(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "index").touch()
    assert swept(FAMILY["cuda"], tmp_path / "key") == {}


def test_sweep_reports_failed_move(tmp_path: Path) -> None:
    directory = tmp_path / "key"
    deep_gemm_entry(directory).joinpath(".committed").unlink()
    (tmp_path / "aside").touch()
    assert swept(DEEP_GEMM, directory) == {NAME: "no .committed (it cannot be moved: File exists)"}
    assert (directory / NAME).exists()


def test_sweep_same_name_twice_keeps_both(tmp_path: Path) -> None:
    for _ in range(2):
        deep_gemm_entry(tmp_path / "key").joinpath("kernel.cubin").unlink()
        assert len(swept(DEEP_GEMM, tmp_path / "key")) == 1
    assert len(list((tmp_path / "aside").iterdir())) == 2


def test_host_specific_files_are_removed(tmp_path: Path) -> None:
    family = FAMILY["sglang_cache"]
    (tmp_path / "gpu_p2p_access_cache_for_0,1.json").write_text("{}")
    (tmp_path / "gpu_p2p_access_cache_for_0.json").symlink_to("/etc/passwd")
    (tmp_path / "gpu_p2p_access_cache_for_dir").mkdir()
    (tmp_path / "torch_compile_cache").mkdir()
    (tmp_path / "torch_compile_cache" / "x.py").write_text("x")
    assert set(inventory.scan(family, tmp_path).entries) == {"torch_compile_cache/x.py"}
    assert inventory.remove_host_specific(family, tmp_path) == [
        "gpu_p2p_access_cache_for_0,1.json",
        "gpu_p2p_access_cache_for_0.json",
    ]
    assert Path("/etc/passwd").exists()
    assert inventory.remove_host_specific(family, tmp_path / "gone") == []
    shutil.rmtree(tmp_path / "gpu_p2p_access_cache_for_dir")
    assert inventory.remove_host_specific(family, tmp_path) == []


def test_what_no_compiler_made_is_no_entry(tmp_path: Path) -> None:
    for name in (
        "ple/table.bin",
        "model_streamer/x/config.json",
        "gpu_p2p_access_cache_for_0.json",
        "torch/ple/k.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert set(inventory.scan(FAMILY["sglang_cache"], tmp_path).entries) == {"torch/ple/k.json"}


@pytest.mark.attack(
    "an entry of Triton's has thousands of groups, each of which lists thousands of files",
    by="env",
    holds="it is damaged by the number of its groups, or of its files, before any of them is read",
)
@pytest.mark.parametrize(("groups", "files", "said"), [(100, 100, "16 groups"), (2, 300, "256 files")])
def test_entry_of_countless_files_is_damaged_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int, files: int, said: str
) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    for number in range(files):
        (entry / f"k{number}.json").write_text("{}")
    for number in range(groups):
        (entry / f"__grp__k{number}.json").write_text("{}")
    monkeypatch.setattr(Tree, "read_json", None)
    found = problem_of(FAMILY["triton"], Tree(tmp_path), "entry", None)
    assert found is not None and said in found.text
