"""Builds that change with every commit: whose proof counts for this one, and what changed kernel sources are worth."""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.beneath import Tree
from builder.cache import coverage, kernel_sources, loadable, marker_files, marker_writing, markers, toolchain
from builder.cache.build_proofs import ProofWanted
from builder.cache.families import FAMILIES, FAMILY, directory
from builder.cache.kernel_sources import families_of, pack
from builder.cache.marker_format import Build, Observed
from builder.cache.markers import Judgement
from builder.cache.toolchain import Record
from builder.task import Task

TASK = Task(label="m", model="org/m", recipe="command", argv=("true",), families=("inductor",))
FILES = {f"kernels/ops/{number}.py": b"@triton.jit" for number in range(20)} | {"kernels/jit/a.cuh": b"//"}


def sources(files: dict[str, bytes]) -> dict[str, str]:
    groups: dict[str, list[str]] = {}
    for path, content in files.items():
        groups.setdefault(" ".join(families_of(path, content)), []).append(pack(path, content))
    return {group: "".join(sorted(packed)) for group, packed in groups.items()}


def record(commit: str | None = "a" * 40, files: dict[str, bytes] | None = None, version: str = "0.5.23") -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    return {
        "schema": 2,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit"},
        "gpus": [],
        "sglang": {"version": version, "commit": commit, "sources": sources(FILES if files is None else files)},
        "variables": {},
        "observed": {"driver": None, "python": "3.12", "problems": []},
    }


def publish(root: Path, made: Record, **fields: Any) -> Path:
    place = Path(directory(str(root), "inductor", toolchain.family_key(made, "inductor")))
    place.mkdir(parents=True, exist_ok=True)
    (place / "a.py").write_text("code")
    known: dict[str, Any] = {"proof": "verified", "second_pass_added": 0, "shapes": [], "observed": Observed()}
    entries = {"claims": ["inductor"], "entries": {"inductor": ["a.py"]}}
    marker = marker_writing.build(TASK, record=made, config_digest=None, **{**known, **entries, **fields})
    return root / marker_writing.publish(root, marker)


def judge(root: Path, made: Record, **wanted: Any) -> Judgement:
    return markers.judge(root, TASK, record=made, config_digest=None, wanted=ProofWanted(**wanted))


def aged(path: Path, seconds: float) -> None:
    """The marker as if its proof were older by so much."""
    document = json.loads(path.read_text())
    for build in document["builds"]:
        build["time"] -= seconds
    path.write_text(json.dumps(document))


def test_judge_warm_by_proof_of_this_build(tmp_path: Path) -> None:
    publish(tmp_path, record())
    for build in ("any", "same"):
        proof = judge(tmp_path, record(), build=build).proof
        assert proof is not None and proof.same and proof.kernel_sources == "same" and proof.sentence == ""
        assert proof.age < 60


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.dev7+gbbbbbbbbb.d20261128"])
def test_judge_warm_by_proof_of_other_build_of_the_release(tmp_path: Path, version: str) -> None:
    publish(tmp_path, record())
    other = record("b" * 40, version=version)
    judgement = judge(tmp_path, other, strict=True)
    assert judgement.state == "warm" and judgement.proof is not None
    assert (judgement.proof.same, judgement.proof.kernel_sources, judgement.proof.warning) == (False, "same", "")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    this = version if "+" in version else f"{version} (bbbbbbbbbbbb)"
    assert judgement.proof.sentence == f"proven by build 0.5.23 (aaaaaaaaaaaa) on {today}, this is {this}"
    cold = judge(tmp_path, other, build="same")
    assert (cold.state, cold.kind, cold.reason) == ("cold", "build", f"build: {judgement.proof.sentence}")


def test_judge_cold_for_other_release(tmp_path: Path) -> None:
    publish(tmp_path, record())
    assert judge(tmp_path, record(version="0.5.24.dev1+gabc1234")).reason == "coverage: sglang was 0.5.23 is 0.5.24"


