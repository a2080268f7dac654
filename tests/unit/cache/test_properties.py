"""Whatever the disk holds as a marker, memo or entry is read as a value or refused with a reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder.beneath import Tree
from builder.cache import coverage, inventory, marker_files, marker_format, marker_writing, markers, memos, toolchain
from builder.cache.entries import ProblemKind, file_problem
from builder.cache.families import FAMILIES, FAMILY, Family, directory
from builder.cache.marker_files import folder_name
from builder.cache.marker_format import Marker, Observed
from builder.cache.toolchain import Record
from builder.task import ServingImage, Task
from tests.strategies import (
    EXAMPLES,
    FUZZ,
    ODD_TEXTS,
    damaged,
    documents,
    harmless,
    mutated,
    texts,
    written,
)

#: Documents are cut at every third byte; at every byte in a long run.
STEP = 1 if EXAMPLES > 100 else 3

pytestmark = pytest.mark.timeout(120 + EXAMPLES * 0.2)


# --- markers and memos ---

TASK = Task(
    label="DeepSeek-V3 tp8",
    model="deepseek-ai/DeepSeek-V3",
    recipe="serve",
    argv=("--tp", "8", "--trust-remote-code"),
    env={"SGLANG_A": "1", "PATH": "/bin"},
    gpus=8,
)
ENTRIES = {"deep_gemm": ["cache/gemm.1", "cache/gemm.2"], "inductor": ["a/b.py", "a/c.so"]}

#: Every word that a reason may begin with, and how it goes on.
REASONS = re.compile(
    r"no-marker|unverified|marker-unreadable: markers/.+: .+|coverage: .+ was .+ is .+|(?:build|age): proven .+"
    r"|compile: [a-z_]+ is compiled anew \(.+ → .+\).*"
    r"|entries: \d+ missing, \d+ invalid \(first: .+\)"
)


#: Factors of the machine, as its GPU below has them.
HOST = {"compute_capability": "9.0", "driver": "570.1", "gpu_name": "NVIDIA H200", "isa": "x86-64-v4", "sm_count": None}


def record(**factors: str | None) -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    return {
        "schema": 2,
        "factors": {**{name: f"{name} 1\nline two" for name in names}, "mount": "/jit", **HOST, **factors},
        "gpus": [{"index": 0, "uuid": "GPU-1", "name": "NVIDIA H200", "compute_capability": "9.0"}],
        "sglang": {"version": "0.5.23", "commit": "abc", "sources": None},
        "variables": {},
        "observed": {"driver": "570.1", "python": "3.12.3", "problems": []},
    }


def marker(made: Record | None = None, **change: Any) -> Marker:
    given: dict[str, Any] = {
        "record": made or record(),
        "config_digest": "c" * 64,
        "claims": list(ENTRIES),
        "entries": ENTRIES,
        "proof": "verified",
        "second_pass_added": 0,
        "shapes": [],
        "observed": Observed(image="sha256:1"),
    }
    return marker_writing.build(change.pop("task", TASK), **{**given, **change})


def document() -> Any:
    """The marker as its file holds it."""
    return json.loads(marker_format.encoded(marker()))


# A 32-bit ELF header and a table of one section, which is the table itself: the smallest file that is whole.
ELF32 = struct.pack("<4s12sHHIIIIIHHHHHH", b"\x7fELF", bytes([1, 1, 1]), 2, 190, 1, 0, 0, 52, 0, 52, 0, 0, 40, 1, 0)
ELF32 += struct.pack("<IIIIIIIIII", 0, 1, 0, 0, 52, 40, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache root with the entries of a marker, and a place for it."""
    root = tmp_path_factory.mktemp("root")
    for family, names in ENTRIES.items():
        for name in names:
            entry = Path(directory(str(root), family, toolchain.family_key(record(), family))) / name
            (entry if family == "deep_gemm" else entry.parent).mkdir(parents=True, exist_ok=True)
            if family == "deep_gemm":
                for file, data in (("kernel.cu", b"//"), ("meta.json", b"{}"), (".committed", b"")):
                    (entry / file).write_bytes(data)
                (entry / "kernel.cubin").write_bytes(ELF32)
            else:
                entry.write_bytes(ELF32)
    made = marker()
    marker_writing.publish(root, made)
    # Where a marker of another coverage lies: the nearest one, when there is none of this.
    (root / "markers" / f"DeepSeek-V3-tp8-{'0' * 12}").mkdir()
    assert judge(root).state == "warm"
    return root


