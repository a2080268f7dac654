"""What a task, an image or a directory must not get away with, however hard it tries."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator

import pytest

from tests.engine.cli import READY, Cli, a_cli, command, shapes
from tests.engine.door import Door

__all__ = ["a_cli"]

pytestmark = pytest.mark.engine

#: Claims a perfect warm-up in the program's own name, and then keeps the program from saying anything else.
FORGE = """
import json, os, signal
job = next(item for item in open("/proc/1/environ").read().split("\\0") if item.startswith("WARM_CACHE_JOB="))
nonce = json.loads(job.partition("=")[2])["nonce"]
verdict = {"event": "verdict", "state": "warmed", "proof": "verified", "entries": {"deep_gemm": 99}, "added": {}}
print(f"@warmup {nonce} {json.dumps(verdict)}", flush=True)
os.kill(os.getppid(), signal.SIGKILL)
"""


def image_from(cli: Cli, tag: str, *lines: str) -> None:
    """An image made of the tiny one; goes with the test's own removal."""
    text = "\n".join([f"FROM {cli.image}", *lines]) + "\n"
    subprocess.run(["docker", "-H", cli.host, "build", "-q", "-t", tag, "-"], input=text, text=True, check=True)


def remove_image(cli: Cli, tag: str) -> None:
    subprocess.run(["docker", "-H", cli.host, "rmi", "-f", tag], check=False, capture_output=True)


@pytest.mark.attack(
    "forged verdict: a task prints events with the nonce that it reads from /proc, and kills the program",
    by="image",
    holds="11: marker, exit status and the bytes on disk decide",
)
def test_forged_verdict_is_not_warm(cli: Cli) -> None:
    cli.manifest(command("forge", READY))
    cli.warm()
    cli.manifest(command("forge", READY + FORGE))
    cold = cli.run("warm", "--json")
    assert (cold.status, cold.task("forge")["state"]) == (11, "failed")
    assert "SIGKILL" in cold.task("forge")["reason"]


@pytest.mark.attack(
    "forged verdict beside an older marker of the same task",
    by="image",
    holds="11: the older marker vouches for nothing",
)
def test_forged_verdict_with_older_marker_is_failed(cli: Cli) -> None:
    """The task behaves once, and forges when there is a file: its coverage, and so its marker, are the same."""
    code = f"import os\nif os.path.exists('/jit/go'): exec({FORGE!r})\n" + READY
    cli.manifest(command("forge", code))
    cli.warm()
    (cli.root / "go").touch()
    again = cli.run("warm", "--force", "--json")
    assert (again.status, again.task("forge")["state"]) == (11, "failed")


@pytest.mark.attack(
    "a task removes the kernels of an earlier task of the run",
    by="image",
    holds="11: the earlier task is failed at the end of the run",
)
def test_later_task_removing_entries_fails_earlier_task(cli: Cli) -> None:
    cli.manifest(shapes("first"), command("thief", "import shutil; shutil.rmtree('/jit/deep_gemm')\n" + READY))
    ended = cli.run("warm", "--json")
    assert ended.status == 11
    assert ended.task("thief")["state"] == "warmed"
    assert ended.task("first")["state"] == "failed" and ended.task("first")["verified"] is False
    assert "no longer warm at the end of the run: entries:" in ended.task("first")["reason"]


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_lock_file_replaced_by_fifo_is_refused(cli: Cli, kind: str) -> None:
    cli.manifest(shapes())
    cli.warm()
    lock = cli.root / "locks" / "run.lock"
    lock.unlink()
    if kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.symlink_to("/dev/null")
    ended = cli.start("warm", "--force", "--lock-timeout", "2s").end(20)
    assert ended.status != 0
    lock.unlink()


