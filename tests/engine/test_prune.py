"""`prune` as people run it: what it removes, from a directory and from a volume, and what it leaves alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from pathlib import Path

import pytest

from builder.engine.client import Engine
from builder.engine.images import serving_id
from builder.errors import EngineRefusedError
from builder.flock import open_lock, try_lock
from tests.engine.cli import Cli, request, shapes, wait_for
from tests.engine.test_engine import context
from tests.generations import Generations, unvouched

pytestmark = pytest.mark.engine

NO_JOBS = {"job_max": "0s"}


@pytest.fixture
def made(cli: Cli) -> Generations:
    """Two toolchains of other images, beside the tiny image's own, which has warmed one task."""
    made = Generations(cli.root)
    made.warmed(1, ["a"], days=30, entries=20)
    made.warmed(2, ["a"], days=20, entries=20)
    # Last, because this machine's GPUs cannot be seen without a driver: those that were written last count.
    cli.manifest(shapes("mine"), cache=NO_JOBS)
    cli.warm()
    return made


def digest(root: Path) -> str:
    known = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        known.update(f"{path} {status.st_mode} {status.st_mtime_ns} {status.st_ctime_ns}".encode())
        known.update(path.read_bytes() if path.is_file() else b"")
    return known.hexdigest()


def test_prune_dry_run_lists_and_changes_nothing(cli: Cli, made: Generations) -> None:
    before = digest(cli.root)
    dry = cli.run("prune", "--dry-run", "--keep", "1", "--json")
    assert dry.status == 0, dry.said
    assert digest(cli.root) == before
    assert "nothing was changed" in dry.err
    done = cli.run("prune", "--keep", "1", "--json")
    assert done.status == 0, done.said
    steps = [[(step["kind"], step["path"]) for step in run.document["prune"]["steps"]] for run in (dry, done)]
    assert steps[0] == steps[1]
    assert ("family", f"deep_gemm/{made.key(1)}") in steps[1]
    assert done.document["prune"]["freed"] > 0
    assert made.markers() != []
    assert not made.place(1).exists()
    assert made.place(2).is_dir()
    assert cli.run("check").status == 0
    assert unvouched(cli.root) == []
    again = cli.run("prune", "--keep", "1")
    assert "nothing to remove" in again.said


def test_prune_policy_of_manifest_is_overridden_by_flag(cli: Cli, made: Generations) -> None:
    cli.manifest(shapes("mine"), cache={**NO_JOBS, "keep": 1, "max_size": "1k", "older_than": "25d"})
    dry = cli.run("prune", "--dry-run", "--max-size", "1t", "--keep", "2", "--json")
    assert [step["path"] for step in dry.document["prune"]["steps"] if step["kind"] == "family"].count(
        f"deep_gemm/{made.key(1)}"
    ) == 1
    assert not any(made.key(2) in step["path"] for step in dry.document["prune"]["steps"])
    everything = cli.run("prune", "--dry-run", "--json").document["prune"]
    assert any(made.key(2) in step["path"] for step in everything["steps"])
    assert "is needed, in use, or was used just now" in everything["left"][0]
    wrong = cli.run("prune", "--keep", "none", "--older-than", "a while", "--max-size", "big", "--json")
    assert wrong.status == 2
    assert [problem["place"] for problem in wrong.document["error"]["problems"]] == [
        "--keep",
        "--older-than",
        "--max-size",
    ]


def test_prune_with_hold_removes_nothing(cli: Cli, made: Generations) -> None:
    job = cli.start("hold", "--", "sh", "-c", "echo job; exec sleep 60")
    job.says("job\n")
    held = cli.run("prune", "--keep", "1")
    assert held.status == 0
    assert "a test job holds the cache" in held.said
    assert made.place(1).is_dir()
    assert len(made.markers()) == 3
    job.send(signal.SIGTERM)
    job.end(10)
    cli.run("prune", "--keep", "1")
    assert not made.place(1).exists()


