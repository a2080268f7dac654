"""The containers of the pods that `fleet kubernetes` prints, run as a kubelet runs them, on a real engine and registry.

The engine is no kubelet: one container after another, with the user, capabilities, file systems and volumes that their
pod gives them. The builder image is the tiny image with this program and the packages that it needs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.cli.main import main
from builder.engine.client import Engine
from tests.engine.cli import ROOT, Cli, command
from tests.engine.test_fast_path import KERNEL
from tests.registries import StandIn, stand_in

pytestmark = pytest.mark.engine

#: What a push and a pull import besides the standard library.
PACKAGES = ("certifi", "charset_normalizer", "docker", "idna", "requests", "tenacity", "urllib3")
BUILDER = "builder.example/warm-cache:1"
USER = 65532

Object = dict[str, Any]


@pytest.fixture
def registry(tmp_path: Path, docker_host: str) -> Iterator[StandIn]:
    """A registry on the loopback that the engine's containers have, too."""
    guardian = Path(docker_host.removeprefix("unix://")).parent / "guardian.pid"
    options = ["--also-in", guardian.read_text().strip()] if guardian.exists() else []
    with stand_in(tmp_path / "registry", *options) as found:
        yield found


class Kubelet:
    """Runs the containers of one pod after the other. place: where its volumes are, by name."""

    def __init__(self, place: Path, host: str, tiny: str) -> None:
        self.place, self.host, self.tiny = place, host, tiny
        self.site = place / "site"
        self.site.mkdir(parents=True)
        for name in PACKAGES:
            found = importlib.util.find_spec(name)
            assert found is not None and found.submodule_search_locations
            shutil.copytree(found.submodule_search_locations[0], self.site / name)
        shutil.copytree(ROOT / "builder", self.site / "builder", ignore=shutil.ignore_patterns("__pycache__"))
        (place / "bin").mkdir()
        (place / "bin" / "warm-cache").write_text('#!/bin/sh\nexec python3 -m builder "$@"\n')
        (place / "bin" / "warm-cache").chmod(0o755)

    def run(self, item: Object, files: Object) -> dict[str, subprocess.CompletedProcess[str]]:
        """Run all containers of an object's pod, up to one that fails."""
        pod = item["spec"]["template"]["spec"] if "template" in item["spec"] else item["spec"]
        volumes = {volume["name"]: self._volume(item["kind"], volume, files) for volume in pod["volumes"]}
        ended: dict[str, subprocess.CompletedProcess[str]] = {}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            if container["name"] == "restored":
                continue  # waits for its end
            ended[container["name"]] = done = self._run(pod, container, volumes)
            if done.returncode:
                break
        return ended

    def _volume(self, kind: str, volume: Object, files: Object) -> Path:
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        path = self.place / f"{kind}-{volume['name']}"
        path.mkdir()
        path.chmod(0o777)
        for name, text in (files["data"] if "configMap" in volume else {}).items():
            (path / name).write_text(text)
        return path

    def _run(self, pod: Object, container: Object, volumes: dict[str, Path]) -> subprocess.CompletedProcess[str]:
        mine, above = container["securityContext"], pod["securityContext"]
        user = mine.get("runAsUser", above["runAsUser"])
        words = ["docker", "run", "--rm", "--init", "--network", "host", "--user", f"{user}:{above['runAsGroup']}"]
        words += ["--security-opt", "no-new-privileges", "--cap-drop", "ALL"]
        words += [f"--cap-add={name}" for name in mine["capabilities"].get("add", [])]
        words += ["--read-only"] if mine.get("readOnlyRootFilesystem") else []
        words += ["--workdir", container["workingDir"]] if "workingDir" in container else []
        for mount in container["volumeMounts"]:
            read_only = ":ro" if mount.get("readOnly") else ""
            words += ["--volume", f"{volumes[mount['name']]}:{mount['mountPath']}{read_only}"]
        words += [word for each in container["env"] for word in ("--env", f"{each['name']}={each['value']}")]
        if container["image"] == BUILDER:
            words += ["--volume", f"{self.place}:/opt/it:ro", "--env", "PYTHONPATH=/opt/it/site"]
            words += ["--env", "PATH=/opt/it/bin:/usr/local/bin:/usr/bin:/bin"]
        argv: list[str] = [*container["command"], *container.get("args", [])]
        words += ["--entrypoint", argv[0], self.tiny, *argv[1:]]
        return subprocess.run(
            words, env={**os.environ, "DOCKER_HOST": self.host}, capture_output=True, text=True, timeout=240
        )


def test_pods_warm_push_restore_and_use_the_cache(
    cli: Cli, docker_host: str, tiny_image: str, engine: Engine, registry: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    image = engine.image(tiny_image)
    assert image is not None
    node = cli.place / "node"
    node.mkdir()
    os.chown(node, USER, USER)
    cli.manifest(
        command("triton", KERNEL, families=["triton"]), command("bad", "raise SystemExit(1)"), run={"budget": "10m"}
    )
    words = [f"{registry.host}/pods/jit", "--image", f"warm-cache-stand-in@{image.id}", "--builder-image", BUILDER]
    assert (
        main(
            ["fleet", "kubernetes", *words, "--manifest", str(cli.path), "--cache", str(node), "--jitter", "0"],
            environ={},
        )
        == 0
    )
    listed = {each["kind"]: each for each in json.loads(capsys.readouterr().out)["items"]}
    kubelet, files = Kubelet(cli.place / "kubelet", docker_host, tiny_image), listed["ConfigMap"]

    job = kubelet.run(listed["Job"], files)
    assert list(job) == ["program", "restore", "warm", "push"], job
    assert job["restore"].returncode == 0 and "nothing was restored" in job["restore"].stdout + job["restore"].stderr
    assert job["warm"].returncode == 0, "a failed task keeps nothing from being pushed"
    assert job["push"].returncode == 11, job["push"].stdout + job["push"].stderr
    assert f"{registry.host}/pods/jit:no-gpu-" in job["push"].stdout

    restored = kubelet.run(listed["DaemonSet"], files)
    assert restored["restore"].returncode == 0, restored["restore"]
    assert len(list(node.glob("markers/*/*.json"))) == 1, restored["restore"].stdout + restored["restore"].stderr

    used = kubelet.run(listed["Pod"], files)
    assert list(used) == ["program", "copy", "sglang"], used
    assert used["sglang"].returncode == 10, "the other task is cold"
    assert "1 of 2 tasks" in used["sglang"].stdout or "bad" in used["sglang"].stdout
    assert "triton  cold" not in used["sglang"].stdout
