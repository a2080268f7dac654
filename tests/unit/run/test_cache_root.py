"""The cache root as the builder sees it: itself where it may read it, else a copy through a container."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from builder.cache import layout, marker_writing
from builder.cache.families import FAMILIES
from builder.cache.marker_format import Observed
from builder.cache.model_store import config_digest
from builder.cache.toolchain import Record
from builder.engine.api import ContainerSpec
from builder.engine.client import Engine
from builder.engine.errors import MissingSourceError, NotFoundError
from builder.engine.lease import Lease
from builder.errors import BuilderError, EngineLostError, EngineRefusedError, Interrupted, PreflightError
from builder.host.cancel import Cancel
from builder.manifest.load import load
from builder.run import cache_root
from builder.run.cache_root import CacheRoot
from builder.task import Task

KEY = "0123456789abcdef"
LABELS = {"io.sglang.warm-cache.lease": "mine"}


class Held:
    """A lease without a file."""

    keep = False

    def labels(self, _task: str, _lifetime: float) -> dict[str, str]:
        return LABELS


class Elsewhere:
    """An engine whose host has a directory that is mounted where the container expects it."""

    def __init__(self, root: Path, *, local: bool = False, mount: str = "/jit") -> None:
        self.local = local
        self.root, self.mount = root, mount
        self.here: dict[str, ContainerSpec] = {}
        self.created = 0
        self.asked: list[str] = []
        self.refusal: EngineLostError | None = None
        self.clings: EngineLostError | None = None
        self.on_create: Callable[[], object] = lambda: None

    def has_volume(self, name: str) -> bool:
        return name == "known"

    def create(self, spec: ContainerSpec) -> str:
        self.created += 1
        if self.refusal:
            raise self.refusal
        self.here[str(self.created)] = spec
        self.on_create()
        return str(self.created)

    def remove(self, container: str) -> None:
        if self.clings:
            raise self.clings
        del self.here[container]

    def archive(self, container: str, path: str) -> Iterator[bytes]:
        assert container in self.here
        self.asked.append(path)
        place = self.root / os.path.relpath(path, self.mount)
        if not os.path.lexists(place):
            raise NotFoundError(f"no {path}", status=404)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(place, arcname="." if path.endswith("/.") else place.name)
        data = buffer.getvalue()
        return (data[at : at + 700] for at in range(0, len(data), 700))

    def link_target(self, container: str, path: str) -> str | None:
        place = self.root / os.path.relpath(path, self.mount)
        return None if not os.path.lexists(place) else str(place.readlink()) if place.is_symlink() else ""


Make = Callable[..., CacheRoot]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(
        engine: Elsewhere,
        *,
        where: str = "",
        cancel: Cancel | None = None,
        lease: Held | None = None,
        on_skip: Callable[[str], None] = lambda _text: None,
    ) -> CacheRoot:
        path = tmp_path / "manifest.toml"
        where = where or f'root = "{tmp_path}/root"'
        path.write_text(
            f'schema = 1\n[image]\nref = "tiny:1"\n[cache]\n{where}\n[models]\nstore = "{tmp_path}/store"\n'
            '[gpus]\ncount = 0\n[[task]]\nmodel = "a"\nrecipe = "command"\nargv = ["true"]\nsuccess = "x"\n'
        )
        held = cast(Lease, lease or Held())
        return CacheRoot(
            load(path),
            cast(Engine, engine),
            image="sha256:1",
            lease=lambda: held,
            cancel=cancel or Cancel(),
            on_skip=on_skip,
        )

    return make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One marker that claims one family, of which the root has another key too."""
    root = tmp_path / "root"
    for key in (KEY, "f" * 16):
        entry = root / "triton" / key / "ENTRY"
        entry.mkdir(parents=True)
        (entry / "kernel.so").write_text("bytes")
    (root / "layout.json").write_text("{}")
    (root / "images").mkdir()
    (root / "locks").mkdir()
    (root / "locks" / "run.lock").touch()
    record: Record = {
        "schema": 2,
        "factors": {factor: None for family in FAMILIES for factor in family.factors},
        "gpus": [],
        "sglang": {"version": None, "commit": None, "sources": None},
        "variables": {},
        "observed": {},
    }
    marker = marker_writing.build(
        Task(label="a", model="a", recipe="command"),
        record=record,
        config_digest=None,
        claims=["triton"],
        entries={"triton": ["ENTRY"]},
        proof="inventory",
        second_pass_added=None,
        shapes=[],
        observed=Observed(),
    )
    claims = {"triton": replace(marker.claims["triton"], key=KEY)}
    marker_writing.publish(root, replace(marker, claims=claims))
    return root


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