def test_prune_waits_for_running_builder(cli: Cli, made: Generations) -> None:
    descriptor = open_lock(cli.root / "locks" / "run.lock")
    try:
        assert try_lock(descriptor)
        assert cli.start("prune", "--lock-timeout", "0").end().status == 15
        assert cli.start("prune", "--dry-run").end().status == 0  # which takes none
    finally:
        os.close(descriptor)


@pytest.mark.alone
def test_prune_killed_leaves_valid_root(cli: Cli, made: Generations) -> None:
    made.warmed(3, ["a", "b", "c"], days=40, entries=300)
    cli.warm("--force")  # the last machine that wrote is this one again
    prune = cli.start("prune", "--keep", "1", "--older-than", "10d")
    wait_for(lambda: len(made.markers()) < 6, 60, "the first marker's end")
    prune.send(signal.SIGKILL)
    prune.process.wait()
    with cli.engine() as engine:
        wait_for(lambda: all(engine.state(one).finished for one in cli.containers(engine)), 20, "its container's end")
    assert unvouched(cli.root) == []
    assert cli.start("check").end().status == 0
    cli.run("sweep")
    done = cli.run("prune", "--keep", "1", "--older-than", "10d")
    assert done.status == 0, done.said
    assert [path.name for path in cli.root.glob("deep_gemm/*") if path.is_dir()] != []
    assert not any(made.place(number).exists() for number in (1, 2, 3))
    assert list(cli.root.glob("aside/pruned/*")) == []
    assert cli.run("check").status == 0


def test_prune_of_volume_runs_in_container(cli: Cli, volume: str) -> None:
    cli.manifest(shapes("mine"), cache={**NO_JOBS, "root": None, "volume": volume})
    cli.warm()
    status = cli.run("status", "--json").document
    assert [(row["family"], row["entries"], row["use"]) for row in status["families"] if row["entries"]] == [
        ("deep_gemm", cli.warm().document["tasks"][0]["entries"]["deep_gemm"], "this image")
    ]
    assert "all valid" in cli.run("verify").said
    dry = cli.run("prune", "--dry-run", "--json")
    assert (dry.status, dry.document["prune"]["steps"]) == (0, [])
    assert dry.document["prune"]["bytes_before"] > 0
    assert cli.run("prune").status == 0
    assert cli.run("check").status == 0


def test_prune_images_keeps_used_and_tagged(cli: Cli, engine: Engine) -> None:
    """Each nightly image has the same tag; the one before has lost it."""
    name = f"warm-cache-test-{os.urandom(6).hex()}"
    ids = []
    try:
        for night in range(4):
            text = f"FROM {cli.image}\nENV NIGHT={name}{night}\n"
            ids.append(engine.build(context(text), tag=f"{name}:nightly").id)
            if night == 1:
                request(engine, "POST", "/images/{0}/tag", ids[1], params={"repo": f"{name}-mine", "tag": "1"})
            cli.manifest(shapes("mine"), image={"ref": f"{name}:nightly"}, cache={**NO_JOBS, "keep": 1})
            cli.warm("--force")
        dry = cli.run("prune", "--dry-run", "--json").document["prune"]
        gone = {step["key"]: step for step in dry["steps"] if step["kind"] == "image"}
        assert gone[ids[0]]["stays"] == ""
        assert gone[ids[1]]["stays"] == f"it is tagged {name}-mine:1"
        assert ids[3] not in gone
        assert engine.image(ids[0]) is not None
        done = cli.run("prune", "--json")
        assert done.status == 0, done.said
        assert [engine.image(one) is not None for one in ids] == [False, True, False, True]
        assert {serving_id(image) for image in engine.images()} & set(ids) == {ids[3]}
        assert cli.run("check").status == 0
    finally:
        forget(engine, [f"{name}:nightly", f"{name}-mine:1", *ids])


def forget(engine: Engine, names: list[str]) -> None:
    """Removes these images, and the warm-up images that were built on them first."""
    built = [image.id for image in engine.images() if serving_id(image) in names]
    for name in [*built, *reversed(names)]:
        with contextlib.suppress(EngineRefusedError):
            request(engine, "DELETE", "/images/{0}", name, params={"force": 1})