def test_judge_counts_changed_sources_and_names_their_families(tmp_path: Path) -> None:
    publish(tmp_path, record())
    files = {**FILES, "kernels/ops/1.py": b"@triton.jit 2", "kernels/jit/new.cuh": b"//"}
    del files["kernels/ops/2.py"]
    judgement = judge(tmp_path, record("b" * 40, files))
    assert judgement.state == "warm" and judgement.proof is not None and judgement.proof.kernel_sources == "changed"
    assert judgement.proof.warning == "3 kernel-relevant files differ: expect compilation in sglang_jit, triton"
    assert judge(tmp_path, record("b" * 40, files), build="same").reason.endswith("in sglang_jit, triton")


def test_judge_with_edited_checkout_of_the_same_commit(tmp_path: Path) -> None:
    publish(tmp_path, record())
    edited = judge(tmp_path, record(files={**FILES, "kernels/ops/1.py": b"@triton.jit 2"}))
    assert edited.proof is not None and not edited.proof.same
    assert edited.proof.warning == "1 kernel-relevant file differs: expect compilation in triton"


def test_judge_cold_when_proof_too_old(tmp_path: Path) -> None:
    aged(publish(tmp_path, record()), 10 * 86400)
    assert judge(tmp_path, record()).state == "warm"
    assert judge(tmp_path, record(), max_age=11 * 86400.0).state == "warm"
    judgement = judge(tmp_path, record(), max_age=7 * 86400.0)
    assert judgement.kind == "age" and judgement.reason.startswith("age: proven 10 d ago, on 20")


def test_publish_keeps_the_last_builds(tmp_path: Path) -> None:
    for number in range(10):
        path = publish(tmp_path, record(f"{number}" * 40))
    publish(tmp_path, record("5" * 40))
    marker = marker_files.read(path)
    assert marker is not None
    assert [build.commit[:1] for build in marker.builds if build.commit] == ["5", "9", "8", "7", "6", "4", "3", "2"]
    assert judge(tmp_path, record("3" * 40), build="same").state == "warm"
    assert judge(tmp_path, record("1" * 40), build="same").kind == "build"


def test_judge_strict_takes_the_verified_proof_of_an_earlier_build(tmp_path: Path) -> None:
    publish(tmp_path, record("a" * 40))
    publish(tmp_path, record("b" * 40), proof="inventory")
    assert judge(tmp_path, record("b" * 40), strict=True).state == "warm"
    assert judge(tmp_path, record("b" * 40), strict=True, build="same").kind == "build"


def of_schema_1(path: Path, made: Record) -> None:
    """Make of a marker what an earlier version would have written, in the folder that it would have had."""
    document = json.loads(path.read_text())
    for name in ("builds", "sources", "prebuild", "newest"):
        del document[name]
    sglang = made["sglang"]
    document["schema"] = 1
    document["coverage"] = {**document["coverage"], "sglang": sglang["version"], "sglang commit": sglang["commit"]}
    document["observed"]["time"] = int(time.time()) - 5 * 86400
    folder = path.parent.parent / f"m-{coverage.coverage_digest(document['coverage'])}"
    folder.mkdir()
    (folder / path.name).write_text(json.dumps(document))
    path.unlink()
    path.parent.rmdir()


def test_judge_reads_marker_of_schema_1_as_proof_of_another_build(tmp_path: Path) -> None:
    of_schema_1(publish(tmp_path, record()), record())
    judgement = judge(tmp_path, record("b" * 40), strict=True)
    assert judgement.state == "warm" and judgement.proof is not None
    assert (judgement.proof.same, judgement.proof.kernel_sources) == (False, "unknown")
    assert 4 * 86400 < judgement.proof.age < 6 * 86400
    assert judge(tmp_path, record(), build="same").kind == "build"
    # Its own proof goes beside it.
    publish(tmp_path, record())
    assert judge(tmp_path, record(), build="same").state == "warm"


def test_judge_names_what_differs_from_marker_of_schema_1(tmp_path: Path) -> None:
    of_schema_1(publish(tmp_path, record()), record())
    other = record()
    other["factors"]["torch"] = "torch 2"
    assert judge(tmp_path, other).reason.startswith("compile: inductor ")
    assert judge(tmp_path, record(version="0.5.24")).reason == "coverage: sglang was 0.5.23 is 0.5.24"


