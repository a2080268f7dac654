"""push and pull between machines, by a real registry: what travels, what is refused, and what a fault leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from builder.registry import images
from tests.cli.test_here import IMAGE
from tests.program import ROOT, assemble
from tests.registries import StandIn
from tests.registry.sharing import TASKS, Machine

#: Makes a machine of this name.
Machines = Callable[[str], Machine]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Machine:
    """A warm machine; nobody changes it."""
    machine = Machine(tmp_path_factory.mktemp("warm"), site)
    machine.warm()
    return machine


@pytest.fixture
def machines(tmp_path: Path, site: Path) -> Machines:
    def made(name: str) -> Machine:
        (tmp_path / name).mkdir()
        machine = Machine(tmp_path / name, site)
        machine.root.mkdir()
        return machine

    return made


def test_pulled_cache_is_warm_on_another_machine(registry: StandIn, warm: Machine, machines: Machines) -> None:
    pushed = warm.push(registry, "two/cache")
    assert pushed["sent"] > 0 and pushed["tasks"] == ["dense"] and not pushed["unchanged"]
    again = warm.push(registry, "two/cache")
    assert (again["sent"], again["digest"], again["tag"]) == (0, pushed["digest"], pushed["tag"]) and again["unchanged"]
    other = machines("other")
    pulled = other.pull(registry, "two/cache")
    assert pulled["digest"] == pushed["digest"] and pulled["fetched"] > 0
    assert other.warm_tasks() == {"dense"} and other.entries() == warm.entries()
    once_more = other.pull(registry, "two/cache")
    assert once_more["unchanged"] and once_more["fetched"] == 0


def test_restore_in_another_image_knows_the_tests_image_by_its_memo(registry: StandIn, machines: Machines) -> None:
    """An init container has the program alone: no package of the tests, no compiler, no GPU, and the image's digest."""
    other = machines("other")
    other.warm()
    other.push(registry, "memo/cache")
    other.root.rename(other.place / "before")
    other.root.mkdir()
    bare = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "CUDA_HOME": ""}
    refused = other.pull(registry, "memo/cache", status=12, environ=bare)
    assert [problem["place"] for problem in refused["error"]["problems"]] == ["deep_gemm"]
    words = ("--image", f"registry.example/sglang@{IMAGE}")
    assert other.pull(registry, "memo/cache", *words, environ=bare)["markers"]
    assert other.warm_tasks() == {"dense"}


def test_key_decides_what_is_restored(registry: StandIn, warm: Machine, machines: Machines, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout

    for name in ("own", "foreign"):
        run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", f"{name}.pem")
        run("openssl", "pkey", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub")
    other = machines("other")
    prom = tmp_path / "pull.prom"
    key, name = ("--key", str(tmp_path / "own.pub"), "--metrics", str(prom)), "signed/cache"

    def sign(digest: str, signer: str, stream: str = "nightly") -> None:
        environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "builder", "sign", f"{registry.host}/{name}@{digest}"]
        words = ["--key", str(tmp_path / f"{signer}.pem"), "--stream", stream]
        subprocess.run([*command, *words], env=environ, check=True, capture_output=True, timeout=60)

    def refusal(*words: str) -> str:
        message: str = other.pull(registry, name, *words, status=12)["error"]["message"]
        assert other.is_untouched()
        return message

    first = warm.push(registry, name)
    assert "is not signed" in refusal(*key)
    sign(first["digest"], "foreign")
    assert "is signed, but" in refusal(*key)
    sign(first["digest"], "own")
    assert "takes 'release'" in refusal(*key, "--stream", "release")
    # A newer image, signed by nobody: it is refused, and the older one is taken only where that is asked for.
    with registry.client(name) as client:
        stored = images.find(client, first["digest"])
        later = int(time.time()) + 60
        newer, _ = images.store(client, stored.image.at(later), f"{first['tag'][:-15]}20990101-000000")
        assert "is not signed" in refusal(*key)
        pulled = other.pull(registry, name, *key, "--fallback", "1", "--stream", "nightly")
        assert pulled["digest"] == first["digest"] and pulled["signed_by"] and "not signed" in pulled["refused"][0]
        assert other.warm_tasks() == {"dense"}
        counted = {one.name: one.value for each in parsed(prom.read_text()) for one in each.samples}
        assert counted["warm_cache_pull_signature_refusals_total"] == 5
        assert counted["warm_cache_pull_behind_since_timestamp_seconds"] == 0
        assert counted["warm_cache_pull_fetched_bytes"] > 0
        # The newer one is signed and restored; then the older one is a replay.
        sign(images.find(client, newer).digest, "own")
        assert other.pull(registry, name, *key)["tag"] == newer
    replay = other.pull(registry, f"{name}:{first['tag']}", *key, status=12)
    assert "older than the image" in replay["error"]["message"]


def test_dry_run_sends_nothing_and_cold_tasks_are_named(registry: StandIn, warm: Machine, machines: Machines) -> None:
    shown = warm.push(registry, "dry/cache", "--dry-run")
    assert shown["digest"] == "" and [layer["there"] for layer in shown["layers"]] == [False, False]
    with registry.client("dry/cache") as client:
        assert not images.tags(client)
    cold = machines("cold")
    cold.manifest({**TASKS[1], "model": "/home/me/model"})
    refused = cold.share("push", f"{registry.host}/dry/cache", status=12)
    assert "no cache to pack" in refused["error"]["message"]
    cold.warm()
    refused = cold.share("push", f"{registry.host}/dry/cache", status=10)
    assert "its model is a local path" in refused["error"]["message"]
    named = cold.share("push", f"{registry.host}/dry/cache", "--only", "/home/me/model")
    assert named["push"]["tasks"] == ["model"]
    for words, status in (("dry/cache:tag", 2), ("dry/cache", 0)):
        process = warm.begin("push", f"{registry.host}/{words}", "--dry-run", "--image", IMAGE)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, out + err
    assert json.loads(out)["push"]["sent"] == 0
