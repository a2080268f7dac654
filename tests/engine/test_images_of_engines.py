"""Images as engines have them: ids that are digests of manifests (a stub), and users that cannot do the work."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.engine.client import Engine
from builder.errors import EngineRefusedError
from tests.engine.cli import Cli, shapes
from tests.engine.digests import OtherStore

pytestmark = pytest.mark.engine


@pytest.fixture
def user_image(engine: Engine, tiny_image: str) -> Iterator[str]:
    """A repository for images of this test, removed at its end."""
    name = f"warm-cache-test-{os.urandom(6).hex()}"
    yield name
    for image in engine.images():
        for tag in image.tags:
            if tag.startswith(f"{name}:"):
                with contextlib.suppress(EngineRefusedError):
                    engine.remove_image(tag)


def with_user(engine: Engine, base: str, tag: str, user: str) -> str:
    return with_line(engine, base, tag, f"USER {user}")


def with_line(engine: Engine, base: str, tag: str, line: str) -> str:
    text = f"FROM {base}\n{line}\n".encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    return engine.build(buffer.getvalue(), tag=tag).ref


def test_doctor_and_warm_name_a_user_that_is_not_there_or_cannot_write(
    cli: Cli, engine: Engine, user_image: str
) -> None:
    cli.root.mkdir(exist_ok=True)
    gone = with_user(engine, cli.image, f"{user_image}:gone", "nosuchuser")
    cli.manifest(shapes(), image={"ref": gone})
    doctor = cli.run("doctor")
    assert doctor.status == 12 and "unable to find user nosuchuser" in doctor.said
    assert "its containers run as nosuchuser, whose number is in the image alone" in doctor.said
    other = with_user(engine, cli.image, f"{user_image}:other", "1234")
    cli.manifest(shapes(), image={"ref": other})
    for verb in ("doctor", "warm"):
        ended = cli.run(verb)
        assert ended.status == 12, ended.said
        assert f"user 1234 (USER of {other}), which cannot write {cli.root}" in ended.said
        assert f"Run: sudo chown -R 1234 {cli.root}" in ended.said


def test_mount_path_that_is_a_file_in_the_image_is_named(cli: Cli, engine: Engine, user_image: str) -> None:
    cli.root.mkdir(exist_ok=True)
    line = 'RUN ["python3", "-c", "open(\'/jit\', \'w\')"]'
    cli.manifest(shapes(), image={"ref": with_line(engine, cli.image, f"{user_image}:file", line)})
    ended = cli.run("warm")
    assert ended.status == 12, ended.said
    assert "not a directory" in ended.said and "what it has at the cache's mount path" in ended.said


def test_root_is_warm_for_engine_whose_ids_are_digests_of_manifests(cli: Cli, tmp_path: Path) -> None:
    """Warmed in one image store, checked, forced, pruned and swept in another; and back."""
    cli.manifest(shapes(), image={"setup": [f"true {tmp_path}"]})
    cli.warm()
    here, known = cli.host, len(cli.markers())
    door = OtherStore(here, tmp_path / "other.sock")
    try:
        cli.host = door.url
        check = cli.run("check", "--json", "--strict")
        assert check.status == 0, check.said
        assert not [path for path in door.asked("POST") if "/containers" in path or "/build" in path]
        again = cli.warm("--force", "--json")
        assert again.document["tasks"][0]["entries_added"] == 0, again.said
        assert (
            again.document["image"]["id"]
            != cli.run("check", "--json", environ={"DOCKER_HOST": here}).document["image"]["id"]
        )
        assert len(list((cli.root / "images").glob("*.json"))) == 2, "one memo, with both names, and the machines"
        prune = cli.run("prune", "--keep", "1", "--images", "--json")
        assert prune.status == 0 and not [step for step in prune.document["prune"]["steps"] if step["kind"] == "image"]
        assert cli.run("sweep").status == cli.run("check").status == 0
    finally:
        cli.host = here
        door.close()
    assert cli.run("check").status == 0 and len(cli.markers()) == known