def test_builds_with_odd_content_never_raise(tmp_path: Path) -> None:
    path = publish(tmp_path, record())
    contents: list[Any] = [
        None,
        3,
        [None],
        [{}],
        [{"time": "x", "proof": 3}],
        [{"time": -1, "version": "\x1b[31m\n"}],
        {},
    ]
    for odd in contents:
        path.write_text(json.dumps({**json.loads(path.read_text()), "builds": odd, "sources": odd}))
        for build in ("any", "same"):
            judgement = judge(tmp_path, record(), build=build, max_age=1e9)
            assert "\x1b" not in judgement.reason and "\n" not in judgement.reason
    os.utime(path, (-5, -5))
    assert judge(tmp_path, record(), max_age=60.0).state == "cold"


# Sources


@pytest.mark.parametrize(
    ("path", "content", "families"),
    [
        ("kernels/ops/attention/a.py", b"@triton.jit\ndef f(): ...", ("triton",)),
        ("kernels/ops/moe/a.py", b"load_jit('x')\n@triton.jit", ("sglang_jit", "triton")),
        ("kernels/jit/csrc/a.cuh", b"", ("sglang_jit",)),
        ("jit_kernel/csrc/a.cuh", b"", ("tvm_ffi",)),
        ("kernels/ops/diffusion/ext/a.cpp", b"", ("torch_extensions",)),
        ("srt/layers/moe/moe_runner/triton_utils/configs/triton_3_8_0/E=1.json", b"{}", ("triton",)),
        ("srt/layers/deep_gemm_wrapper/compile_utils.py", b"", ("deep_gemm",)),
        ("srt/layers/linear.py", b"import torch", ()),
        ("kernels/ops/gemm/smallm_fp8_gfx950/a.cuh", b"", ()),
        ("kernels/jit/csrc/hip/a.cuh", b"", ()),
        ("kernels/ops/chip/a.py", b"@triton.jit", ("triton",)),
        ("kernels/README.md", b"@triton.jit", ()),
    ],
)
def test_file_belongs_to_families(path: str, content: bytes, families: tuple[str, ...]) -> None:
    assert families_of(path, content) == families


def test_changed_counts_a_file_once_that_moves_between_families() -> None:
    was = sources({"kernels/a.py": b"@triton.jit"})
    now = sources({"kernels/a.py": b"@triton.jit load_jit"})
    assert kernel_sources.changed(was, now) == kernel_sources.Changed(1, ("sglang_jit", "triton"))
    assert kernel_sources.changed(was, was) == kernel_sources.Changed(0, ())


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.5.23", "0.5.23"),
        ("0.5.23.post1", "0.5.23.post1"),
        ("0.5.24.dev12+g1a2b3c4d5", "0.5.24"),
        ("0.5.23+g1a2b3c4d5.d20261128", "0.5.23"),
        ("0.6.0rc1.dev3", "0.6.0rc1"),
        (None, None),
    ],
)
def test_release_of_version(version: str | None, release: str | None) -> None:
    assert toolchain.release(version) == release


def test_build_is_named_by_commit_unless_version_has_it() -> None:
    assert Build("0.5.24.dev1+gabcdef123", "abcdef1234567890").name == "0.5.24.dev1+gabcdef123"
    assert Build("0.5.23", "abcdef1234567890").name == "0.5.23 (abcdef123456)"
    assert Build(None, None).name is None


# Loadable here, and fresh

OPS = Task(label="ops", model="org/ops", recipe="command", argv=("true",), families=("flashinfer",))
SECOND = 10**9


