"""The verb `refresh`: what its options may not do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builder.cli import main as cli
from builder.manifest import policy

MANIFEST = """\
schema = 1
[image]
ref = "tiny:1"
[cache]
root = "{root}"
[[task]]
model = "org/m"
"""
POLICY = """\
schema = 1
[image]
allowed = ["*"]
[cache]
roots = ["{root}"]
[container]
networks = ["bridge"]
"""


@pytest.mark.attack(
    "an option or a variable names a metrics file that the host's policy does not list",
    by="manifest",
    holds="2: it is refused like a value of the manifest, and nothing is asked of the engine",
)
@pytest.mark.parametrize("how", ["option", "variable"])
def test_refresh_metrics_beyond_policy_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.setattr(policy, "PATH", tmp_path / "policy.toml")
    monkeypatch.setattr(policy, "OWNER", os.getuid())
    policy.PATH.write_text(POLICY.format(root=tmp_path))
    manifest, victim = tmp_path / "m.toml", tmp_path / "victim"
    manifest.write_text(MANIFEST.format(root=tmp_path / "jit"))
    victim.write_text("precious")
    environ = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "DOCKER_HOST": f"unix://{tmp_path}/none"}
    argv = ["refresh", "--manifest", str(manifest)]
    if how == "option":
        argv += ["--metrics", str(victim)]
    else:
        environ["WARM_CACHE_METRICS"] = str(victim)
    assert cli.main(argv, environ=environ) == 2
    assert f"[refresh] metrics is {str(victim)!r}, which this host does not allow" in capsys.readouterr().err
    assert victim.read_text() == "precious"
