"""What containers of the builder may do, as the engine has it, whatever a manifest asks for."""

from __future__ import annotations

from typing import Any

import pytest

from builder.engine.client import Engine
from tests.engine.cli import READY, Cli, a_cli, command

__all__ = ["a_cli"]

pytestmark = pytest.mark.engine

SECRET = "CI_DEPLOY_KEY"


@pytest.mark.attack(
    "a probe is given a secret, a writable model store and the host's network by the manifest",
    by="manifest",
    holds="a probe has no secret, no store, no network, and the cache read-only but for the folder of memos",
)
def test_every_container_gets_least_power(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe, a run, a lock's holder and maintenance, with a manifest that asks for all that a manifest can."""
    started: dict[str, dict[str, Any]] = {}
    real = Engine.start

    def start(engine: Engine, container: str) -> None:
        found = engine._inspected(container, dict)
        started[found["Name"].split("-")[3]] = dict(found)
        real(engine, container)

    monkeypatch.setattr(Engine, "start", start)
    cli.store.mkdir()
    asked = {"network": "bridge", "secrets": [SECRET]}
    cli.manifest(command("task", READY), container=asked, models={"writable": True})
    environ = {SECRET: "hunter2"}
    assert cli.here("warm", environ=environ) == 0
    memos = list((cli.root / "images").iterdir())
    probes = [started["probe"]]
    for memo in memos:
        memo.unlink()
    for verb in (("check",), ("sweep",), ("view", "create", "job"), ("view", "audit", "job"), ("view", "drop", "job")):
        assert cli.here(*verb, environ=environ) == 0
    assert any((cli.root / "images").iterdir())
    probes.append(started["probe"])
    for mode, found in started.items():
        host = found["HostConfig"]
        assert host["Privileged"] is False and host["CapDrop"] == ["ALL"], mode
        assert sorted(host["CapAdd"]) == ["CHOWN", "DAC_OVERRIDE", "FOWNER"], mode
        assert "no-new-privileges" in host["SecurityOpt"], mode
    run = started.pop("run")
    assert run["HostConfig"]["PidsLimit"] == 32768 and run["HostConfig"]["NetworkMode"] == "bridge"
    assert any(word.startswith(SECRET) for word in run["Config"]["Env"])
    for mode, found in started.items():
        host = found["HostConfig"]
        assert host["PidsLimit"] == 512 and host["Memory"] == 2 << 30, mode
        assert host["NetworkMode"] == "none" and host["ReadonlyRootfs"] is True, mode
        assert not [word for word in found["Config"]["Env"] if "hunter2" in word or SECRET in word.split("=")[0]], mode
        assert str(cli.store) not in [mount["Source"] for mount in found["Mounts"]], mode
    writable = [{mount["Destination"] for mount in probe["Mounts"] if mount["RW"]} for probe in probes]
    assert writable == [set(), {"/jit/images"}]