def ops(root: Path, *, made: int, newest: int) -> tuple[Path, Record]:
    """A root with one module of FlashInfer, made at this second and proven with sources of that one."""
    known: Record = {**record(), "newest": {"flashinfer": newest * SECOND}}
    place = Path(directory(str(root), "flashinfer", toolchain.family_key(known, "flashinfer"))) / "op"
    place.mkdir(parents=True)
    (place / "op.so").write_bytes(Path("/bin/true").read_bytes())
    os.utime(place / "op.so", ns=(made * SECOND, made * SECOND))
    marker = marker_writing.build(
        OPS,
        record=known,
        config_digest=None,
        claims=["flashinfer"],
        entries={"flashinfer": ["op/op.so"]},
        proof="verified",
        second_pass_added=0,
        shapes=[],
        observed=Observed(),
    )
    marker_writing.publish(root, marker)
    return place / "op.so", known


def judged(root: Path, made: Record, **wanted: Any) -> Judgement:
    return markers.judge(root, OPS, record=made, config_digest=None, wanted=ProofWanted(**wanted))


def test_judge_cold_when_sources_are_newer_than_the_build(tmp_path: Path) -> None:
    """The same packages, installed later: ninja compares times, and would build everything again."""
    day = 86400
    _, known = ops(tmp_path, made=20000 * day, newest=19990 * day)
    assert judged(tmp_path, known).state == "warm"
    later: Record = {**known, "newest": {"flashinfer": 20008 * day * SECOND}}
    judgement = judged(tmp_path, later)
    assert judgement.reason == ("stale: flashinfer's sources (2024-10-12) are newer than the cached build (2024-10-04)")


def test_judge_warm_when_proven_with_the_same_newer_sources(tmp_path: Path) -> None:
    """What is newer was no input of the module: ninja had nothing to do in the proof."""
    _, known = ops(tmp_path, made=1000, newest=2000)
    assert judged(tmp_path, known, strict=True).state == "warm"


def restored(root: Path, entry: str, family: str = "flashinfer") -> str:
    return loadable.stale(FAMILY[family], Tree(root), [entry], {}, mounted=True, inside=False)


def test_judge_cold_when_headers_of_a_compiler_are_newer_than_the_build(tmp_path: Path) -> None:
    """A toolkit that was installed later says the same version; its headers' times are what ninja compares with."""
    day = 86400
    _, known = ops(tmp_path, made=20000 * day, newest=19990 * day)
    upgraded: Record = {**known, "newest": {**known["newest"], "nvcc": 20008 * day * SECOND}}
    assert judged(tmp_path, upgraded).state == "warm", "a marker of an earlier version has no time to compare"
    marker = next(iter(marker_files.folder(tmp_path, next(path.name for path in (tmp_path / "markers").iterdir()))))
    assert marker.marker is not None
    assert loadable.unjudged(FAMILY["flashinfer"], upgraded, marker.marker.newest) == ("nvcc", "host_compiler")
    noted = replace(marker.marker, newest={**marker.marker.newest, "nvcc": 19000 * day * SECOND})
    marker_writing.publish(tmp_path, noted)
    assert (
        judged(tmp_path, upgraded).detail == "nvcc's headers (2024-10-12) are newer than the cached build (2024-10-04)"
    )
    assert loadable.unjudged(FAMILY["flashinfer"], upgraded, noted.newest) == ("host_compiler",)


def ninja_deps(made: dict[str, int]) -> bytes:
    """What ninja 1.11 and 1.13 wrote beside objects that it made: paths, each with its time (version 4)."""
    records = b"# ninjadeps\n" + struct.pack("<I", 4)
    for number, path in enumerate(made):
        text = path.encode() + b"\0" * (-len(path) % 4)
        records += struct.pack("<I", len(text) + 4) + text + struct.pack("<i", ~number)
    for number, time_ns in enumerate(made.values()):
        records += struct.pack("<IIQI", 16 | 1 << 31, number, time_ns, 0)
    return records


