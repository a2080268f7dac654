"""What is said of a job that may have done anything to its view: named, printable, and never a way out."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.beneath import Tree
from builder.cache import overlay_audit
from builder.cache.findings import Audit, proposal
from builder.cache.overlay_audit import AuditBounds, Layers
from builder.events import Finding
from builder.task import Shape
from tests.unit.cache.test_inventory import deep_gemm_entry, elf, triton_entry

KEY = "0123456789abcdef"
GEMM, TRITON, INDUCTOR = (f"{family}/{KEY}" for family in ("deep_gemm", "triton", "inductor"))
HOUR = 3600.0


class View:
    """The layers of a view. A test does to `merged` what a job does; `audit` sees it as an overlay keeps it."""

    def __init__(self, place: Path) -> None:
        self.lower, self.upper, self.merged = (place / name for name in ("lower", "upper", "merged"))
        self.created = time.time() - HOUR
        for name in ("a", "b", "c"):
            deep_gemm_entry(self.lower / GEMM, f"cache/gemm_{name}.{name * 32}")
            triton_entry(self.lower / TRITON, name.upper() * 52, place=f"/jit/{TRITON}/{name.upper() * 52}")
            (self.lower / INDUCTOR / name).mkdir(parents=True)
            (self.lower / INDUCTOR / name / "kernel.so").write_bytes(elf())
        for name in ("layout.json", f"deep_gemm/{KEY}.json", "markers/task-1/k.json", "images/i.json"):
            (self.lower / name).parent.mkdir(parents=True, exist_ok=True)
            (self.lower / name).write_text("{}")
        shutil.copytree(self.lower, self.merged, symlinks=True)

    def audit(self, *, bounds: AuditBounds | None = None) -> Audit:
        self.upper.mkdir()
        self._settle("")
        layers = Layers(self.lower, self.upper, self.merged, "/jit", self.created)
        return overlay_audit.audit(layers, now=time.time(), check=lambda: None, bounds=bounds)

    def _settle(self, name: str) -> bool:
        """Puts what differs below this directory into the upper layer; whether anything does."""
        lower, merged, upper = self.lower / name, self.merged / name, self.upper / name
        mine = {item.name for item in lower.iterdir()} if lower.is_dir() and not lower.is_symlink() else set()
        different = bool(mine - {item.name for item in merged.iterdir()})
        for item in list(merged.iterdir()):
            below, status = f"{name}/{item.name}".lstrip("/"), item.lstat()
            if stat.S_ISDIR(status.st_mode):
                different |= self._settle(below) or not (self.lower / below).is_dir()
                continue
            old = (self.lower / below).lstat() if os.path.lexists(self.lower / below) else None
            if old is None or _told(old) != _told(status):
                (self.upper / below).parent.mkdir(parents=True, exist_ok=True)
                os.link(item, self.upper / below, follow_symlinks=False)
                different = True
        if different:
            upper.mkdir(parents=True, exist_ok=True)
        return different


def _told(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mode, status.st_size, status.st_mtime_ns


@pytest.fixture
def view(tmp_path: Path) -> Iterator[View]:
    view = View(tmp_path)
    yield view
    if view.merged.exists():  # as deep as it may be: whoever empties the temporary directory would not get through
        Tree(tmp_path).remove(view.merged.name)


def told(found: Audit) -> set[tuple[str, str, str]]:
    return {(finding.kind, finding.family, finding.path) for finding in found.findings}


def aged(entry: Path, *, first: float, last: float) -> None:
    """Its files were written in this order, so many seconds ago."""
    now = time.time()
    for name, when in (("kernel.cu", first), ("kernel.cubin", last), ("meta.json", last)):
        os.utime(entry / name, (now - when, now - when))


def test_audit_of_hits_has_no_finding(view: View) -> None:
    for name in ("a", "b"):
        os.utime(view.merged / GEMM / f"cache/gemm_{name}.{name * 32}" / ".committed")
    (view.merged / GEMM / "locks").mkdir()
    (view.merged / GEMM / "locks" / "GEMM_NT_F8F8BF16_n4096_k7168_g1.lock").touch()
    (view.merged / GEMM / "tmp" / "77").mkdir(parents=True)
    (view.merged / GEMM / "tmp" / "77" / "kernel.cu").write_text("a build that was cut short")
    (view.merged / "locks").mkdir()
    (view.merged / "locks" / "hold.lock").touch()
    found = view.audit()
    assert (found.findings, found.used, found.jit, found.seconds) == ([], 2, 0, 0.0)
    assert found.asked == [Shape("GEMM_NT_F8F8BF16", 4096, 7168)]


def test_audit_names_compiled_entry_with_shape_and_time(view: View) -> None:
    locks = view.merged / GEMM / "locks"
    locks.mkdir()
    one, two = (deep_gemm_entry(view.merged / GEMM, f"cache/new_{name}.{name * 32}") for name in "xy")
    aged(one, first=100, last=90)
    aged(two, first=50, last=30)
    for name, ago in (("GEMM_NT_F8F8BF16_n1_k2_g1", 101), ("GROUPED_GEMM_NT_F8F8BF16_MASKED_n3_k4_g5", 51)):
        (locks / f"{name}.lock").touch()
        os.utime(locks / f"{name}.lock", (time.time() - ago,) * 2)
    triton_entry(view.merged / TRITON, "N" * 52, place=f"/jit/{TRITON}/{'N' * 52}")
    (view.merged / INDUCTOR / "new").mkdir()
    (view.merged / INDUCTOR / "new" / "k.so").write_bytes(elf())
    found = view.audit()
    assert told(found) == {
        ("compiled", "deep_gemm", f"cache/new_x.{'x' * 32}"),
        ("compiled", "deep_gemm", f"cache/new_y.{'y' * 32}"),
        ("compiled", "triton", "N" * 52),
        ("compiled", "inductor", "new/k.so"),
    }
    shapes = {finding.path[:11]: finding.shape for finding in found.findings if finding.family == "deep_gemm"}
    assert shapes == {
        "cache/new_x": "GEMM_NT_F8F8BF16 N=1, K=2, num_groups=1",
        "cache/new_y": "GROUPED_GEMM_NT_F8F8BF16_MASKED N=3, K=4, num_groups=5",
    }
    assert found.seconds == pytest.approx(30, abs=1.0)


def test_audit_finds_changed_file_of_same_size_and_time(view: View) -> None:
    kernel = view.merged / GEMM / f"cache/gemm_a.{'a' * 32}" / "kernel.cubin"
    old = kernel.stat()
    kernel.chmod(0o755)
    data = bytearray(kernel.read_bytes())
    data[200] ^= 0xFF
    kernel.write_bytes(data)
    os.utime(kernel, ns=(old.st_atime_ns, old.st_mtime_ns))
    touched = view.merged / TRITON / ("A" * 52) / "mm.ptx"
    touched.chmod(0o755)  # its bytes are as they were
    found = view.audit()
    assert told(found) == {("rewritten", "deep_gemm", f"cache/gemm_a.{'a' * 32}")}
    assert found.findings[0].detail == "kernel.cubin holds other bytes"


def test_audit_names_deletions_damage_and_foreign_files(view: View) -> None:
    gemm, triton = view.merged / GEMM / "cache", view.merged / TRITON
    shutil.rmtree(gemm / f"gemm_a.{'a' * 32}")
    (gemm / f"gemm_b.{'b' * 32}" / ".committed").unlink()
    shutil.rmtree(gemm / f"gemm_c.{'c' * 32}")
    (gemm / f"gemm_c.{'c' * 32}").write_text("a file in its place")
    (triton / ("A" * 52) / "mm.cubin").unlink()
    shutil.rmtree(view.merged / INDUCTOR)
    (view.merged / "markers" / "task-1" / "k.json").write_text('{"all": "warm"}')
    (view.merged / "images" / "i.json").unlink()
    (gemm.parent / "notes").write_text("x")
    (view.merged / "etc").symlink_to("/etc")
    assert told(view.audit()) == {
        ("deleted", "deep_gemm", f"cache/gemm_a.{'a' * 32}"),
        ("damaged", "deep_gemm", f"cache/gemm_b.{'b' * 32}"),
        ("damaged", "deep_gemm", f"cache/gemm_c.{'c' * 32}"),
        ("foreign", "deep_gemm", f"cache/gemm_c.{'c' * 32}"),
        ("damaged", "triton", "A" * 52),
        *(("deleted", "inductor", f"{name}/kernel.so") for name in "abc"),
        ("foreign", "", "markers/task-1/k.json"),
        ("deleted", "", "images/i.json"),
        ("foreign", "deep_gemm", "notes"),
        ("foreign", "", "etc"),
    }


def _links(gemm: Path, outside: Path) -> None:
    (gemm / "cache" / "link.1").symlink_to(outside)
    (gemm / "cache" / "loop.1").symlink_to(gemm)
    shutil.rmtree(gemm / "cache" / f"gemm_a.{'a' * 32}")
    (gemm / "cache" / f"gemm_a.{'a' * 32}").symlink_to(outside / f"gemm_a.{'a' * 32}")
    (gemm / "cache" / f"gemm_b.{'b' * 32}" / "kernel.cu").unlink()
    (gemm / "cache" / f"gemm_b.{'b' * 32}" / "kernel.cu").symlink_to(outside / "secret")


def _specials(gemm: Path, _outside: Path) -> None:
    entry = gemm / "cache" / "special.1"
    entry.mkdir()
    for name in ("kernel.cu", "kernel.cubin", "meta.json", ".committed"):
        os.mkfifo(entry / name)
    os.mkfifo(gemm / "cache" / f"gemm_a.{'a' * 32}" / "pipe")


def _names(gemm: Path, _outside: Path) -> None:
    for name in (b"\xff\xfe.1", b"\x1b[2J\n::error::.1", "\u202egnp.1".encode(), b"n" * 250 + b".1", b"::set-output.1"):
        entry = gemm / "cache" / os.fsdecode(name)
        entry.mkdir()
        (entry / "kernel.cu").write_text("x")
    (gemm / "locks").mkdir()
    for lock in ("X_n1_k2_g99999999999999999999.lock", "x\n_n1_k2_g3.lock", "GEMM'; rm -rf_n1_k2_g3.lock"):
        (gemm / "locks" / lock).touch()


def _garbage(gemm: Path, _outside: Path) -> None:
    entry = deep_gemm_entry(gemm, "cache/garbage.1")
    (entry / "meta.json").write_text("[" * 100_000)
    (entry / "kernel.cubin").write_bytes(elf()[:64] + os.urandom(4000))
    entry = deep_gemm_entry(gemm, "cache/sparse.1")
    with (entry / "kernel.cubin").open("ab") as file:
        file.truncate(1 << 40)
    with (entry / "meta.json").open("ab") as file:
        file.truncate(1 << 40)


def _deep(gemm: Path, _outside: Path) -> None:
    """Deeper than any path can say."""
    top = os.open(gemm, os.O_RDONLY)
    for _ in range(400):  # 400 × 18 characters: beyond PATH_MAX
        os.mkdir("deeper-and-deeper", dir_fd=top)
        below = os.open("deeper-and-deeper", os.O_RDONLY, dir_fd=top)
        os.close(top)
        top = below
    os.close(top)


@pytest.mark.parametrize("harm", [_links, _specials, _names, _garbage, _deep])
def test_audit_of_hostile_layer_never_raises_or_escapes(
    tmp_path: Path, view: View, harm: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    deep_gemm_entry(outside, f"gemm_a.{'a' * 32}")
    (outside / "secret").write_text("secret")
    view.upper.mkdir()
    (view.upper / GEMM / "cache").mkdir(parents=True)
    # The job has this in its upper layer, and sees the same: merged without what the lower layer has beside it.
    harm(view.merged / GEMM, outside)
    layers = Layers(view.lower, view.merged, view.merged, "/jit", view.created)
    began = time.monotonic()
    found = overlay_audit.audit(layers, now=time.time(), check=lambda: None)
    assert time.monotonic() - began < 10
    assert found.jit == 0
    assert found.asked == []
    assert found.findings
    for finding in found.findings:
        for text in (finding.path, finding.detail, finding.shape):
            assert text.isprintable() and len(text) < 600, finding
        assert "secret" not in finding.detail
    # And it can be removed, which takes nothing else along.
    Tree(tmp_path).remove(view.merged.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lower", "outside", "upper"]
    assert (outside / "secret").read_text() == "secret"
    assert (outside / f"gemm_a.{'a' * 32}" / "kernel.cubin").exists()


def test_audit_beyond_budget_is_not_judged(view: View) -> None:
    many = view.merged / GEMM / "cache" / f"gemm_a.{'a' * 32}"
    for number in range(300):
        (many / f"{number}").write_text("x")
    found = view.audit(bounds=AuditBounds(files=200))
    assert found.findings == [] and found.truncated == "more than 200 files were written: none was judged"


def test_audit_time_is_not_taken_from_the_future(view: View) -> None:
    for name, first, last in (("x", 20 * 365 * 24 * HOUR, 10.0), ("y", 20.0, -1e6)):
        aged(deep_gemm_entry(view.merged / GEMM, f"cache/new_{name}.{name * 32}"), first=first, last=last)
    assert view.audit().seconds <= HOUR + 1


# --- what is proposed ------------------------------------------------------------------------------------------------

SHAPE = "GEMM_NT_F8F8BF16 N=1, K=2, num_groups=1"


def gemm(path: str, shape: str = "") -> Finding:
    return Finding("deep_gemm", KEY, "compiled", path, shape=shape, began=1.0, ended=2.0)


def test_proposal_names_compiled_shapes_only() -> None:
    asked = [Shape("GEMM_NT_F8F8BF16", 1, 2), Shape("GEMM_NT_F8F8BF16", 3, 4)]
    text = proposal(Audit([gemm("cache/a.1", SHAPE), gemm("cache/b.1", SHAPE)], asked=asked), "pr-1")
    assert text.splitlines()[1:] == [
        "[[task]]",
        'model = "views/pr-1"',
        'recipe = "shapes"',
        "shapes = [",
        f'    "{SHAPE}",',
        "]",
    ]


def test_proposal_with_unknown_shape_names_all_requested() -> None:
    asked = [Shape("GEMM_NT_F8F8BF16", 1, 2), Shape("GEMM_NT_F8F8BF16", 3, 4)]
    text = proposal(Audit([gemm("cache/a.1", SHAPE), gemm("cache/b.1")], asked=asked), "pr-1")
    assert all(f'"{shape}",' in text for shape in asked)


def test_proposal_without_shape_is_a_comment() -> None:
    found = [gemm("cache/a.1"), *(Finding("triton", KEY, kind, kind) for kind in ("compiled", "deleted"))]
    lines = proposal(Audit(found), "pr-1").splitlines()
    assert lines and all(line.startswith("#") for line in lines)
    assert "1 triton entries" in "\n".join(lines)
    assert proposal(Audit([found[2]]), "pr-1") == ""


def test_span_counts_overlapping_time_once() -> None:
    spans = {"one": (1.0, 11.0), "two": (6.0, 13.0), "three": (21.0, 22.0)}
    found = [Finding("triton", KEY, "compiled", name, began=a, ended=b) for name, (a, b) in spans.items()]
    assert Audit(found).seconds == pytest.approx(13.0)


@pytest.mark.attack(
    "a job fills its view with what takes an audit for ever",
    by="view",
    holds="bytes and seconds have a limit; what was found until then is reported, with the reason",
)
def test_audit_beyond_its_bytes_or_seconds_reports_what_it_found(view: View) -> None:
    deep_gemm_entry(view.merged / GEMM, f"cache/gemm_new.{'9' * 32}")
    (view.merged / INDUCTOR / "a" / "kernel.so").write_bytes((view.lower / INDUCTOR / "a" / "kernel.so").read_bytes())
    found = view.audit(bounds=AuditBounds(bytes=10))
    assert [finding.kind for finding in found.findings] == ["compiled"]
    assert "more than 10 bytes would have to be compared: not all was judged" in found.truncated
    shutil.rmtree(view.upper)
    found = view.audit(bounds=AuditBounds(seconds=-1.0))
    assert "it took more than" in found.truncated
