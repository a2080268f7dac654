"""A warm cache costs no container: the engine's own event stream says so, and so does what it was asked."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine
from tests.engine.cli import LABEL, Cli, Ended, command, shapes
from tests.engine.door import Door

pytestmark = pytest.mark.engine

KERNEL = "from triton.cache import compile_kernel; compile_kernel('k', 'x'); print('KERNELS READY')"


class Watched(Cli):
    """Its builders reach the engine through a door."""

    def __init__(self, place: Path, host: str, image: str) -> None:
        if not host.startswith("unix://"):
            pytest.skip("only an engine behind a unix socket can be put behind another one")
        self.door = Door(host, place / "door.sock")
        super().__init__(place, self.door.url, image)

    def asked_to_write(self) -> list[str]:
        """What was asked of the engine beyond reading, since this was last called."""
        writes = [request for request in self.door.requests if not request.startswith(("GET ", "HEAD "))]
        self.door.requests.clear()
        return writes


def now() -> str:
    """In the engine's words; behind a unix socket its clock is ours."""
    return f"{time.time():.9f}"


def created(engine: Engine, cli: Cli, since: str) -> list[str]:
    """Names of the containers of this user that were created since then, as the engine's event stream has them."""
    stream = engine._api.events(since=since, until=now(), decode=True, filters={"type": "container"})
    events: list[dict[str, Any]] = [event for event in stream if event["Action"] == "create"]
    readers = tuple(f"warm-cache-read-{running.process.pid}-" for running in cli._running)
    attributes = [event["Actor"]["Attributes"] for event in events]
    return [
        item["name"]
        for item in attributes
        if f'"{cli.place}/' in item.get(f"{LABEL}lease", "") or item["name"].startswith(readers)
    ]


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Iterator[Watched]:
    cli = Watched(tmp_path_factory.mktemp("warmed"), docker_host, tiny_image)
    cli.manifest(shapes(), command("command", KERNEL, families=["triton"]))
    with cli.engine() as engine:
        began = now()
        cli.warm()
        names = created(engine, cli, began)
    # The root is new: one container makes it and holds its lock, one shows that the engine has the same directory.
    kinds = ["read" if name.startswith("warm-cache-read-") else name.split("-", 3)[3] for name in names]
    assert kinds == ["probe-probe", "lock-lock", "read", "run-shapes", "run-command"]
    assert len([write for write in cli.asked_to_write() if "/containers/create" in write]) == 5
    yield cli
    cli.close()
    cli.door.close()


def quickly(cli: Cli, verb: str, *options: str) -> Ended:
    """A run that took less than a second of CPU: other work on the machine is not the program's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = cli.run(verb, *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert ended.seconds < 5, "it waited for something"
    return ended


def test_second_run_creates_no_container(warmed: Watched) -> None:
    with warmed.engine() as engine:
        began = now()
        ended = quickly(warmed, "warm")
        assert created(engine, warmed, began) == []
    assert warmed.asked_to_write() == []
    assert ended.status == 0
    assert ended.out.startswith("warm-cache: 2 of 2 tasks warm for toolchain ")
    assert ended.out.endswith(". Nothing to do.\n")
    assert ended.out.count("\n") == 1
    assert ended.err == ""


@pytest.mark.parametrize(
    ("verb", "options", "text"),
    [
        ("check", (), "2 of 2 tasks warm"),
        ("check", ("--strict", "--only", "org/shapes"), "1 of 1 task warm"),
        ("explain", (), "shapes: warm, since "),
        ("status", (), "this image"),
        ("env", ("--format", "docker"), "-e TRITON_CACHE_DIR=/jit/triton/"),
    ],
)
def test_reading_verbs_start_no_container(warmed: Watched, verb: str, options: tuple[str, ...], text: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in warmed.root.rglob("*")}
    ended = quickly(warmed, verb, *options)
    assert warmed.asked_to_write() == []
    assert ended.status == 0
    assert text in ended.out
    assert {path: path.stat().st_mtime_ns for path in warmed.root.rglob("*")} == before


def test_warm_check_loads_neither_events_nor_job(warmed: Watched) -> None:
    ended = warmed.run("check", environ={"PYTHONPROFILEIMPORTTIME": "1"})
    loaded = {line.rpartition("|")[2].strip() for line in ended.err.splitlines()}
    assert ended.status == 0
    assert "builder.cache.markers" in loaded
    assert not loaded & {"builder.events", "builder.job", "builder.engine.container", "builder.engine.log_pump"}


def test_cold_check_of_known_image_starts_nothing(warmed: Watched) -> None:
    warmed.manifest(shapes(), command("command", KERNEL, families=["triton"]), shapes("new"))
    try:
        ended = warmed.run("check", "--json")
        assert warmed.asked_to_write() == []
        assert ended.status == 10
        assert [task["state"] for task in ended.document["tasks"]] == ["warm", "warm", "cold"]
        assert ended.task("new")["reason"] == "no-marker"
    finally:
        warmed.manifest(shapes(), command("command", KERNEL, families=["triton"]))


def test_force_on_warm_task_adds_no_entries(warmed: Watched) -> None:
    before = {path: path.stat().st_ino for path in warmed.markers()}
    ended = warmed.warm("--force", "--only", "shapes")
    assert [task["label"] for task in ended.document["tasks"]] == ["shapes"]
    task = ended.task("shapes")
    assert (task["state"], task["entries_added"], task["verified"]) == ("warmed", 0, True)
    # The task's, and the one that shows that the engine has the same directory.
    assert len([write for write in warmed.asked_to_write() if "/containers/create" in write]) == 2
    after = {path: path.stat().st_ino for path in warmed.markers()}
    assert before.keys() == after.keys()
    assert sum(before[path] != after[path] for path in after) == 1
    assert json.loads(warmed.markers()[1].read_text())["label"] == "shapes"


def test_other_tag_of_same_image_is_warm(warmed: Watched) -> None:
    with warmed.engine() as engine:
        name = f"warm-cache-test-{warmed.place.name}"
        engine._api.tag(warmed.image, name, "alias")
        try:
            assert warmed.run("check", "--image", f"{name}:alias").status == 0
            assert warmed.asked_to_write() == []
        finally:
            engine._api.remove_image(f"{name}:alias", noprune=True)
