"""The verb `sweep` without a manifest: containers of dead builders, on whatever engine there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.cli import invocation
from builder.cli import main as cli
from builder.engine.api import ContainerSpec
from builder.engine.lease import Lease
from builder.host import gpu_locks
from builder.host.hooks import Hooks, record_pending_release
from tests.fakes import FakeEngine
from tests.scripts import HANG, command


class Engine(FakeEngine):
    url = "unix:///fake"
    local = True

    def connect(self) -> None:
        return None

    def close(self) -> None:
        return None


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = Engine()
    (tmp_path / "locks").mkdir()  # other builders on this machine have nothing to do with it
    monkeypatch.setattr(gpu_locks.usable_directories, "__defaults__", ((tmp_path / "locks",),))
    monkeypatch.setattr(invocation, "Engine", lambda url, timeout: made)
    yield made
    for container in list(made.all):
        made.remove(container, force=True)


def test_sweep_alone_removes_containers_and_runs_releases(
    tmp_path: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease(tmp_path, run_id="dead") as lease:
        lease.keep = True
        labels = lease.labels("a task", 3600)
        release = Hooks((f"touch {tmp_path}/released",), "dead", 20, "/")
        record_pending_release(lease.path.parent, release)
    made = engine.create(ContainerSpec(image="tiny:1", name="orphan", command=command(HANG), labels=labels))
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    assert cli.main(["sweep", "--json"], environ=environ) == 0
    assert made not in engine.all
    assert (tmp_path / "released").exists() and not lease.path.parent.exists()
    (row,) = json.loads(capsys.readouterr().out)["containers"]
    assert (row["name"], row["removed"]) == ("orphan", True)
    assert cli.main(["sweep"], environ=environ) == 0
    assert capsys.readouterr().out == "unix:///fake: 0 containers of dead builders removed\n"


def test_sweep_of_a_cache_wants_a_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "--cache", "/data/x"], environ={}) == 2
    assert "which manifest?" in capsys.readouterr().err