def marker_path(root: Path) -> Path:
    made = marker()
    return root / "markers" / folder_name(TASK.label, made.coverage) / f"{toolchain.digest(made.keys)}.json"


def judge(root: Path, made: Record | None = None, **change: Any) -> markers.Judgement:
    return markers.judge(root, TASK, record=made or record(), config_digest="c" * 64, **change)


def assert_judged(judgement: markers.Judgement) -> None:
    """Warm, or cold for a reason that has a name; everything in it can be shown."""
    assert harmless(judgement.reason), judgement.reason
    assert harmless(judgement.path or "")
    assert (judgement.state == "warm") == (judgement.reason == "")
    assert judgement.state in ("warm", "cold")
    assert judgement.state == "warm" or REASONS.fullmatch(judgement.reason), judgement.reason
    assert len(judgement.reason) < 1500
    for row in judgement.differences:
        assert len(row) == 3
        for cell in row:
            assert isinstance(cell, str)
            assert cell
            assert harmless(cell.replace("\n", " ")), cell


def judge_file(root: Path, data: bytes) -> markers.Judgement:
    """Every way a file is read as a marker: as the task's own, by another toolchain, and as the nearest."""
    path = marker_path(root)
    nearest = root / "markers" / f"DeepSeek-V3-tp8-{'0' * 12}" / "x.json"
    nearest.unlink(missing_ok=True)
    path.write_bytes(data)
    own = judge(root)
    for judgement in (own, judge(root, strict=True), judge(root, record(deep_gemm="2\n\n", torch=None, libc=""))):
        assert_judged(judgement)
    path.unlink()
    nearest.write_bytes(data)
    assert_judged(judge(root))
    read = marker_files.read(nearest)
    for family, key in read.keys.items() if read else ():
        assert FAMILY[family].claimable
        assert re.fullmatch(r"[0-9a-f]{16}", key)
    return own


def truth(root: Path, data: bytes) -> bool:
    """Whether a marker file vouches for the task, by the letter of the rules."""
    try:
        found = json.loads(data)
        right = document()
        return bool(
            type(found["schema"]) is int
            and found["schema"] in (1, 2)
            and found["coverage"] == right["coverage"]
            and isinstance(found["proof"], str)
            and all(FAMILY[family].claimable for family in found["claims"])
            and all(found["keys"][family] == right["keys"].get(family) for family in found["claims"])
            and all(set(found["entries"][family]) <= set(ENTRIES[family]) for family in found["claims"])
            and all(isinstance(found["factors"][family], dict) for family in found["claims"])
        )
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


@FUZZ
@given(st.one_of(st.binary(max_size=60), documents.flatmap(written)))
def test_marker_garbage_is_unreadable(root: Path, data: bytes) -> None:
    assert judge_file(root, data).state == "cold"


def test_marker_cut_anywhere_is_unreadable(root: Path) -> None:
    data = json.dumps(document()).encode()
    path = marker_path(root)
    for size in range(0, len(data), STEP):
        path.write_bytes(data[:size])
        judgement = judge(root)
        assert_judged(judgement)
        assert judgement.reason.startswith("marker-unreadable: "), size


@FUZZ
@given(
    mutated(document(), [(), (), *((name,) for name in ("claims", "keys", "entries", "factors", "coverage", "proof"))])
    .flatmap(written)
)  # fmt: skip
@example(json.dumps({**document(), "keys": {"deep_gemm": 1234567890123456, "inductor": 1234567890123456}}).encode())
@example(json.dumps({**document(), "proof": "\x1b[31m\ud800"}).encode())
@example(json.dumps({**document(), "entries": {"deep_gemm": ["cache/a\nb"], "inductor": ["\udcff"]}}).encode())
@example(json.dumps({**document(), "coverage": {"": 1, "\x1b[31m\n": 2, "argv": "\n"}}).encode())
@example(json.dumps({**document(), "schema": "@deep@"}).encode().replace(b'"@deep@"', b"[" * 985 + b"]" * 985))
def test_marker_mutated_is_cold_or_true(root: Path, data: bytes) -> None:
    judgement = judge_file(root, data)
    if judgement.state == "warm":
        assert truth(root, data)


