"""What a run achieved, family by family, and with which weights, on the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from builder.cache.families import FAMILIES
from tests.engine.cli import Cli, Ended, server

pytestmark = pytest.mark.engine

LOADER = ["--tp", "8", "--model-loader-extra-config", '{"num_threads": 64}']


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Iterator[tuple[Cli, Ended]]:
    """A server that fills every family; a model whose dummies do, and one whose dummies do not."""
    cli = Cli(tmp_path_factory.mktemp("families"), docker_host, tiny_image)
    falls: dict[str, Any] = {"load": "dummy-then-weights", "layers": 4, "argv": LOADER}
    cli.manifest(
        server(cli.model("org/all"), "serve", play="all-families"),
        server(cli.model("org/dummy"), **falls),
        server(cli.model("org/falls"), play="crash-exit-0@dummy", **falls),
    )
    yield cli, cli.warm()
    cli.close()


def test_families_entries_and_bytes_are_in_table_and_document(run: tuple[Cli, Ended]) -> None:
    cli, ended = run
    task = ended.task("all-tp8")
    claimable = {family.name for family in FAMILIES if family.claimable}
    assert task["added"].keys() == task["added_bytes"].keys() == claimable
    assert all(task["added_bytes"].values())
    assert task["entries_added"] == sum(task["added"].values())
    (row,) = [
        line for line in ended.err.splitlines() if line.startswith("all-tp8 ") and "warmed" in line and "+" in line
    ]
    for name in claimable:
        assert f"+{task['added'][name]} {name} (" in row
    assert not list(cli.root.glob("sglang_cache/*/gpu_p2p_access_cache_for_*"))


def test_weights_of_warm_up_are_in_table_and_document(run: tuple[Cli, Ended]) -> None:
    cli, ended = run
    dummy, falls = ended.task("dummy-tp8"), ended.task("falls-tp8")
    assert (dummy["state"], dummy["proof"], dummy["loaded"]) == ("warmed", "verified", "dummy weights, 4 layers")
    assert (falls["state"], falls["proof"], falls["loaded"]) == ("warmed", "verified", "weights")
    assert falls["reason"].startswith("with weights, because dummy weights, 4 layers did not do: crash")
    assert "'load_format': 'dummy'" in cli.log("dummy-tp8") and "num_threads" not in cli.log("dummy-tp8")
    assert "num_threads" in cli.log("falls-tp8")
    again = cli.run("check", "--json", "--strict")
    assert again.status == 0, again.said
    assert [task["loaded"] for task in again.document["tasks"]] == ["weights", "dummy weights, 4 layers", "weights"]
    markers = [json.loads(path.read_text()) for path in cli.markers()]
    assert {marker["label"]: marker["observed"]["loaded"] for marker in markers} == {
        "all-tp8": "weights",
        "dummy-tp8": "dummy weights, 4 layers",
        "falls-tp8": "weights",
    }
