"""A container's own copy of the cache is equal to the published one again, whatever jobs did to it."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from builder.cache import layout, reset
from builder.cache.reset import ResetError

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def put(root: Path, name: str, content: str = "kernel", *, time_ns: int = 1_600_000_000_123_456_789) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, ns=(time_ns, time_ns))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A published root, with what jobs do not use beside it."""
    root = tmp_path / "source"
    root.mkdir()
    layout.prepare(root)
    put(root, f"deep_gemm/{KEY}/cache/k.1/kernel.cubin")
    put(root, f"deep_gemm/{KEY}/cache/k.1/.committed", "")
    put(root, f"deep_gemm/{KEY}.json", "{}")
    put(root, f"flashinfer/{KEY}/ab/one.so")
    put(root, f"flashinfer/{KEY}/ab/.ninja_log")
    put(root, "markers/m-1/c.json", "{}")
    put(root, "images/i.json", "{}")
    for name in (f"deep_gemm/{KEY}/tmp/x", f"sglang_cache/{KEY}/gpu_p2p_access_cache_for_0.json", "views/v/upper/x"):
        put(root, name)
    for name in ("aside/x", "used/m-1/c.json", "generations/x", f"sglang_cache/{KEY}/ple/t", "foreign/x"):
        put(root, name)
    os.utime(root / f"flashinfer/{KEY}/ab", ns=(1_500_000_000_987_654_321, 1_500_000_000_987_654_321))
    return root


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    target = tmp_path / "jit"
    reset.reset(root, target)
    return target


def state(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a copy but its identity and locks, with content, mode and exact times."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        name, status = str(path.relative_to(root)), path.lstat()
        if name.partition("/")[0] not in ("locks", "layout.json"):
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else os.strerror(0)
            times = status.st_mtime_ns if "/" in name else 0
            found[name] = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), content, times, status.st_nlink)
    return {name: row[:4] if row[0] == stat.S_IFDIR else row for name, row in found.items()}


def test_reset_of_nothing_copies_what_jobs_use(root: Path, own: Path) -> None:
    files = {str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()} - {"layout.json"}
    assert {name for name in files if not name.startswith("locks/")} == {
        f"deep_gemm/{KEY}/cache/k.1/kernel.cubin",
        f"deep_gemm/{KEY}/cache/k.1/.committed",
        f"deep_gemm/{KEY}.json",
        f"flashinfer/{KEY}/ab/one.so",
        f"flashinfer/{KEY}/ab/.ninja_log",
        "markers/m-1/c.json",
        "images/i.json",
    }
    for name in (f"flashinfer/{KEY}/ab/one.so", f"flashinfer/{KEY}/ab"):
        assert (own / name).stat().st_mtime_ns == (root / name).stat().st_mtime_ns, "ninja compares times"
    assert (own / "layout.json").read_text() != (root / "layout.json").read_text()
    assert layout.foreign(own) is None


def test_reset_twice_changes_nothing(root: Path, own: Path) -> None:
    before = state(own)
    done = reset.reset(root, own)
    assert (done.copied, done.removed, done.kept) == (0, 0, 7)
    assert state(own) == before


@pytest.mark.attack(
    "a container's own copy of the cache has kernels of the same size and time, forged markers, links, pipes, payloads "
    "and deep trees",
    by="runner container",
    holds="after here-reset it is equal to the published one, byte by byte; nothing behind a link is touched",
)
def test_reset_undoes_whatever_a_job_did(root: Path, own: Path, tmp_path: Path) -> None:
    before = state(own)
    outside = put(tmp_path, "outside/precious", "precious")
    kernel = own / f"deep_gemm/{KEY}/cache/k.1/kernel.cubin"
    times = kernel.stat()
    kernel.write_text("poison"[:6])  # of the same size and time
    os.utime(kernel, ns=(times.st_atime_ns, times.st_mtime_ns))
    so = own / f"flashinfer/{KEY}/ab/one.so"
    so.unlink()
    os.link(outside, so)
    (own / "images/i.json").unlink()
    (own / "images/i.json").symlink_to(outside)
    (own / "markers/m-1/c.json").write_text('{"all": "warm"}')
    put(own, "markers/forged-1/c.json")
    put(own, f"triton/{OTHER}/k/k.cubin")
    (own / f"deep_gemm/{OTHER}").symlink_to(outside.parent)
    (own / f"deep_gemm/{KEY}/cache/k.1/.committed").chmod(0o4777)
    os.mkfifo(own / "pipe")
    (own / "used").symlink_to("/")
    (own / "layout.json").write_text('{"schema": 99}')
    (own / "locks/run.lock").unlink()
    (own / "locks/run.lock").symlink_to(outside)
    put(own, "locks/payload", "payload")
    deep = own / "triton" / KEY
    for _ in range(200):
        deep = deep / "d"
    deep.mkdir(parents=True)
    reset.reset(root, own)
    assert state(own) == before
    assert outside.read_text() == "precious"
    assert (own / "locks/run.lock").is_file() and not (own / "locks/run.lock").is_symlink()
    assert not (own / "locks/payload").exists()
    assert layout.is_current(own)


