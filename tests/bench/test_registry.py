"""Cache images against other clients of registries: a layer of 2 GiB, 3,500 entries, and the memory that each needs.

Each way is a process of its own, whose peak is what the kernel says of it. All send to the same real registry and have
to make digests themselves; what was pulled is compared with what was pushed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builder.cache import toolchain
from builder.registry.documents import OCI_CONFIG, OCI_MANIFEST, dumped
from tests import cache_images
from tests.bench.measuring import Series, environment, show, write_down
from tests.bench.test_check import entry
from tests.registries import StandIn, stand_in, tool
from tests.unit.cache.test_markers import record

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

#: Bytes of the large layer: its figures are per second, and so is a smaller one's.
SIZE = int(os.environ.get("WARM_CACHE_BENCH_LAYER") or 2 << 30)
ENTRIES = 3500
ROUNDS = 3

#: Pushes a file as a blob, as `push` does: its digest first.
PUSH = """
import hashlib, sys
from pathlib import Path
from builder.registry.client import RegistryClient
from builder.registry.reference import parse

def pieces(path):
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece

reference, *paths = sys.argv[1:]
with RegistryClient(parse(reference)) as client:
    for path in paths:
        digest = hashlib.sha256()
        for piece in pieces(path):
            digest.update(piece)
        client.put_blob(f"sha256:{digest.hexdigest()}", Path(path).stat().st_size, lambda: pieces(path))
"""
#: Pulls blobs into files, proven.
PULL = """
import sys
from builder.registry.client import RegistryClient
from builder.registry.reference import parse

reference, folder, *blobs = sys.argv[1:]
with RegistryClient(parse(reference)) as client:
    for blob in blobs:
        digest, size = blob.split("=")
        with open(f"{folder}/{digest[7:]}", "wb") as file:
            for piece in client.read_blob(digest, int(size)):
                file.write(piece)
"""
#: Packs a root's markers and entries into layers, and pushes these.
PACK = """
import sys
from pathlib import Path
from tests import cache_images

root, out = map(Path, sys.argv[1:])
cache_images.pack(root, out)
"""


def high_water(pid: int) -> int:
    """The most memory that a process has had so far. Bytes; 0 once it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@dataclass
class Way(Series):
    """One way, with the most memory that one of its processes had. Bytes."""

    peak: int = 0

    def timed(self, command: list[str], env: Mapping[str, str], cwd: Path | None = None) -> None:
        """Run the command; its seconds and memory are this way's."""
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=dict(env), cwd=cwd, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            # Not ru_maxrss of wait4: that counts what this process had when it forked.
            self.peak = max(self.peak, high_water(process.pid))
            time.sleep(0.02)  # noqa: TID251 - its end is polled for
        self.seconds.append(time.perf_counter() - begun)
        assert process.returncode == 0, command

    def row(self, size: int) -> list[str]:
        speed = size / (1 << 20) / self.median
        return [
            self.name,
            f"{self.median:.1f} s",
            f"{self.least:.1f} s",
            f"{speed:.0f} MiB/s",
            f"{self.peak >> 20} MiB",
        ]


@dataclass
class Bench:
    """What all ways share."""

    registry: StandIn
    place: Path
    oras: Path
    ways: dict[str, Way] = field(default_factory=dict)

    def way(self, name: str) -> Way:
        return self.ways.setdefault(name, Way(name))

    def ours(self, name: str, script: str, *arguments: str | Path) -> None:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        self.way(name).timed(command, environment(self.place))

    def theirs(self, name: str, *command: str | Path, cwd: Path | None = None) -> None:
        self.way(name).timed(list(map(str, command)), os.environ, cwd)

    def emptied(self) -> None:
        """Nothing is in the registry, and nothing of this in memory that was not written."""
        shutil.rmtree(self.registry.folder / "data" / "docker", ignore_errors=True)
        os.sync()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with stand_in(tmp_path / "registry") as registry:
        yield Bench(registry, tmp_path, tool("oras"))


