"""push and pull through an engine: a root that only its containers reach, and one that this process reads."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.cli import Cli, Ended, shapes
from tests.registries import StandIn, stand_in


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with stand_in(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def other(cli: Cli, tmp_path: Path) -> Iterator[Cli]:
    """Another machine, with a cache root of its own."""
    (tmp_path / "other").mkdir()
    made = Cli(tmp_path / "other", cli.host, cli.image)
    made.manifest(shapes())
    yield made
    made.close()


def done(ended: Ended, status: int = 0) -> Ended:
    assert ended.status == status, ended.said
    return ended


def test_pulled_root_is_warm_without_a_probe(cli: Cli, other: Cli, registry: StandIn) -> None:
    cli.manifest(shapes())
    cli.warm()
    ref = f"{registry.host}/engine/cache"
    pushed = done(cli.run("push", ref, "--json")).document["push"]
    assert pushed["sent"] == pushed["size"] > 0
    # Of this machine nothing is in the registry.
    for path in registry.folder.rglob("data"):
        data = path.read_bytes() if path.is_file() else b""
        plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        assert not [
            name for name in (f'"{socket.gethostname()}"', str(cli.place), "layout.json") if name.encode() in plain
        ]
    began = time.time()
    pulled = done(other.run("pull", ref, "--json")).document["pull"]
    assert (pulled["digest"], len(pulled["markers"])) == (pushed["digest"], 1)
    assert other.entries() and [path.name for path in other.entries()] == [path.name for path in cli.entries()]
    assert not list((other.root / "staging").iterdir())
    done(other.run("check", "--strict", "--no-probe"))
    assert all(path.stat().st_mtime >= began - 1 for path in other.entries())
    assert done(other.run("push", ref, "--json")).document["push"]["unchanged"]


def test_volume_is_packed_and_restored_by_containers(cli: Cli, other: Cli, volume: str, registry: StandIn) -> None:
    ref = f"{registry.host}/engine/volume"
    cli.manifest(shapes(), cache={"root": None, "volume": volume})
    cli.warm()
    pushed = done(cli.run("push", ref, "--json")).document["push"]
    pulled = done(other.run("pull", ref, "--json")).document["pull"]
    assert pulled["digest"] == pushed["digest"] and other.entries()
    done(other.run("check", "--strict"))
    # And back, into a volume that has it all: nothing is added, and the next time nothing fetched.
    again = done(cli.run("pull", ref, "--json")).document["pull"]
    assert sum(row["added"] for row in again["families"]) == 0
    assert done(cli.run("pull", ref, "--json")).document["pull"]["fetched"] == 0
