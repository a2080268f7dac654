"""A warm cache root of several families, packed into the blobs of a cache image, and layers that no push makes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from builder.cache import inventory, layout, marker_writing, memos, packing, toolchain
from builder.cache.cache_image import PREFIX, CacheImage, Description, Layer
from builder.cache.families import FAMILY, TABLE_VERSION
from builder.cache.marker_format import Observed
from builder.cache.packing import Packed, PackRequest
from builder.cache.restore import RestoreRequest, RestoreResult, restore
from builder.cache.toolchain import Record
from builder.task import ServingImage, Task
from tests.unit.cache.test_inventory import deep_gemm_entry, elf, triton_entry
from tests.unit.cache.test_markers import record

MOUNT = "/jit"
TASK = Task(
    label="warm tp8",
    model="org/warm",
    recipe="command",
    argv=("serve",),
    env={"SGLANG_X": "1"},
    families=("deep_gemm", "triton", "flashinfer", "sglang_jit"),
)
IMAGE = ServingImage("sha256:" + "1" * 64, {}, "sha256:" + "2" * 64, ("sha256:" + "3" * 64,))
#: Names, as no machine of a fleet may see them.
HOST, UUID = "secret-host-7", "GPU-11111111-2222"
MODULE = "0.2/90a/cached_ops/mod"
LEAF = "sm90/mod/build-1/deps-1"


def place(root: Path, family: str, made: Record | None = None) -> Path:
    """The family's directory."""
    return root / family / toolchain.family_key(made or record(), family)


def ninja_module(directory: Path, name: str = MODULE) -> Path:
    """What FlashInfer's ninja leaves, each file with a time of its own."""
    module = directory / name
    module.mkdir(parents=True)
    contents = {"build.ninja": b"rule", "mod.o": elf(), "mod.so": elf(8192), ".ninja_log": b"# ninja log v6\n"}
    for number, (file, data) in enumerate({**contents, "flashinfer_jit.log": b"loaded on secret-host-7"}.items()):
        (module / file).write_bytes(data)
        os.utime(module / file, ns=(0, 1700000000_123456789 + number))
    os.utime(module, ns=(0, 1700000001_987654321))
    return module


def warm_root(root: Path, made: Record | None = None, task: Task = TASK) -> Path:
    """Make a root in which the task is warm, as a run on a machine with names of its own leaves it."""
    made = made or record()
    layout.prepare(root)
    for number in range(3):
        deep_gemm_entry(place(root, "deep_gemm", made), f"cache/gemm.{number:032x}")
    triton = place(root, "triton", made)
    triton_entry(triton, "K" * 52, place=f"{MOUNT}/triton/{triton.name}/{'K' * 52}")
    ninja_module(place(root, "flashinfer", made))
    leaf = place(root, "sglang_jit", made) / LEAF
    leaf.mkdir(parents=True)
    (leaf / "mod.so").write_bytes(elf())
    (leaf / "sgl_deps.json").write_text("{}")
    os.utime(leaf, ns=(0, 1700000002_111111111))
    for name in ("tmp/half", "locks/x.lock"):
        (place(root, "deep_gemm", made) / name).parent.mkdir(exist_ok=True)
        (place(root, "deep_gemm", made) / name).write_text("left")
    (place(root, "flashinfer", made) / MODULE / "mod.lock").write_text("")
    (root / "cuda" / "0123456789abcdef").mkdir(parents=True)
    (root / "cuda" / "0123456789abcdef" / "driver").write_text("x")
    for family in made["factors"] and toolchain.family_keys(made):
        if (root / family).is_dir() and family != "cuda":
            factors = toolchain.family_factors(made, family)
            layout.describe_family(root, family, toolchain.family_key(made, family), factors)
    known = {**made, "gpus": [{"name": "NVIDIA H200", "uuid": UUID, "compute_capability": "9.0", "sm_count": "132"}]}
    memos.write_memo(root, IMAGE, known, env={})  # type: ignore[arg-type]
    memos.write_memo(root, IMAGE, known, env={"PATH": "/home/me/bin"})  # type: ignore[arg-type]
    publish(root, made, task)
    return root


def publish(root: Path, made: Record, task: Task = TASK) -> str:
    """Write the marker of the task, with every entry that is there."""
    names = task.families or ()
    entries = {name: inventory.scan(FAMILY[name], place(root, name, made)).valid for name in names}
    observed = Observed(
        run="r1",
        image=IMAGE.id,
        others={"host": HOST, "builder": "0.1", "image": "registry.internal/x:1", "time": int(time.time())},
    )
    marker = marker_writing.build(
        task,
        record=made,
        config_digest=None,
        claims=names,
        entries=entries,
        proof="verified",
        second_pass_added=0,
        shapes=(),
        observed=observed,
    )
    return marker_writing.publish(root, marker)


def pack(root: Path, out: Path, **change: Any) -> tuple[CacheImage, Packed]:
    """Pack every marker of a root."""
    out.mkdir(exist_ok=True)
    paths = tuple(path.relative_to(root).as_posix() for path in sorted(root.glob("markers/*/*.json")))
    request = PackRequest(paths, MOUNT, (str(IMAGE.id),), ({},))
    packed = packing.pack(root, out, dataclasses.replace(request, **change))
    description = Description(
        gpu="NVIDIA H200",
        toolchain="0" * 16,
        release="0.5.23",
        mount=MOUNT,
        table=TABLE_VERSION,
        time=1800000000,
        families=packed.families,
        tasks=packed.tasks,
    )
    return CacheImage(description, packed.layers), packed


def restored(root: Path, blobs: Path, image: CacheImage, **change: Any) -> RestoreResult:
    """Restore an image whole."""
    root.mkdir(exist_ok=True)
    families = tuple((each.family, each.key) for each in image.description.families)
    request = RestoreRequest("sha256:" + "d" * 64, "registry/x", image, families, "0" * 16, MOUNT)
    return restore(root, blobs, dataclasses.replace(request, **change))


def content(root: Path) -> dict[str, str]:
    """Every file below a directory, by the digest of its content."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


# --- layers that no push makes ---------------------------------------------------------------------------------------


def hostile(blobs: Path, image: CacheImage, fill: Callable[[tarfile.TarFile, str], None], **change: Any) -> CacheImage:
    """Put another first layer into an image: its digests are right, and what is in it is what `fill` makes.

    fill: gets the tar, and the path of the family directory in it.
    """
    first = image.layers[0]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        fill(tar, f"{PREFIX}/{first.family}/{first.key}")
    return with_blob(blobs, image, buffer.getvalue(), **change)


def with_blob(blobs: Path, image: CacheImage, plain: bytes, packed: bytes | None = None, **change: Any) -> CacheImage:
    """Put another tar into an image's first layer."""
    if packed is None:
        deflate = zlib.compressobj(6, zlib.DEFLATED, 31)
        packed = deflate.compress(plain) + deflate.flush()
    digest, diff_id = (hashlib.sha256(data).hexdigest() for data in (packed, plain))
    (blobs / digest).write_bytes(packed)
    fields: Mapping[str, Any] = {"bytes": 10_000, "files": 10, **change}
    layer = dataclasses.replace(
        image.layers[0], digest=f"sha256:{digest}", size=len(packed), diff_id=f"sha256:{diff_id}", **fields
    )
    return dataclasses.replace(image, layers=(layer, *image.layers[1:]))


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, Any]:
    """A member of a tar, and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(data)


def layer_of(image: CacheImage, family: str) -> Layer:
    """The layer of a family."""
    return next(layer for layer in image.layers if layer.family == family)