@FUZZ
@given(damaged(json.dumps(document()).encode()))
def test_marker_damaged_bytes_are_cold_or_true(root: Path, data: bytes) -> None:
    judgement = judge_file(root, data)
    if judgement.state == "warm":
        assert truth(root, data)


IMAGE = "sha256:" + "a" * 64


def memo() -> dict[str, Any]:
    return {
        "schema": 2,
        "image": IMAGE,
        "names": [IMAGE],
        "memos": [
            {"table": 1, "env": {"PATH": "/bin"}, "record": record()},
            {"table": 1, "env": {}, "record": record()},
        ],
    }


def read_memo(root: Path, data: bytes) -> Record | None:
    memos.write_memo(root, ServingImage("sha256:other"), record(), env=TASK.env)  # which tells of this machine
    path = memos.memo_path(root, IMAGE)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    image = ServingImage(IMAGE)
    seen: dict[str, Any] = {"mount": "/jit", "gpus": "NVIDIA H200", "driver": "570.1", "isa": None, "env": TASK.env}
    found = memos.read_memo(root, image, **seen)
    if found is not None:
        assert found["factors"]["mount"] == "/jit"
        assert all(re.fullmatch(r"[0-9a-f]{16}", key) for key in toolchain.family_keys(found).values())
        assert_judged(judge(root, found))
        # What one reads another writes beside its own.
        memos.write_memo(root, image, record(), env={})
        assert memos.read_memo(root, image, **seen) is not None
    return found


@FUZZ
@given(st.one_of(st.binary(max_size=60), documents.flatmap(written)))
def test_memo_garbage_is_none(root: Path, data: bytes) -> None:
    assert read_memo(root, data) is None


@FUZZ
@given(mutated(memo(), [(), ("memos", 0), ("memos", 0, "record")]).flatmap(written))
@example(json.dumps(memo()).replace('"version"', '"versio"').encode())
def test_memo_mutated_is_none_or_record(root: Path, data: bytes) -> None:
    read_memo(root, data)


@FUZZ
@given(damaged(json.dumps(memo()).encode()))
def test_memo_damaged_bytes_are_none_or_record(root: Path, data: bytes) -> None:
    read_memo(root, data)


def test_memo_cut_anywhere_is_none(root: Path) -> None:
    data = json.dumps({**memo(), "memos": memo()["memos"][:1]}).encode()
    assert read_memo(root, data) == record()
    for size in range(0, len(data), STEP):
        assert read_memo(root, data[:size]) is None, size


@FUZZ
@given(st.dictionaries(texts, documents, max_size=4), st.dictionaries(texts, documents, max_size=4))
def test_differences_of_any_factors_are_printable(was: dict[str, Any], now: dict[str, Any]) -> None:
    for name, before, after in coverage.differences(was, now):
        assert harmless(name)
        for text in coverage.brief(before, after):
            assert text
            assert harmless(text)
            assert len(text) <= 102


# --- entries and ELF files ---


def elf(*, wide: bool, order: str) -> bytes:
    """An ELF file of one blank section, one with contents and one without, and one segment."""
    header, section, segment, size = (64, 64, 56, 64) if wide else (52, 40, 32, 64)
    word = "Q" if wide else "I"
    sections_at, segments_at = header + size, header + size + 3 * section
    ident = b"\x7fELF" + bytes([1 + wide, 1 + (order == ">"), 1]) + bytes(9)
    counts = (0, header, segment, 1, section, 3, 1)
    head = ident + struct.pack(f"{order}HHI3{word}IHHHHHH", 2, 190, 1, 0, segments_at, sections_at, *counts)

    def row(kind: int, offset: int, length: int) -> bytes:
        return struct.pack(f"{order}II4{word}II2{word}", 1, kind, 0, 0, offset, length, 0, 0, 1, 0)

    load = (1, 5, header, 0, 0, size, 0, 0) if wide else (1, header, 0, 0, size, 0, 5, 0)
    loaded = struct.pack(f"{order}II6Q" if wide else f"{order}8I", *load)
    return head + bytes(size) + row(0, 0, 0) + row(1, header, size) + row(8, header, 1 << 30) + loaded


