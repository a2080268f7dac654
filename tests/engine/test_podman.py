"""The program against a Podman of the test's own, started by docker/stand-in/engine/podman.sh.

Where it behaves differently, the difference is shown here; docker/README.md has the whole list.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.engine.api import Mount
from builder.engine.client import Engine
from tests.engine.cli import ROOT, Cli, command, shapes, wait_for
from tests.engine.workshop import Proxy, Workshop, check
from tests.scripts import HANG, leave, out

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

SCRIPT = ROOT / "docker" / "stand-in" / "engine" / "podman.sh"
HERE = "import time\nprint('here', flush=True)\ntime.sleep(60)\n"


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Iterator[str]:
    """Its DOCKER_HOST, with the tiny image in it."""
    if not shutil.which("podman") and os.environ.get("INSTALL_ENGINE") != "1":
        pytest.skip("podman is not installed, and only INSTALL_ENGINE=1 says that tests may install it")
    place = tmp_path_factory.mktemp("podman")
    environ = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}
    started = subprocess.run([SCRIPT, "up", place], env=environ, capture_output=True, text=True, timeout=110)
    if started.returncode:
        reason = started.stderr.strip().splitlines()[-1]
        if os.environ.get("INSTALL_ENGINE") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    try:
        host = started.stdout.strip().removeprefix("DOCKER_HOST=")
        there, here = Engine(docker_host).connect(), Engine(host).connect()
        try:
            here._api.load_image(b"".join(there._api.get_image(tiny_image)))
        finally:
            there.close()
            here.close()
        yield host
    finally:
        subprocess.run([SCRIPT, "down", place], env=environ, check=True, timeout=60)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def engine(podman: str) -> Iterator[Engine]:
    engine = Engine(podman).connect()
    yield engine
    engine.close()


@pytest.fixture
def cli(podman: str, tiny_image: str, tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path, podman, tiny_image, podman)
    yield cli
    cli.close()


def test_podman_is_recognised(engine: Engine) -> None:
    assert engine.podman
    assert engine.local


def test_podman_runs_cold_to_swept(cli: Cli) -> None:
    cli.manifest(shapes(), command("fails", "import sys\nsys.exit(3)"))
    assert cli.run("warm", "--json").task("shapes")["state"] == "warmed"
    assert "fails" in cli.run("warm", "--json").said
    cli.manifest(shapes())
    assert cli.run("check", "--json").status == 0
    assert len(cli.entries()) == 5
    assert cli.run("verify", "--json").status == 0
    assert cli.run("sweep").status == 0
    cli.warm("--force")


def test_podman_volume_is_warmed_and_read(cli: Cli, engine: Engine) -> None:
    volume = f"warm-cache-test-{os.urandom(6).hex()}"
    cli.manifest(shapes(), cache={"root": None, "volume": volume})
    try:
        cli.warm()
        assert cli.run("check", "--json").status == 0
        assert "5 entries in" in cli.run("verify").said
    finally:
        engine._request("DELETE", "/volumes/{0}", volume)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_podman_signal_ends_run_within_five_seconds(cli: Cli, signum: int, status: int) -> None:
    cli.manifest(command("hangs", HERE), run={"grace": "1s"})
    builder = cli.start("warm", "--json")
    builder.says("here")
    began = time.monotonic()
    builder.send(signum)
    assert builder.end().status == status
    assert time.monotonic() - began < 5
    cli.left_nothing()


def test_podman_builder_killed_container_ends(cli: Cli, engine: Engine) -> None:
    cli.manifest(command("hangs", HERE))
    builder = cli.start("warm", "--json")
    builder.says("here")
    containers = cli.containers(engine)  # of the task, and of the lock of a root that is new
    builder.send(signal.SIGKILL)
    builder.end()
    wait_for(lambda: all(engine.state(one).finished for one in containers), 5, "the containers' own end")
    assert {engine.state(one).exit_code for one in containers} == {70}
    assert cli.run("sweep").status == 0
    assert cli.containers(engine) == []


def test_podman_without_gpus_is_preflight_error(cli: Cli) -> None:
    """It takes the request and starts the container all the same, also where a memo makes a probe needless."""
    cli.manifest(shapes())
    cli.warm()
    cli.manifest(shapes(timeout="1m"), shapes("more"), gpus={"count": 2})
    ended = cli.run("warm", "--json")
    assert ended.status == 12
    (problem,) = ended.document["error"]["problems"]
    assert "Podman before 5.4 ignores the request" in problem["text"]


def test_podman_log_flood_with_stdin_is_complete(workshop: Workshop) -> None:
    code = "for n in range(200): os.write(1, b'%03d' % n + b'x' * 9999 + b'\\n')"
    check(workshop.run(source=code), "exited", 0)
    assert [int(line[:3]) for line in workshop.log()["out"].splitlines()] == list(range(200))


def test_podman_cut_attachment_is_resumed_once(workshop: Workshop, podman: str, tmp_path: Path) -> None:
    proxy = Proxy(tmp_path / "proxy.sock", podman)
    proxy.cut_after = 50_000
    source = """
for number in range(9000):
    os.write(1, b"line %d\\n" % number)
    if number == 7000:
        threading.Event().wait(1.5)
os.write(1, b"\\xff\\xfe, not UTF-8\\nand an end")
"""
    engine = Engine(proxy.url).connect()
    try:
        outcome = workshop.run(source=source, engine=engine)
    finally:
        engine.close()
        proxy.close()
    assert proxy.cuts == 1
    check(outcome, "exited", 0)
    expected = [b"line %d" % number for number in range(9000)]
    assert workshop.log()["out"].splitlines() == [*expected, "\ufffd\ufffd, not UTF-8".encode(), b"and an end"]


def test_podman_out_of_memory_is_named(workshop: Workshop) -> None:
    source = "data = []\nwhile True:\n    data.append(bytearray(b'x' * (4 << 20)))"
    outcome = workshop.run(source=source, memory=64 << 20)
    assert (outcome.ended, outcome.exit_code) == ("exited", 137)
    assert outcome.oom or "from outside, or for memory" in outcome.problems[0]


def test_podman_volume_is_not_filled_from_image(workshop: Workshop) -> None:
    name = f"warm-cache-test-{workshop.mark}"
    try:
        outcome = workshop.run(source='print(os.listdir("/etc"))', mounts=(Mount(name, "/etc", kind="volume"),))
        check(outcome, "exited", 0)
        assert "'passwd'" not in outcome.tail[0]
    finally:
        workshop.engine._request("DELETE", "/volumes/{0}", name)


def test_podman_model_store_links_are_followed(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blob").write_text("{}")
    (tmp_path / "store" / "config.json").symlink_to("blob")
    engine = workshop.engine
    container = engine.create(workshop.spec(leave(0), mounts=(Mount(str(tmp_path / "store"), "/s", read_only=True),)))
    assert engine.link_target(container, "/s/config.json") == ""
    assert engine.link_target(container, "/s/missing") is None
    assert b"{}" in b"".join(engine.archive(container, "/s/config.json"))
    engine.remove(container)


def test_podman_container_ending_during_removal_is_removed(workshop: Workshop) -> None:
    for _ in range(3):
        container = workshop.engine.create(workshop.spec(out("x\n"), leave(0)))
        workshop.engine.start(container)
        workshop.engine.remove(container, force=True)
    container = workshop.engine.create(workshop.spec(HANG))
    workshop.engine.start(container)
    workshop.engine.remove(container, force=True)
    assert workshop.left() == []