def digest_of_file(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return f"sha256:{found.hexdigest()}"


def oci_layout(folder: Path, layer: Path, digest: str) -> None:
    """An OCI layout with one layer, which skopeo copies."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    os.link(layer, blobs / digest.removeprefix("sha256:"))

    def put(raw: bytes) -> dict[str, object]:
        name = hashlib.sha256(raw).hexdigest()
        (blobs / name).write_bytes(raw)
        return {"digest": f"sha256:{name}", "size": len(raw)}

    row = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.stat().st_size}
    config = dumped({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest]}})
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {"mediaType": OCI_CONFIG, **put(config)}}
    described = {"mediaType": OCI_MANIFEST, **put(dumped({**manifest, "layers": [row]}))}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}), encoding="utf-8")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")


def removed(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def in_turn(rounds: int, *ways: Callable[[], None]) -> None:
    for _ in range(rounds):
        for way in ways:
            way()


def test_large_layer(bench: Bench) -> None:
    layer, out = bench.place / "layer", bench.place / "out"
    with layer.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    digest, host = digest_of_file(layer), bench.registry.host
    oci_layout(bench.place / "layout", layer, digest)
    skopeo = shutil.which("skopeo")

    def ours() -> None:
        bench.emptied()
        bench.ours("push: this builder", PUSH, f"{host}/bench/ours", layer)
        bench.ours("pull: this builder", PULL, f"{host}/bench/ours", removed(out), f"{digest}={SIZE}")
        assert (out / digest[7:]).stat().st_size == SIZE

    def oras() -> None:
        bench.emptied()
        blob = f"{host}/bench/oras@{digest}"
        bench.theirs("push: oras", bench.oras, "blob", "push", "--plain-http", blob, layer)
        bench.theirs("pull: oras", bench.oras, "blob", "fetch", "--plain-http", "-o", removed(out) / "blob", blob)

    def by_skopeo() -> None:
        bench.emptied()
        name = f"docker://{host}/bench/skopeo:1"
        source = f"oci:{bench.place}/layout"
        copy = [str(skopeo), "copy", "-q", "--insecure-policy"]
        bench.theirs("push: skopeo", *copy, "--dest-tls-verify=false", source, name)
        bench.theirs("pull: skopeo", *copy, "--src-tls-verify=false", name, f"dir:{removed(out)}")

    in_turn(ROUNDS, ours, oras, *([by_skopeo] if skopeo else []))
    finish("registry-layer", bench, SIZE)


def test_entries(bench: Bench) -> None:
    """3,500 DeepGEMM entries of real sizes: packed into layers, against oras, which makes one tar of the folder."""
    root, out, blobs = bench.place / "root", bench.place / "out", bench.place / "blobs"
    made = record()
    cache_images.warm_root(root, made)
    folder = root / "deep_gemm" / toolchain.family_key(made, "deep_gemm")
    for number in range(ENTRIES):
        made_entry = folder / "cache" / f"sm90_fp8_gemm_1d2d.{number:032x}"
        entry(made_entry)
        with (made_entry / "kernel.cubin").open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(5000))  # so that it packs about five times, as real ones do
    cache_images.publish(root, made)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    host = bench.registry.host

    def ours() -> None:
        bench.emptied()
        bench.ours("pack: this builder", PACK, root, removed(blobs))
        layers = sorted(blobs.iterdir())
        bench.ours("push: this builder", PUSH, f"{host}/bench/entries", *layers)
        bench.ours("push again: this builder", PUSH, f"{host}/bench/entries", *layers)
        rows = [f"{digest_of_file(path)}={path.stat().st_size}" for path in layers]
        bench.ours("pull: this builder", PULL, f"{host}/bench/entries", removed(out), *rows)
        bench.way("pull: this builder").remark = f"{sum(path.stat().st_size for path in layers)} bytes"

    def oras() -> None:
        bench.emptied()
        name = f"{host}/bench/oras:1"
        push = (bench.oras, "push", "--plain-http", name, folder.name)
        bench.theirs("pack and push: oras", *push, cwd=folder.parent)
        bench.theirs("push again: oras", *push, cwd=folder.parent)
        bench.theirs("pull and unpack: oras", bench.oras, "pull", "--plain-http", "-o", removed(out), name)

    in_turn(ROUNDS, ours, oras)
    finish("registry-entries", bench, size)


def finish(name: str, bench: Bench, size: int) -> None:
    head = ["", "median", "least", "speed", "peak memory"]
    show(f"{name}: {size >> 20} MiB, {ROUNDS} rounds", [head, *(way.row(size) for way in bench.ways.values())])
    write_down(
        name, None, list(bench.ways.values()), bytes=size, peak={one.name: one.peak for one in bench.ways.values()}
    )
    ours = [way for way in bench.ways.values() if "this builder" in way.name]
    assert max(way.peak for way in ours) < 160 << 20  # the interpreter, requests, and at most 64 MiB of a layer