# --- directly --------------------------------------------------------------------------------------------------------


def test_local_root_is_read_directly(make: Make, root: Path) -> None:
    engine = Elsewhere(root, local=True)
    cached = make(engine)
    assert cached.direct() == root
    with cached.view() as view:
        assert view == root
    assert (engine.created, cached.name) == (0, str(root))


@pytest.mark.parametrize("part", ["", "layout.json", "images", "markers", "triton", f"triton/{KEY}"])
def test_unreadable_part_is_read_through_a_container(
    make: Make, root: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    closed = str(root / part) if part else str(root)
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != closed and access(path, mode))
    engine = Elsewhere(root, local=True)
    cached = make(engine)
    assert cached.direct() is None
    with cached.view() as view:
        assert f"triton/{KEY}/ENTRY/kernel.so" in files_below(view)
    assert (engine.created, engine.here) == (1, {})


def test_dangling_links_do_not_count_as_unreadable(make: Make, root: Path) -> None:
    (root / "images").rmdir()
    (root / "images").symlink_to("/nowhere")
    (root / "deep_gemm").symlink_to("deep_gemm")
    (root / "inductor").write_text("a file")
    assert make(Elsewhere(root, local=True)).direct() == root


def test_missing_local_root_is_empty_without_a_request(make: Make, tmp_path: Path) -> None:
    engine = Elsewhere(tmp_path / "root", local=True)
    cached = make(engine)
    assert not cached.exists()
    with cached.view() as view:
        assert files_below(view) == set()
    assert engine.created == 0
    assert cached.create()
    assert (cached.exists(), cached.create(), cached.direct()) == (True, False, tmp_path / "root")


def test_create_makes_the_leaf_only(make: Make, tmp_path: Path) -> None:
    cached = make(Elsewhere(tmp_path, local=True), where=f'root = "{tmp_path}/no/such"')
    with pytest.raises(PreflightError, match="cannot make the cache root"):
        cached.create()


# --- through the engine ----------------------------------------------------------------------------------------------


def test_copy_has_claimed_families_and_is_removed(make: Make, root: Path) -> None:
    engine = Elsewhere(root)
    with make(engine).view() as view:
        (spec,) = engine.here.values()
        found = files_below(view)
        assert (view / "triton" / KEY / "ENTRY" / "kernel.so").read_text() == "bytes"
    assert {name.partition("/")[0] for name in found} == {"layout.json", "markers", "triton"}
    assert not [name for name in found if "f" * 16 in name]
    assert not view.exists()
    assert engine.here == {}
    assert (spec.labels, spec.image, spec.network) == (LABELS, "sha256:1", "none")
    assert [(mount.source, mount.target, mount.read_only) for mount in spec.mounts] == [(str(root), "/jit", True)]


def test_copy_has_only_the_requested_keys(make: Make, root: Path) -> None:
    with make(Elsewhere(root)).view(entries=False) as view:
        assert not (view / "triton").exists()
    (claimed,) = [path.name for path in (root / "triton").iterdir() if path.is_dir() and path.name != "f" * 16]
    with make(Elsewhere(root)).view(keys=[("triton", claimed), ("triton", "f" * 16)]) as view:
        assert [path.name for path in (view / "triton").iterdir()] == [claimed]
    with make(Elsewhere(root)).view(keys=[("triton", "f" * 16)]) as view:
        assert not (view / "triton").exists()