def test_foreign_directory_is_refused_and_unchanged(cli: Cli) -> None:
    cli.root.mkdir()
    (cli.root / "photos").mkdir()
    cli.manifest(shapes())
    for verb in ("check", "warm", "doctor", "status", "verify", "prune", "sweep"):
        ended = cli.run(verb, "--json")
        assert ended.status == 12
        assert "no cache root, and not empty (photos is in it)" in ended.document["error"]["problems"][0]["text"]
    assert [path.name for path in cli.root.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("verb", "status"), [("doctor", 0), ("check", 10), ("explain", 0), ("status", 12), ("env", 10)]
)
def test_reading_verb_creates_no_cache_root(cli: Cli, verb: str, status: int) -> None:
    cli.manifest(shapes())
    assert cli.run(verb).status == status
    assert not cli.root.exists()


@pytest.mark.attack(
    "a reference of the model store names a path outside of it",
    by="manifest",
    holds="nothing outside of the store is read",
)
def test_model_store_reference_outside_store_is_refused(cli: Cli, elsewhere: Door) -> None:
    """Read through the engine, as a store of another machine is; the reference names a file above the copy."""
    cli.model("org/m")
    cli.root.mkdir()
    target = cli.place / "stolen"
    (cli.store / "config.json").write_text("{}")
    (cli.store / "hub" / "models--org--m" / "refs" / "main").write_text("../" * 30 + str(target).lstrip("/"))
    cli.manifest({"model": "org/m", "argv": ["--tp", "8"]})
    ended = cli.start("check", environ={"DOCKER_HOST": elsewhere.url}).end(60)
    assert ended.status in (10, 11)
    assert not target.exists()


@pytest.fixture
def elsewhere(docker_host: str) -> Iterator[Door]:
    """The engine behind a port: nobody can be sure to see its file system."""
    door = Door(docker_host)
    yield door
    door.close()


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        (["RUN rm /usr/bin/python3"], 12, "cannot run python3"),
        (["ONBUILD RUN false"], 12, "ONBUILD"),
        (["ENV PYTHONSAFEPATH=1"], 0, "1 warmed"),
    ],
)
def test_unusual_images_are_warmed_or_named(
    cli: Cli, lines: list[str], status: int, says: str, request: pytest.FixtureRequest
) -> None:
    tag = "warm-cache-test:hard"
    image_from(cli, tag, *lines)
    request.addfinalizer(lambda: remove_image(cli, tag))
    cli.image = tag
    cli.manifest(shapes())
    ended = cli.run("warm")
    assert ended.status == status, ended.said
    assert says in ended.said


@pytest.mark.attack(
    "a job of more bytes than the kernel takes in one variable",
    by="manifest",
    holds="2: refused before anything is created",
)
def test_job_too_large_for_environment_is_refused(cli: Cli) -> None:
    cli.manifest(command("long", READY + "#" * 140_000))
    ended = cli.run("warm", "--json")
    assert ended.status == 2
    assert "limit for one variable" in ended.document["error"]["message"]


def test_env_prints_variables_of_the_warm_up(cli: Cli) -> None:
    both = {"SGLANG_X": "1"}
    cli.model("org/m")
    cli.manifest(shapes("a", env={**both, "SGLANG_A": "1"}), shapes("b", env=both), defaults={"env": {"DG_Y": "2"}})
    cold = cli.run("env")
    assert cold.status == 10
    cli.warm()
    warm = cli.run("env")
    assert warm.status == 0
    words = shlex.split(warm.out)
    assert {"SGLANG_X=1", "DG_Y=2", "HF_HOME=/models"} <= set(words)
    assert not [word for word in words if word.startswith("SGLANG_A")]


@pytest.mark.parametrize("name", ["with space", "with,comma"])
def test_env_docker_arguments_needing_quotes_are_refused(cli: Cli, name: str) -> None:
    cli.root = cli.place / name
    cli.manifest(shapes())
    cli.warm()
    ended = cli.run("env")
    assert ended.status == 2 and "--format json" in ended.err
    assert cli.run("env", "--format", "json").status == 0