@pytest.mark.parametrize("record_at", ["", "op/"])
@pytest.mark.parametrize(("later", "stale"), [(1, True), (0, False), (-SECOND // 2, False)])
def test_restored_object_that_ninja_would_build_again(tmp_path: Path, record_at: str, later: int, stale: bool) -> None:
    """Exact times and earlier ones are taken, as ninja takes them; later ones, as plain copies have, are not."""
    entry = tmp_path / "op" / "op.cuda.o"
    entry.parent.mkdir()
    entry.touch()
    os.utime(entry, ns=(0, 5000 * SECOND + later))
    names = {"other.o": 1, "op/op.cuda.o".removeprefix(record_at): 5000 * SECOND}
    (tmp_path / record_at / ".ninja_deps").write_bytes(ninja_deps(names))
    said = restored(tmp_path, "op/op.cuda.o")
    assert said == ("op.cuda.o was copied without its time, so that ninja builds it again" if stale else "")
    assert not restored(tmp_path, "op/op.cuda.o", "triton")


@pytest.mark.parametrize(
    "data", [b"", b"# ninjadeps\n\3\0\0\0", ninja_deps({"x.o": 1})[:-7], ninja_deps({})[:16] + b"\xff" * 64]
)
def test_restored_without_a_sound_record_says_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.o").touch()
    (tmp_path / ".ninja_deps").write_bytes(data)
    assert restored(tmp_path, "x.o") == restored(tmp_path, "gone.o") == ""


@pytest.mark.parametrize(
    ("flag", "said"), [(os.ST_NOEXEC, "noexec, and shared objects"), (os.ST_RDONLY, "read-only, and flashinfer takes")]
)
def test_judge_cold_where_the_mount_prevents_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, said: str
) -> None:
    _, known = ops(tmp_path, made=2000, newest=1000)
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:8], flag, *real[9:])))
    judgement = judged(tmp_path, known)
    assert judgement.kind == "mount" and judgement.reason.startswith(f"mount: its mount is {said}")
    assert judged(tmp_path, known, mounted=False).state == "warm", "of a copy nothing follows"


@pytest.mark.parametrize(("number", "machine"), [(183, "aarch64"), (62, "x86_64"), (243, "riscv64")])
def test_judge_cold_when_shared_object_is_for_another_machine(tmp_path: Path, number: int, machine: str) -> None:
    path, known = ops(tmp_path, made=2000, newest=1000)
    content = bytearray(path.read_bytes())
    content[18:20] = number.to_bytes(2, "little")
    path.write_bytes(content)
    if machine == os.uname().machine:
        assert judged(tmp_path, known).state == "warm"
    else:
        assert f"op.so is for {machine}, and this machine is " in judged(tmp_path, known).reason


@pytest.mark.parametrize("group", ["triton\x1b[31m", "triton\u2028x", "", "a" * 400])
def test_judge_says_nothing_of_groups_that_no_program_wrote(tmp_path: Path, group: str) -> None:
    path = publish(tmp_path, record())
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "sources": {group: "A" * 12}}))
    proof = judge(tmp_path, record("b" * 40, {**FILES, "kernels/ops/1.py": b"@triton.jit 2"})).proof
    assert proof is not None and proof.warning == "kernel-relevant files differ: expect compilation"


@pytest.mark.parametrize("version", ["0.0.0.dev0", "0.0.0.dev1+gbbbbbbbbb", "0.1.dev1+gbbbbbbbbb.d20261128"])
def test_judge_takes_checkout_without_tags_for_a_build_of_any_release(tmp_path: Path, version: str) -> None:
    """As sglang's workflow checks it out; a marker that it leaves proves nothing for a release."""
    publish(tmp_path, record())
    other = record("b" * 40, version=version)
    proof = judge(tmp_path, other, strict=True).proof
    assert proof is not None and (proof.same, proof.kernel_sources) == (False, "same")
    assert proof.sentence.endswith(", of an unknown release")
    files = {**FILES, "kernels/ops/1.py": b"@triton.jit 2"}
    changed = judge(tmp_path, record("b" * 40, files, version)).proof
    assert changed is not None and changed.sentence.endswith("file differs: expect compilation in triton")
    assert judge(tmp_path, other, build="same").kind == "build"
    newer = record("c" * 40, version=version)
    newer["factors"]["torch"] = "torch 2"
    assert judge(tmp_path, newer).kind == "compile"
    publish(tmp_path, newer)
    released = record()
    released["factors"]["torch"] = "torch 2"
    assert judge(tmp_path, newer, build="same").state == "warm"
    assert judge(tmp_path, released).kind == "compile"
