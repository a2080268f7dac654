"""Cache roots that the builder cannot open itself: named volumes, and directories of another machine."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.engine.api import ContainerSpec, Mount
from builder.engine.client import Engine
from tests.engine.cli import (
    GATE,
    LABEL,
    READY,
    Cli,
    Ended,
    command,
    server,
    shapes,
    wait_for,
)
from tests.engine.door import Door

pytestmark = pytest.mark.engine


class Volume(Cli):
    """A user whose cache is a volume of their own, and whose requests are listed."""

    def __init__(self, place: Path, host: str, image: str) -> None:
        super().__init__(place, host, image)
        self.volume = f"warm-cache-test-{os.urandom(6).hex()}"
        self.door = behind(host)
        self.host = self.door.url

    def argv(self, verb: str, *options: str) -> list[str]:
        return super().argv(verb, "--cache", f"volume:{self.volume}", *options)

    def close(self) -> None:
        super().close()
        with self.engine() as engine, contextlib.suppress(Exception):
            engine._api.remove_volume(self.volume, force=True)
        self.door.close()

    def running(self, engine: Engine) -> dict[str, str]:
        """Ids of running containers by task."""
        mine = set(self.containers(engine))
        found = [found for found in engine.containers([f"{LABEL}task"]) if found.id in mine]
        return {item.labels[f"{LABEL}task"]: item.id for item in found if item.status == "running"}

    def open_the_gate(self, engine: Engine) -> None:
        """Makes ``/jit/go``, through the container that waits for it."""
        api: Any = engine._api
        api.put_archive(self.running(engine)["one"], "/jit", an_empty("go"))


def an_empty(name: str) -> bytes:
    """A tar with an empty file of this name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def behind(host: str) -> Door:
    if not host.startswith("unix://"):
        pytest.skip("only an engine behind a unix socket can be put behind another address")
    return Door(host)


@pytest.fixture
def user(tmp_path: Path, docker_host: str, tiny_image: str) -> Iterator[Volume]:
    user = Volume(tmp_path, docker_host, tiny_image)
    yield user
    user.close()


@pytest.fixture(scope="module")
def warmed(
    tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str
) -> Iterator[tuple[Volume, Ended]]:
    user = Volume(tmp_path_factory.mktemp("volume"), docker_host, tiny_image)
    user.manifest(server(user.model("org/model")), shapes())
    with user.engine() as engine:
        assert user.run("check").status == 10
        assert user.run("env").status == 10
        assert not engine.has_volume(user.volume), "reading made the volume"
    yield user, user.warm()
    user.close()


def started(user: Volume) -> list[str]:
    return [path for path in user.door.asked("POST") if path.endswith("/start")]


def test_volume_is_warmed_and_named(warmed: tuple[Volume, Ended]) -> None:
    user, ended = warmed
    assert [(task["state"], task["verified"]) for task in ended.document["tasks"]] == [("warmed", True)] * 2
    assert ended.document["cache"] == f"volume {user.volume}"
    assert len(started(user)) == 4, "probe, lock, and two tasks"
    assert not user.root.exists()


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        ("warm", "2 of 2 tasks warm for toolchain"),
        ("check", "2 of 2 tasks warm for toolchain"),
    ],
)
def test_warm_volume_check_starts_no_container(warmed: tuple[Volume, Ended], verb: str, text: str) -> None:
    user, _ = warmed
    user.door.requests.clear()
    ended = user.run(verb)
    assert ended.status == 0, ended.said
    assert text in ended.out
    assert started(user) == []
    creations = [path for path in user.door.asked("POST") if "/containers/create" in path]
    assert len(creations) == len(user.door.asked("DELETE"))
    assert all("name=warm-cache-read-" in path for path in creations)


def test_env_of_volume_gives_parts_of_it_or_names_views(warmed: tuple[Volume, Ended]) -> None:
    """All of a volume would be a job's to change, markers too."""
    user, _ = warmed
    ended = user.run("env")
    with user.engine() as engine:
        able = not engine.podman and tuple(map(int, engine.api_version.split("."))) >= (1, 45)
    if able:
        assert ended.status == 0, ended.said
        assert f"--mount type=volume,src={user.volume},dst=/jit,readonly" in ended.out
        assert "volume-subpath=deep_gemm/" in ended.out
    else:
        assert (ended.status, ended.out) == (12, "")
        assert "warm-cache view create" in ended.err


def test_volume_status_uses_read_only_containers(warmed: tuple[Volume, Ended]) -> None:
    """Per family, per toolchain, and who uses it: as for a directory."""
    user, _ = warmed
    explained = user.run("explain", "--json").document
    assert {row["state"] for row in explained["families"]} == {"found"}
    holding = user.start("hold", "--", sys.executable, "-c", "import time; print('AT IT', flush=True); time.sleep(60)")
    try:
        holding.says("AT IT")
        (held,) = user.start("status", "--json").end().document["users"]
    finally:
        holding.send(signal.SIGTERM)
        holding.end()
    assert held["how"] == "holds the cache" and held["who"].startswith("container warm-cache-")
    path = user.place / "metrics.prom"
    assert user.run("refresh", "--metrics", str(path)).status == 0
    metrics = path.read_text()
    entries = r'^warm_cache_entries\{.*family="deep_gemm".*toolchain="[0-9a-f]{16}"\} [1-9]'
    assert re.search(entries, metrics, re.MULTILINE)
    assert re.search(r"^warm_cache_filesystem_free_bytes\{.*\} [1-9]", metrics, re.MULTILINE)


