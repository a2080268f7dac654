"""Cache images: packed the same everywhere, nothing private in them, and restored only as far as they are proven."""

from __future__ import annotations

import dataclasses
import gzip
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder import flock
from builder.cache import layer_tar, layout, markers, memos, packing, restore, restored, toolchain
from builder.cache.cache_image import CacheImage, NotACacheImageError, manifest_of, parsed, slug, tag, tag_parts
from builder.cache.layer_tar import ChangedError
from builder.cache.restore import RefusedImageError, RestoreBusyError
from tests import cache_images
from tests.cache_images import HOST, IMAGE, LEAF, MODULE, TASK, UUID, content, member, pack, place, warm_root
from tests.unit.cache.test_inventory import deep_gemm_entry, elf
from tests.unit.cache.test_markers import record


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return warm_root(tmp_path / "one")


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def image(root: Path, blobs: Path) -> CacheImage:
    return pack(root, blobs)[0]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tmp_path / "two"


def judge(root: Path) -> markers.Judgement:
    return markers.judge(root, TASK, record=record(), config_digest=None, strict=True)


def test_restored_root_is_warm_with_exact_times(root: Path, blobs: Path, image: CacheImage, other: Path) -> None:
    result = cache_images.restored(other, blobs, image)
    assert judge(other).state == "warm" and result.markers == (judge(other).path,)
    assert {row.family: row.added for row in result.families} == {
        "deep_gemm": 3,
        "triton": 1,
        "flashinfer": 4,
        "sglang_jit": 2,
    }
    for family, name in (("flashinfer", MODULE), ("flashinfer", f"{MODULE}/mod.so"), ("sglang_jit", LEAF)):
        times = [(place(base, family) / name).stat().st_mtime_ns for base in (root, other)]
        assert times[0] == times[1] and times[0] % 1000, f"{family}/{name}"
    assert not list((other / layout.STAGING).iterdir())
    assert (other / "layout.json").read_text() != (root / "layout.json").read_text()
    assert content(place(other, "deep_gemm") / "cache") == content(place(root, "deep_gemm") / "cache")


def test_restored_memo_knows_image_by_every_name(blobs: Path, image: CacheImage, other: Path) -> None:
    cache_images.restored(other, blobs, image)
    seen: dict[str, Any] = {"mount": "/jit", "gpus": "NVIDIA H200", "driver": "999", "isa": "x86-64-v2", "env": {}}
    by_manifest = dataclasses.replace(IMAGE, id=IMAGE.names[0], content=None, names=())
    found = memos.read_memo(other, by_manifest, **seen)
    assert found is not None and (found["factors"]["driver"], found["factors"]["sm_count"]) == ("999", "132")
    # What this machine knows of itself stays first.
    before = (other / "images" / "hosts.json").read_bytes()
    memos.adopt(other, other)
    assert (other / "images" / "hosts.json").read_bytes() == before


def test_pack_twice_is_the_same_whatever_used_it(root: Path, blobs: Path, image: CacheImage) -> None:
    for stamp in place(root, "deep_gemm").glob("cache/*/.committed"):
        os.utime(stamp)
    (place(root, "flashinfer") / MODULE / "flashinfer_jit.log").write_text("more")
    again, _ = pack(root, blobs)
    assert again == image
    assert manifest_of(again, "sha256:" + "0" * 64, 1) == manifest_of(image, "sha256:" + "0" * 64, 1)
    assert parsed(manifest_of(image, "sha256:" + "0" * 64, 1)) == image


def test_nothing_private_is_packed(blobs: Path, image: CacheImage) -> None:
    names, everything = [], manifest_of(image, "sha256:" + "0" * 64, 1)
    for layer in image.layers:
        with tarfile.open(blobs / packing.blob_name(layer.digest)) as tar:
            for item in tar:
                assert (item.uid, item.gid, item.uname, item.gname) == (0, 0, "", "")
                names.append(item.name)
                everything += b"".join(tar.extractfile(item) or ()) if item.isreg() else b""
    for secret in (HOST, UUID, "registry.internal", "/home/me", "r1"):
        assert secret.encode() not in everything.replace(b"sr1", b""), secret
    for part in ("layout.json", "/tmp", ".lock", "cuda", ".log", "used/"):
        assert not [name for name in names if part in name.replace("jit.log", ".log")], part
    # The marker that travels lists what travels.
    with tarfile.open(blobs / packing.blob_name(image.index.digest)) as tar:
        assert all("flashinfer_jit.log" not in str(tar.extractfile(item).read()) for item in tar if item.isreg())  # type: ignore[union-attr]


def test_pack_of_changing_root_is_refused(root: Path, blobs: Path) -> None:
    (next(place(root, "deep_gemm").glob("cache/*")) / "kernel.cubin").write_bytes(b"")
    with pytest.raises(ChangedError, match="is empty"):
        pack(root, blobs)
    assert not list(blobs.iterdir())