ELVES = [elf(wide=wide, order=order) for wide in (True, False) for order in "<>"]
ELF_PROBLEM = re.compile(
    r"\S+ is (?:empty|not ELF|cut: \d+ (?:bytes, less than an ELF header|of \d+ bytes)|damaged: .+|for \S+, and .+)"
)


def with_header(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


elf_files = st.one_of(
    st.sampled_from(ELVES).flatmap(damaged),
    # The header's numbers are what everything else is read by.
    st.builds(
        lambda data, at, value, more, other: with_header(with_header(data, at, value), more, other),
        st.sampled_from(ELVES),
        st.integers(4, 63),
        st.sampled_from([b"\0\0", b"\xff\xff", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8, b"\1", b"\x80"]),
        st.integers(4, 63),
        st.binary(min_size=1, max_size=8),
    ),
    st.binary(max_size=80).map(lambda data: b"\x7fELF" + data),
)


@FUZZ
@given(elf_files)
@example(with_header(with_header(ELVES[0], 0x3C, b"\0\0"), 0x28, b"\xff" * 8))
@example(with_header(with_header(ELVES[0], 0x38, b"\xff\xff"), 0x28, b"\0" * 7 + b"\x7f"))
def test_elf_damaged_is_named_or_whole(place: Path, data: bytes) -> None:
    path = place / "kernel.cubin"
    path.write_bytes(data)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are all that is wanted
    problem = file_problem(Tree(path.parent), path.name)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert problem is None or ELF_PROBLEM.fullmatch(problem.text), problem


@pytest.mark.parametrize("data", ELVES, ids=["64-little", "64-big", "32-little", "32-big"])
def test_elf_cut_anywhere_is_named(place: Path, data: bytes) -> None:
    path = place / "kernel.cubin"
    path.write_bytes(data)
    assert file_problem(Tree(path.parent), path.name) is None
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        problem = file_problem(Tree(path.parent), path.name)
        assert problem is not None and ELF_PROBLEM.fullmatch(problem.text), size


file_names = st.one_of(
    st.sampled_from([
        "cache", "gemm.1", "kernel.gemm.1", "kernel.cubin", "kernel.cu", "meta.json", ".committed", "__grp__mm.json",
        "mm.cubin", "mm.ptx", "x.so", "tmp", "tmp.pid_1", "lock", "deps-1", ".staging-1", "gpu_p2p_access_cache_for_0",
    ]).map(os.fsencode),
    st.sampled_from([os.fsencode(text) for text in ODD_TEXTS if "\ud800" not in text]),
    st.binary(min_size=1, max_size=6),
).filter(lambda name: 0 < len(name) <= 255 and name not in (b".", b"..") and not set(name) & set(b"/\0"))  # fmt: skip
contents = st.one_of(
    st.just(b""), st.just(b"x"), st.just(b"{}"), st.sampled_from(ELVES), elf_files, documents.flatmap(written)
)
trees = st.recursive(
    st.one_of(contents, st.sampled_from(["fifo", "link", "loop"])),
    lambda inner: st.dictionaries(file_names, inner, max_size=4),
    max_leaves=12,
)


def plant(path: bytes, tree: Any) -> None:
    """Makes this tree of files."""
    if isinstance(tree, dict):
        os.mkdir(path)  # noqa: PTH102 - the name is bytes
        for name, inner in tree.items():
            plant(path + b"/" + name, inner)
    elif tree == "fifo":
        os.mkfifo(path)
    elif isinstance(tree, str):
        os.symlink(b"/etc/passwd" if tree == "link" else path, path)  # noqa: PTH211
    else:
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(tree)


def clear(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    assert not path.exists()
    return path


def assert_inventory(family: Family, base: Path) -> None:
    """The same told by a scan, by checks of single entries, and after a sweep; and all of it can be shown."""
    found = inventory.scan(family, base)
    assert found.bytes >= 0
    for name, entry in found.entries.items():
        assert inventory.check(family, base, name) == entry.problem
        assert entry.problem is None or harmless(entry.problem.text), entry.problem
        assert entry.problem is None or len(entry.problem.text) < 4000
    assert found.valid | found.invalid.keys() == found.entries.keys()
    aside = clear(base.parent / "aside")
    moved = inventory.sweep(family, base, aside, now=time.time() + 1e6, older_than=600.0)
    assert all(harmless(each.why) and not each.stays for each in moved), moved
    after = inventory.scan(family, base)
    assert after.valid <= found.valid
    assert len(list(aside.iterdir()) if aside.exists() else []) == len(moved)
    # What is left is valid, or may not be moved because nobody could read it.
    if family.claimable:
        assert all(problem.kind is ProblemKind.UNREADABLE for problem in after.invalid.values()), after.invalid
    inventory.remove_host_specific(family, base)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
@settings(FUZZ, max_examples=-(-EXAMPLES // len(FAMILIES)))
@given(tree=st.dictionaries(file_names, trees, max_size=4))
@example({b"cache": "link"})
def test_scan_of_any_tree_is_an_inventory(place: Path, family: Family, tree: dict[bytes, Any]) -> None:
    base = clear(place / "family" / ("0" * 16))
    base.parent.mkdir(exist_ok=True)
    plant(os.fsencode(base), tree)
    assert_inventory(family, base)


@FUZZ
@given(st.sampled_from(FAMILIES), st.one_of(texts, st.lists(texts, max_size=4).map("/".join)))
def test_check_of_any_entry_name_answers(root: Path, family: Family, name: str) -> None:
    base = Path(directory(str(root), family.name, toolchain.family_key(record(), family.name)))
    for asked in (name, f"cache/{name}"):
        problem = inventory.check(family, base, asked)
        assert problem is not None
        assert harmless(problem.text)


def group(base: Path, name: str) -> dict[str, Any]:
    return {"child_paths": {file: f"{base}/{name}/{file}" for file in ("mm.cubin", "mm.ptx")}}


@pytest.mark.parametrize("family", ["triton", "deep_gemm"])
@pytest.mark.parametrize("mount", [None, "/jit"])
@settings(FUZZ, max_examples=-(-EXAMPLES // 4))
@given(data=st.data())
def test_entry_mutated_is_named_or_valid(place: Path, data: st.DataObject, family: str, mount: str | None) -> None:
    base = clear(place / family / ("0" * 16))
    base.parent.mkdir(exist_ok=True)
    good = {"mm.cubin": ELVES[0], "mm.ptx": b"x"}
    good |= {"kernel.cubin": ELVES[0], "kernel.cu": b"x", ".committed": b""} if family == "deep_gemm" else {}
    name = "cache/mm.1" if family == "deep_gemm" else "KEY"
    document = {"config": {"a": 1}} if family == "deep_gemm" else group(base, name)
    entry = base / name
    entry.mkdir(parents=True)
    for file, content in good.items():
        (entry / file).write_bytes(content)
    manifest = entry / ("meta.json" if family == "deep_gemm" else "__grp__mm.json")
    manifest.write_bytes(json.dumps(document).encode())
    assert inventory.check(FAMILY[family], base, name) is None
    victim = data.draw(st.sampled_from([manifest, manifest, *(entry / file for file in good)]))
    if victim == manifest and data.draw(st.booleans()):
        victim.write_bytes(data.draw(mutated(document).flatmap(written)))
    else:
        victim.write_bytes(data.draw(damaged(victim.read_bytes())))
    problem = inventory.check(FAMILY[family], base, name, mount=mount)
    assert problem is None or harmless(problem.text)
    assert_inventory(FAMILY[family], base)