def test_copy_keeps_times(make: Make, root: Path) -> None:
    (marker,) = root.glob("markers/*/*.json")
    os.utime(marker, (1_700_000_000, 1_700_000_000))
    with make(Elsewhere(root)).view() as view:
        assert (view / marker.relative_to(root)).stat().st_mtime == 1_700_000_000


def test_volume_is_read_through_a_container(make: Make, root: Path) -> None:
    engine = Elsewhere(root, local=True)
    known = make(engine, where='volume = "known"')
    assert (known.exists(), known.name, known.direct()) == (True, "volume known", None)
    with known.view() as view:
        assert (view / "layout.json").exists()
    unknown = make(engine, where='volume = "unknown"')
    with unknown.view() as view:
        assert files_below(view) == set()
    assert (unknown.exists(), unknown.create(), engine.created) == (False, False, 1)


def test_missing_root_on_the_engines_host_is_empty(make: Make, root: Path) -> None:
    engine = Elsewhere(root)
    engine.refusal = MissingSourceError("cannot create it", str(root))
    with make(engine).view() as view:
        assert files_below(view) == set()
    engine.refusal = EngineRefusedError("no space left on device")
    with pytest.raises(EngineRefusedError), make(engine).view():
        pytest.fail("there is nothing to read")


def test_links_and_devices_stay_out_of_the_copy(make: Make, root: Path) -> None:
    folder = next(root.glob("markers/*"))
    (folder / "link.json").symlink_to("/etc/passwd")
    (folder / "loop.json").symlink_to("loop.json")
    os.mkfifo(folder / "fifo.json")
    (folder / "one.json").write_text("shared")
    os.link(folder / "one.json", folder / "two.json")
    with make(Elsewhere(root)).view() as view:
        copied = {path.name for path in (view / folder.relative_to(root)).iterdir()}
        assert (view / folder.relative_to(root) / "two.json").read_text() == "shared"
    assert {"one.json", "two.json"} <= copied
    assert not {"link.json", "loop.json", "fifo.json"} & copied