def test_large_family_is_split_and_needs_little_memory(
    root: Path, blobs: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = next(place(root, "deep_gemm").glob("cache/*")) / "kernel.cubin"
    big.write_bytes(elf(72 << 20))
    monkeypatch.setattr(packing, "SPLIT_ABOVE", 1 << 20)
    tracemalloc.start()
    image, _ = pack(root, blobs)
    cache_images.restored(other, blobs, image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    parts = [layer.part for layer in image.layers if layer.family == "deep_gemm"]
    assert len(parts) > 1 and parts == sorted(parts)
    assert judge(other).state == "warm"


def test_families_that_do_not_fit_are_not_restored(blobs: Path, image: CacheImage, other: Path) -> None:
    fits = tuple((each.family, each.key) for each in image.description.families if each.family != "flashinfer")
    (blobs / packing.blob_name(cache_images.layer_of(image, "flashinfer").digest)).unlink()
    result = cache_images.restored(other, blobs, image, families=fits)
    assert result.markers == () and "its flashinfer does not fit here" in result.left[0]
    assert not (other / "flashinfer").exists() and len(list(place(other, "deep_gemm").glob("cache/*"))) == 3
    assert judge(other).state == "cold"


def test_existing_valid_entries_stay_and_invalid_ones_are_quarantined(
    blobs: Path, image: CacheImage, other: Path
) -> None:
    layout.prepare(other)
    mine, broken = (deep_gemm_entry(place(other, "deep_gemm"), f"cache/gemm.{number:032x}") for number in range(2))
    (mine / "kernel.cu").write_text("my own")
    (broken / "kernel.cubin").write_bytes(b"")
    result = cache_images.restored(other, blobs, image)
    row = next(row for row in result.families if row.family == "deep_gemm")
    assert (row.added, row.kept, row.quarantined) == (2, 1, 1)
    assert (mine / "kernel.cu").read_text() == "my own" and judge(other).state == "warm"
    assert len(list(other.glob("aside/deep_gemm-*/*"))) == 1
    again = cache_images.restored(other, blobs, image)
    assert again.added == 0 and judge(other).state == "warm"


def test_module_of_ninja_is_never_mixed_with_another_build(blobs: Path, image: CacheImage, other: Path) -> None:
    layout.prepare(other)
    module = place(other, "flashinfer") / MODULE
    module.mkdir(parents=True)
    (module / "mod.so").write_bytes(elf())
    before = content(module)
    result = cache_images.restored(other, blobs, image)
    assert content(module) == before and result.markers == ()
    assert "is not mixed with what another machine built" in "".join(result.left)


def test_kill_at_any_point_leaves_root_as_it_was_or_more_entries(blobs: Path, image: CacheImage, other: Path) -> None:
    class Killed(BaseException):
        pass

    total = 0

    def count() -> None:
        nonlocal total
        total += 1

    families = tuple((each.family, each.key) for each in image.description.families)
    request = restore.RestoreRequest("sha256:" + "d" * 64, "x", image, families, "0" * 16, "/jit")
    other.mkdir()
    restore.restore(other, blobs, request, count)
    for stop in range(0, total, max(1, total // 5)):
        root = other.with_name(f"killed-{stop}")
        root.mkdir()
        left = stop

        def check() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with pytest.raises(Killed):
            restore.restore(root, blobs, request, check)
        assert not list(root.glob("markers/*/*.json")) and restored.remembered(root) == []
        (root / layout.STAGING / "0123456789abcdef").mkdir(parents=True)
        assert judge(root).state == "cold"
        cache_images.restored(root, blobs, image)
        assert judge(root).state == "warm" and not list((root / layout.STAGING).iterdir())


def test_restore_is_remembered(blobs: Path, image: CacheImage, other: Path) -> None:
    cache_images.restored(other, blobs, image)
    (found,) = restored.remembered(other)
    assert (found.time, found.source) == (1800000000, "registry/x")
    (other / layout.RESTORED).write_text('{"schema": 1, "restored": [7, {"digest": 1}]}')
    assert restored.remembered(other) == []
    assert layout.foreign(other) is None


def test_second_restore_at_once_is_busy(
    blobs: Path, image: CacheImage, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.prepare(other)
    monkeypatch.setattr(restore, "_PATIENCE", 0.0)
    descriptor = flock.open_lock(layout.staging_lock(other), create=True, root=other)
    (other / layout.STAGING / "theirs").mkdir(parents=True)
    assert flock.try_lock(descriptor)
    with pytest.raises(RestoreBusyError, match="another restore"):
        cache_images.restored(other, blobs, image)
    assert restore.sweep_staging(other) == [] and (other / layout.STAGING / "theirs").exists()
    os.close(descriptor)
    assert restore.sweep_staging(other) == [f"{layout.STAGING}/theirs"]


# --- hostile images --------------------------------------------------------------------------------------------------

Fill = Callable[[tarfile.TarFile, str], None]


def adds(*items: tuple[Any, Any]) -> Fill:
    def fill(tar: tarfile.TarFile, place: str) -> None:
        for info, data in items:
            info.name = info.name.replace("KEY", place)
            tar.addfile(info, data)

    return fill


HOSTILE = {
    "absolute": (adds(member("/etc/passwd", b"x")), "not below io.sglang.warm-cache"),
    "other prefix": (adds(member("etc/passwd", b"x")), "not below io.sglang.warm-cache"),
    "dots": (adds(member("KEY/../../../../etc/cron.d/x", b"x")), "a name that leads elsewhere"),
    "other family": (adds(member("io.sglang.warm-cache/triton/0123456789abcdef/x", b"x")), "which is not of deep_gemm"),
    "markers": (adds(member("io.sglang.warm-cache/markers/a/b.json", b"{}")), "which is not of deep_gemm"),
    "link": (adds(member("KEY/cache/a.1", kind=tarfile.SYMTYPE, linkname="/etc")), "a symbolic link"),
    "hard link": (adds(member("KEY/cache/a.1", kind=tarfile.LNKTYPE, linkname="/etc/shadow")), "a hard link"),
    "device": (adds(member("KEY/cache/a.1", kind=tarfile.CHRTYPE)), "a device"),
    "fifo": (adds(member("KEY/cache/a.1", kind=tarfile.FIFOTYPE)), "a FIFO"),
    "sparse": (adds(member("KEY/cache/a.1", kind=tarfile.GNUTYPE_SPARSE)), "neither file nor directory"),
    "setuid": (adds(member("KEY/cache/a.1/kernel.cu", b"x", mode=0o4755)), "with mode 4755"),
    "twice": (adds(*(member("KEY/cache/a.1/kernel.cu", b"x") for _ in range(2))), "twice"),
    "temporary": (adds(member("KEY/tmp/kernel.cu", b"x")), "a lock or a temporary file"),
    "too many": (adds(*(member(f"KEY/cache/a.{n}/kernel.cu", b"x") for n in range(11))), "more than the 10 files"),
    "too large": (adds(member("KEY/cache/a.1/kernel.cu", bytes(10_001))), "more than the 10000 bytes"),
    "deep": (adds(member("KEY/" + "d/" * 200 + "f", b"x")), "nested too deeply"),
    "long name": (adds(member("KEY/" + "d" * 255 + "/" + "e/" * 3000, b"x")), "more than 4096 bytes"),
    "fewer": (adds(member("KEY/cache/a.1/kernel.cu", b"x")), "its manifest says otherwise"),
}


@pytest.mark.attack(
    "a layer of a cache image holds links, devices, programs with the set-user-ID bit, names that lead out of its "
    "family's directory, or more files or bytes than its manifest says",
    by="registry",
    holds="the layer is refused by name, at its header; the root is untouched, and nothing of the unpacked is left",
)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layer_is_refused_and_root_untouched(name: str, blobs: Path, image: CacheImage, other: Path) -> None:
    fill, why = HOSTILE[name]
    layout.prepare(other)
    before = content(other)
    with pytest.raises(RefusedImageError, match=why):
        cache_images.restored(other, blobs, cache_images.hostile(blobs, image, fill))
    now = content(other)
    assert {path: now[path] for path in now if not path.startswith("locks/")} == {
        path: before[path] for path in before if not path.startswith("locks/")
    }
    assert not list((other / layout.STAGING).iterdir())


@pytest.mark.attack(
    "a layer of a few MB unpacks to gigabytes of zeros, or says so",
    by="registry",
    holds="it ends at the bytes that its manifest says, and is not begun where these do not fit on the disk",
)
def test_bomb_is_refused_by_what_it_costs(
    blobs: Path, image: CacheImage, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 GB of zeros: refused at the bytes that its manifest says, and unread where these do not fit the disk."""
    monkeypatch.setattr(layer_tar, "_ANYWAY", 16 << 20)
    with gzip.open(blobs / "zeros", "wb", compresslevel=9) as file:
        head = tarfile.TarInfo(f"io.sglang.warm-cache/deep_gemm/{image.layers[0].key}/cache/a.1/kernel.cu")
        head.size = 10 << 30
        file.write(head.tobuf(tarfile.GNU_FORMAT))
        for _ in range(64):
            file.write(bytes(1 << 20))
    packed = (blobs / "zeros").read_bytes()
    bomb = cache_images.with_blob(blobs, image, b"", packed)
    with pytest.raises(RefusedImageError, match="more than the 10000 bytes"):
        cache_images.restored(other, blobs, bomb)
    with pytest.raises(RefusedImageError, match="unpacks to more"):
        cache_images.restored(other, blobs, cache_images.with_blob(blobs, image, b"", packed, bytes=20 << 30))
    with pytest.raises(OSError, match="to restore, and"):
        cache_images.restored(other, blobs, cache_images.with_blob(blobs, image, b"", packed, bytes=1 << 50))


def test_damaged_blob_is_refused(blobs: Path, image: CacheImage, other: Path) -> None:
    path = blobs / packing.blob_name(image.layers[-1].digest)
    data = bytearray(path.read_bytes())
    for change in (len(data) // 2, -1):
        flipped = bytearray(data)
        flipped[change] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(RefusedImageError, match="markers and memos"):
            cache_images.restored(other, blobs, image)
    for cut in (data[: len(data) // 2], data + b"x"):
        path.write_bytes(cut)
        with pytest.raises(RefusedImageError):
            cache_images.restored(other, blobs, image)
    assert not (other / "deep_gemm").exists()


@pytest.mark.attack(
    "a kernel of a cache image is cut, is for another machine, or is the cubin of a plan pass",
    by="registry",
    holds="the image is refused before anything of it gets its place",
)
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (elf()[:200], "is cut"),
        (elf().replace(b"\xbe\x00", b"\xb7\x00", 1), "is for aarch64"),
        (elf(4096)[:300] + b"warm_cache_plan_only" + elf(4096)[320:], "of the plan pass"),
    ],
    ids=["cut", "other machine", "plan cubin"],
)
def test_invalid_entry_is_refused(root: Path, blobs: Path, other: Path, data: bytes, why: str) -> None:
    """A layer with right digests whose kernel is none."""
    image, _ = pack(root, blobs)
    first = image.layers[0]
    with tarfile.open(blobs / packing.blob_name(first.digest)) as tar:
        items = [(item, tar.extractfile(item).read() if item.isreg() else b"") for item in tar]  # type: ignore[union-attr]
    swapped = [member(i.name, data if i.name.endswith("0/kernel.cubin") else d, i.type, mode=i.mode) for i, d in items]
    total = sum(info.size for info, _ in swapped)
    bad = cache_images.hostile(blobs, image, adds(*swapped), bytes=total, files=first.files)
    with pytest.raises(RefusedImageError, match=why):
        cache_images.restored(other, blobs, bad)
    assert not (other / "deep_gemm").exists()


def test_key_that_is_not_that_of_its_factors_is_refused(blobs: Path, image: CacheImage, other: Path) -> None:
    families = tuple(dataclasses.replace(each, factors={"x": "y"}) for each in image.description.families)
    forged = dataclasses.replace(image, description=dataclasses.replace(image.description, families=families))
    with pytest.raises(RefusedImageError, match="the key is not that of the factors"):
        cache_images.restored(other, blobs, forged)


def test_manifest_that_contradicts_itself_is_refused(image: CacheImage) -> None:
    def forged(**change: Any) -> bytes:
        return manifest_of(dataclasses.replace(image, **change), "sha256:" + "0" * 64, 1)

    first = image.layers[0]
    wrong: dict[str, bytes] = {
        "are the same part": forged(layers=(first, *image.layers)),
        "its last layer": forged(layers=image.layers[:-1]),
        "other families than its layers": forged(layers=image.layers[1:]),
        "of no family": forged(layers=(dataclasses.replace(first, family="cuda"), *image.layers[1:])),
        "a number that is none": forged(layers=(dataclasses.replace(first, size=-1), *image.layers[1:])),
        "more than 64 GiB": forged(layers=(dataclasses.replace(first, bytes=1 << 40), *image.layers[1:])),
        "no cache image": b'{"artifactType": "application/x"}',
        "is not JSON": b"{",
        "Use a newer builder": forged(description=dataclasses.replace(image.description, schema=2)),
    }
    for why, document in wrong.items():
        with pytest.raises(NotACacheImageError, match=why):
            parsed(document)


def test_tags_tell_gpu_toolchain_and_time() -> None:
    name = tag("NVIDIA H200 NVL", "0" * 16, "20261128-071231")
    assert name == f"h200-nvl-{'0' * 16}-20261128-071231"
    parts = tag_parts(f"{name}-2")
    assert parts is not None and (parts.gpu, parts.time) == ("h200-nvl", "20261128-071231")
    assert (slug(""), tag_parts("latest"), tag_parts("sha256-" + "0" * 64 + ".sig")) == ("no-gpu", None, None)
    assert toolchain.key_of("triton", toolchain.family_factors(record(), "triton")) == toolchain.family_key(
        record(), "triton"
    )