@pytest.mark.parametrize("part", ["deep_gemm", f"deep_gemm/{KEY}", f"deep_gemm/{KEY}/cache", "markers", "locks"])
def test_reset_follows_no_link_in_the_target(root: Path, own: Path, tmp_path: Path, part: str) -> None:
    before = state(own)
    elsewhere = tmp_path / "elsewhere"
    (own / part).rename(elsewhere)
    (own / part).symlink_to(elsewhere)
    kept = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    put(elsewhere, "mine")
    reset.reset(root, own)
    assert state(own) == before
    assert (elsewhere / "mine").exists()
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.attack(
    "links, pipes and files of terabytes lie among the kernels that here-reset copies",
    by="env",
    holds="none is opened or copied; each is named",
)
def test_reset_copies_no_link_or_device_of_the_source(root: Path, own: Path, tmp_path: Path) -> None:
    before = state(own)
    secret = put(tmp_path, "secret", "secret")
    (root / f"deep_gemm/{OTHER}").symlink_to(secret.parent)
    (root / f"flashinfer/{KEY}/ab/link.so").symlink_to(secret)
    os.mkfifo(root / f"flashinfer/{KEY}/ab/pipe")
    with put(root, f"flashinfer/{KEY}/ab/huge").open("r+b") as file:
        file.truncate(reset.LARGEST + 1)
    os.utime(root / f"flashinfer/{KEY}/ab", ns=(1_500_000_000_987_654_321,) * 2)
    done = reset.reset(root, own)
    assert state(own) == before
    assert len(done.skipped) == 4


@pytest.mark.attack(
    "directories at any level lose all permissions, by a job of the same user, who is not root",
    by="runner container",
    holds="the owner gives them back, or removes the directory: a job cannot forbid the reset of the next one",
)
def test_reset_of_locked_directories_makes_them_equal(root: Path, own: Path) -> None:
    before = state(own)
    (own / "deep_gemm" / KEY / "evil" / "below").mkdir(parents=True)
    for name in (f"deep_gemm/{KEY}/evil/below", f"deep_gemm/{KEY}/evil", f"flashinfer/{KEY}/ab", "locks", ""):
        (own / name).chmod(0)
    reset.reset(root, own)
    assert state(own) == before


def test_reset_picks_up_a_refresh(root: Path, own: Path) -> None:
    put(root, f"deep_gemm/{OTHER}/cache/k.2/kernel.cubin", "new")
    put(root, "markers/m-2/c.json", "{}")
    (root / "markers/m-1/c.json").unlink()
    done = reset.reset(root, own)
    assert (own / f"deep_gemm/{OTHER}/cache/k.2/kernel.cubin").read_text() == "new"
    assert (own / "markers/m-2/c.json").exists() and not (own / "markers/m-1/c.json").exists()
    assert done.copied == 2


@pytest.mark.parametrize("relation", ["same", "link", "below", "above", "generation"])
def test_reset_of_the_source_itself_is_refused(root: Path, tmp_path: Path, relation: str) -> None:
    (tmp_path / "link").symlink_to(root)
    layout.prepare(root / "inside")
    generation = root / "generations" / KEY
    generation.mkdir()
    layout.prepare(generation)
    pairs = {
        "same": (root, root),
        "link": (root, tmp_path / "link"),
        "below": (root, root / "inside"),
        "above": (root / "inside", root),
        "generation": (generation, root),
    }
    before = set(root.rglob("*"))
    with pytest.raises(ResetError, match="are the same cache, or one is in the other"):
        reset.reset(*pairs[relation])
    assert set(root.rglob("*")) == before


def test_reset_of_a_strangers_directory_is_refused(root: Path, tmp_path: Path) -> None:
    stranger = put(tmp_path, "home/thesis.tex").parent
    with pytest.raises(ResetError, match="nothing in it is a cache's"):
        reset.reset(root, stranger)
    assert (stranger / "thesis.tex").exists()
    reset.reset(root, stranger, whatever=True)
    assert not (stranger / "thesis.tex").exists()


def test_reset_from_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResetError, match="no cache root and no generation"):
        reset.reset(tmp_path / "nothing", tmp_path / "jit")
    assert not (tmp_path / "jit").exists()


def test_reset_of_many_entries_takes_seconds(root: Path, tmp_path: Path) -> None:
    """The limit is 5 s for 3,500 entries; a tenth of them here, on a machine that others use."""
    for number in range(350):
        for file in ("kernel.cu", "kernel.cubin", "meta.json", ".committed"):
            put(root, f"deep_gemm/{KEY}/cache/k.{number:04}/{file}", file * 1000)
    target = tmp_path / "jit"
    began = time.monotonic()
    reset.reset(root, target)
    reset.reset(root, target)
    assert time.monotonic() - began < 5