@pytest.mark.attack(
    "a sparse file of a terabyte lies in a volume",
    by="env",
    holds="it is not copied to the builder's disk, and named; the rest is read",
)
def test_large_file_stays_out_of_the_copy_and_is_named(make: Make, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file costs the one who plants it nothing: no reader takes it in, and the rest is read all the same."""
    monkeypatch.setattr(cache_root, "INDEX_FILE", 100_000)
    folder = next(root.glob("markers/*"))
    with (folder / "AA.json").open("wb") as file:
        file.truncate(100_001)
    skipped: list[str] = []
    whole = {path.name for path in folder.iterdir()}
    with make(Elsewhere(root), on_skip=skipped.append).view() as view:
        assert {path.name for path in (view / folder.relative_to(root)).iterdir()} == whole - {"AA.json"}
    assert len(skipped) == 1 and "AA.json has 100.0 kB, more than such a file ever has" in skipped[0], skipped


def test_archive_beyond_all_bounds_is_broken_off_and_the_next_is_read(
    make: Make, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_root, "INDEX_BYTES", 200_000)
    with (root / "images" / "0.json").open("wb") as file:
        file.truncate(300_000)
    skipped: list[str] = []
    with make(Elsewhere(root), on_skip=skipped.append).view(entries=False) as view:
        assert (view / "layout.json").exists()
        assert not (view / "images" / "0.json").exists()
    assert any("0.json has 300.0 kB, more than may be copied" in text for text in skipped), skipped


def archive_of(*names: str) -> Callable[[str, str], Iterator[bytes]]:
    def archive(_container: str, path: str) -> Iterator[bytes]:
        if path != "/jit/markers":
            raise NotFoundError("no such path", status=404)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 4
                tar.addfile(entry, io.BytesIO(b"evil"))
        return (part for part in [buffer.getvalue()])

    return archive


def test_members_outside_the_copy_are_not_unpacked(
    make: Make, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Elsewhere(root)
    sent = archive_of("../out", f"{tmp_path}/out", "markers/../../out", "markers/in")
    monkeypatch.setattr(engine, "archive", sent)
    with make(engine).view() as view:
        assert files_below(view) == {"markers/in"}
        assert not (view.parent / "out").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sent", [b"this is no archive" * 100, b"\x1f\x8b" + bytes(200)])
def test_broken_archive_is_a_lost_engine(make: Make, root: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Elsewhere(root)
    monkeypatch.setattr(engine, "archive", lambda container, path: (part for part in [sent]))
    with pytest.raises(EngineLostError, match=r"the engine's archive of /jit/layout\.json"), make(engine).view():
        pytest.fail("nothing was read")
    assert engine.here == {}


def test_reader_container_is_removed_on_every_exit(make: Make, root: Path) -> None:
    engine = Elsewhere(root)
    with pytest.raises(ZeroDivisionError), make(engine).view():
        raise ZeroDivisionError
    assert engine.here == {}


def test_signal_during_creation_leaves_no_container(make: Make, root: Path) -> None:
    engine, cancel = Elsewhere(root), Cancel()
    engine.on_create = lambda: cancel.set(signal.SIGINT)
    with pytest.raises(Interrupted), make(engine, cancel=cancel).view():
        pytest.fail("it went on")
    assert (engine.created, engine.here) == (1, {})


@pytest.mark.parametrize("where", ["refusal", "clings"])
@pytest.mark.parametrize(
    ("error", "may_be_there"), [(EngineLostError("no answer"), True), (EngineRefusedError("no space"), False)]
)
def test_unconfirmed_container_keeps_the_lease_file(
    make: Make, root: Path, where: str, error: BuilderError, may_be_there: bool
) -> None:
    engine, lease = Elsewhere(root), Held()
    setattr(engine, where, error)
    with pytest.raises(EngineLostError), make(engine, lease=lease).view():
        pass
    assert lease.keep == (may_be_there or where == "clings")


# --- the model store -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    home = tmp_path / "store" / "hub" / "models--org--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "blobs").mkdir()
    (home / "blobs" / "c0").write_text('{"layers": 61}')
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "snapshots" / "abc" / "config.json").symlink_to("../../blobs/c0")
    (home / "snapshots" / "abc" / "model.safetensors").write_bytes(bytes(100))
    return tmp_path / "store"


def test_local_store_is_read_directly(make: Make, root: Path, store: Path) -> None:
    engine = Elsewhere(root, local=True)
    with make(engine).store_view(["org/model"]) as view:
        assert view == store
    assert engine.created == 0


@pytest.mark.parametrize("link", [True, False])
def test_remote_store_copy_has_refs_and_configs_only(make: Make, root: Path, store: Path, link: bool) -> None:
    config = store / "hub" / "models--org--model" / "snapshots" / "abc" / "config.json"
    if not link:
        config.unlink()
        config.write_text('{"layers": 61}')
    engine = Elsewhere(store, mount="/models")
    here, _ = config_digest(store, "org/model", None)
    with make(engine).store_view(["org/model", "org/missing"]) as view:
        assert view is not None
        assert config_digest(view, "org/model", None) == (here, None)
        assert config_digest(view, "org/missing", None)[0] is None
        assert not list(view.rglob("*.safetensors"))
    assert engine.here == {}


def test_root_is_shared_when_the_engine_sees_the_same_layout(make: Make, root: Path) -> None:
    layout.prepare(root)
    engine = Elsewhere(root, local=True)
    assert make(engine).is_shared()
    assert engine.here == {}


def test_root_is_not_shared_when_the_engine_sees_another_directory(make: Make, root: Path, tmp_path: Path) -> None:
    """A disk that was mounted after the engine had started in a mount namespace of its own."""
    layout.prepare(root)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    assert not make(Elsewhere(hidden, local=True)).is_shared()
    layout.prepare(hidden)
    assert not make(Elsewhere(hidden, local=True)).is_shared()


def test_root_that_only_the_engine_laid_out_is_not_shared(make: Make, root: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    layout.prepare(hidden)
    assert not make(Elsewhere(hidden, local=True)).is_shared()


def test_root_on_another_machine_is_read_through_the_engine_alone(make: Make, root: Path) -> None:
    engine = Elsewhere(root, local=False)
    assert make(engine).is_shared()
    assert engine.created == 0
