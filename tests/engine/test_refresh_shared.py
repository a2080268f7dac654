"""Nightly runs of several machines: one warms and publishes, the others restore and compile only what does not fit.

The machines are cache roots on one engine; another compiler makes the third one's image another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.engine.client import Engine
from tests.engine.cli import READY, Cli, command, shapes
from tests.engine.test_fast_path import KERNEL
from tests.engine.test_verbs import derived
from tests.registries import StandIn, stand_in

pytestmark = pytest.mark.engine

NVCC = "RUN sed -i 's/V13.0.88/V13.1.99/' /usr/local/cuda/bin/nvcc"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[StandIn]:
    with stand_in(tmp_path / "registry") as found:
        yield found


def machine(place: Path, host: str, image: str) -> Cli:
    place.mkdir()
    cli = Cli(place, host, image)
    cli.manifest(shapes(), command("triton", KERNEL, families=["triton"]))
    return cli


def states(document: dict[str, object]) -> dict[str, str]:
    tasks = document["tasks"]
    assert isinstance(tasks, list)
    return {task["label"]: task["state"] for task in tasks}


def test_one_machine_warms_and_the_others_restore_what_fits(
    tmp_path: Path, docker_host: str, tiny_image: str, engine: Engine, registry: StandIn
) -> None:
    ref = f"{registry.host}/nightly/jit"
    first = machine(tmp_path / "first", docker_host, tiny_image)
    done = first.run("refresh", "--push", f"{ref}:current", "--json", seconds=240)
    assert done.status == 0, done.said
    published = done.document["refresh"]["published"]
    assert published == done.document["push"]["digest"] and done.document["push"]["moved"] == "current"

    same = machine(tmp_path / "same", docker_host, tiny_image)
    restored = same.run("refresh", "--pull", ref, "--json", seconds=240)
    assert restored.status == 0, restored.said
    assert restored.document["refresh"]["restored"] == published
    assert states(restored.document) == {"shapes": "warm", "triton": "warm"}, "nothing was compiled"
    assert not list(same.logs.glob("*.log")), "no task ran"

    other = machine(tmp_path / "other", docker_host, derived(engine, tiny_image, "nvcc", NVCC))
    partly = other.run("refresh", "--pull", f"{ref}:current", "--push", ref, "--json", seconds=240)
    assert partly.status == 0, partly.said
    assert states(partly.document) == {"shapes": "warmed", "triton": "warm"}
    (unfit,) = partly.document["pull"]["unfit"]
    assert unfit["family"] == "deep_gemm" and unfit["why"].startswith("deep_gemm_nvcc was ")
    assert {each["family"] for each in partly.document["pull"]["families"]} == {"triton"}

    alone = machine(tmp_path / "alone", docker_host, tiny_image)
    alone.manifest(command("made", READY))
    gone = alone.run("refresh", "--pull", f"{registry.host}/no/such", "--json", seconds=240)
    assert gone.status == 0 and states(gone.document) == {"made": "warmed"}, gone.said
    assert gone.document["refresh"]["restored"] is None and "nothing was restored" in "".join(gone.document["warnings"])


def test_options_of_a_shared_refresh_are_checked(tmp_path: Path, docker_host: str, tiny_image: str) -> None:
    cli = machine(tmp_path / "one", docker_host, tiny_image)
    wrong = {
        ("--push", f"r.example/a@sha256:{'0' * 64}"): "a push makes a digest of its own",
        ("--pull", "r.example/UPPER"): "--pull r.example/UPPER",
        ("--key", "/no/key"): "--key is for what --pull restores",
    }
    for words, said in wrong.items():
        ended = cli.run("refresh", *words)
        assert ended.status == 2 and said in ended.said, ended.said
    assert cli.here("refresh", "--webhook", "nonsense", environ={"WARM_CACHE_PULL": "1"}) == 2, "that switch is warm's"