def test_volume_damage_is_named(warmed: tuple[Volume, Ended]) -> None:
    user, _ = warmed
    with user.engine() as engine:
        api: Any = engine._api
        mount = Mount(source=user.volume, target="/jit", kind="volume")
        container = engine.create(
            ContainerSpec(image=user.image, name=f"warm-cache-test-{user.volume}", command=["true"], mounts=(mount,))
        )
        try:
            with tarfile.open(fileobj=io.BytesIO(b"".join(engine.archive(container, "/jit/deep_gemm")))) as tar:
                cubin = next(name for name in sorted(tar.getnames()) if name.endswith("/kernel.cubin"))
            api.put_archive(container, "/jit", an_empty(cubin))
        finally:
            engine.remove(container)
    checked = user.run("check", "--only", "org/model", "--json")
    assert checked.status == 10
    reason = checked.task("model-tp8")["reason"]
    assert reason.startswith("entries: 0 missing, 1 invalid (first: deep_gemm/cache/")
    assert reason.endswith("kernel.cubin is empty)")
    assert f"because {reason}" in user.run("explain", "--only", "org/model").out


def test_volume_run_lock_is_held_by_container(user: Volume) -> None:
    user.manifest(command("one", "print('at it', flush=True)\n" + GATE + READY))
    first = user.start("warm", "--json")
    first.says("at it")
    with user.engine() as engine:
        assert set(user.running(engine)) == {"lock", "one"}
        second = user.start("warm", "--json")
        second.says("waiting for another builder, which works on volume ")
        third = user.start("warm", "--json", "--lock-timeout", "1s").end(20)
        assert third.status == 15
        assert "is in use by another builder, still after 1 s" in third.document["error"]["message"]
        user.open_the_gate(engine)
    assert first.end().task("one")["state"] == "warmed"
    waited = second.end()
    assert (waited.status, waited.task("one")["state"]) == (0, "warm")
    user.left_nothing()


@pytest.mark.alone
def test_signal_ends_lock_container(user: Volume) -> None:
    user.manifest(server(user.model("org/m"), "serve", "refuses-sigterm"))
    builder = user.start("warm", "--json")
    builder.says("SIGTERM is refused")
    for _ in range(2):
        builder.send(signal.SIGINT)
    assert builder.end(5).status == 130
    user.left_nothing()


@pytest.mark.alone
def test_builder_killed_lock_container_ends(user: Volume) -> None:
    user.manifest(command("one", "print('at it', flush=True)\n" + GATE))
    builder = user.start("warm")
    builder.says("at it")
    with user.engine() as engine:
        ids = list(user.running(engine).values())
        assert len(ids) == 2
        builder.send(signal.SIGKILL)
        builder.end(5)
        wait_for(lambda: all(engine.state(container).finished for container in ids), 5, "the end of both containers")
    user.manifest(shapes())
    ended = user.run("warm", "--lock-timeout", "5s")
    assert ended.status == 0
    assert ended.out.count(": its builder is gone") == 2


# --- an engine somewhere else ----------------------------------------------------------------------------------------


@pytest.fixture
def far(cli: Cli, docker_host: str) -> Iterator[Cli]:
    """A directory of the engine's host, which the builder has to take for another machine."""
    near, door = cli.host, behind(docker_host)
    cli.host = door.url
    cli.root.mkdir()
    yield cli
    cli.host = near
    door.close()


def test_unreadable_directory_is_read_through_engine(far: Cli, docker_host: str) -> None:
    far.manifest(server(far.model("org/model")))
    warmed = far.warm()
    assert (warmed.task("model-tp8")["state"], warmed.task("model-tp8")["verified"]) == ("warmed", True)
    assert far.run("warm").out.endswith("Nothing to do.\n")
    status, explained = far.run("status", "--json").document, far.run("explain", "--json").document
    assert {row["state"] for row in explained["families"]} == {"found"}
    far.host, door = docker_host, far.host
    assert far.run("check").status == 0, "seen from nearby, the same markers hold"
    near = far.run("status", "--json").document
    assert near["families"] == status["families"]
    assert near["markers"][0]["last_used"] >= status["markers"][0]["last_used"]  # a check in between is a use
    assert far.run("explain", "--json").document["families"] == explained["families"]
    far.host = door

    (marker,) = far.root.glob("markers/model-tp8-*/*.json")
    folder = marker.parent
    os.mkfifo(folder / "fifo.json")
    (folder / "dangling.json").symlink_to("/nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    (far.root / "deep_gemm" / "lost").symlink_to("/etc")
    first, second = far.entries()[:2]
    (second / "kernel.cu").unlink()
    os.link(far.entries()[2] / "kernel.cu", second / "kernel.cu")
    shutil.rmtree(first)
    checked = far.run("check", "--json")
    assert checked.status == 10
    assert checked.task("model-tp8")["reason"].startswith("entries: 1 missing, 0 invalid (first: deep_gemm/cache/")
    marker.write_text("garbage")
    assert far.run("explain").out.startswith("model-tp8: cold, because marker-unreadable: ")


def test_directory_missing_on_engine_host_is_preflight_error(far: Cli) -> None:
    far.root.rmdir()
    far.manifest(shapes())
    for verb in ("check", "warm", "doctor"):
        refused = far.run(verb, "--json")
        assert refused.status == 12
        (problem,) = refused.document["error"]["problems"]
        assert (problem["place"], problem["remedy"]) == ("cache", f"Run there: mkdir -p {far.root}")
    assert not far.root.exists()
