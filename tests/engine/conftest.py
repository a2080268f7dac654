"""Each test of a container gets a workshop of its own, and fails when it leaves something there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from builder.engine.client import Engine
from tests.engine import faults
from tests.engine.cli import READY, Cli, a_cli, command, request  # noqa: F401 - a fixture
from tests.engine.gpumachine import gpu_image
from tests.engine.workshop import Proxy, Workshop


@pytest.fixture
def workshop(engine: Engine, tiny_image: str, tmp_path: Path) -> Iterator[Workshop]:
    """Fails a test that leaves a container behind, whatever else it found."""
    shop = Workshop(engine, tiny_image, tmp_path)
    with shop.lease:
        yield shop
        left = shop.left()
        for container in shop.ids():
            engine.remove(container, force=True)
        assert left == [], "containers were left behind"


@pytest.fixture
def proxy(docker_host: str, tmp_path: Path) -> Iterator[Proxy]:
    if not docker_host.startswith("unix://"):
        pytest.skip("only an engine behind a unix socket can be put behind another one")
    made = Proxy(tmp_path / "proxy.sock", docker_host)
    yield made
    made.close()


@pytest.fixture
def volume(cli: Cli) -> Iterator[str]:
    """The name of a volume that does not exist yet; removed at the end, after the containers of `cli`."""
    name = f"test-{os.urandom(6).hex()}"
    yield name
    cli.close()
    with cli.engine() as engine:
        if engine.has_volume(name):
            request(engine, "DELETE", "/volumes/{0}", name)


@pytest.fixture(scope="session")
def gpu_images(
    tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str
) -> Iterator[Callable[[int], str]]:
    """``gpu_images(count)``: the tag of the tiny image with so many simulated GPUs, built once."""
    with contextlib.ExitStack() as stack:

        @cache
        def built(count: int) -> str:
            context = tmp_path_factory.mktemp("gpu-image")
            return stack.enter_context(gpu_image(context, docker_host, tiny_image, count))

        yield built


@pytest.fixture(scope="session")
def known_image(tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Path:
    """A cache root without kernels and markers, that knows the image: nobody has to wait for a probe."""
    cli = Cli(tmp_path_factory.mktemp("known"), docker_host, tiny_image)
    cli.manifest(command("nothing", READY))
    cli.warm()
    cli.close()
    shutil.rmtree(cli.root / "markers")
    return cli.root


@pytest.fixture
def aftermath(request: pytest.FixtureRequest, known_image: Path, tmp_path: Path) -> faults.Aftermath:
    """For a test of a fault: its clock, what has to be true when it is over, and the cache root of its `cli`."""
    shutil.copytree(known_image, tmp_path / "cache")
    return faults.Aftermath.of(request)


@pytest.fixture(scope="session")
def own_engine(
    tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str
) -> Iterator[faults.OwnEngine]:
    """An engine that tests may kill; none of them may count on how it was started."""
    if reason := faults.why_no_own_engine():
        pytest.skip(reason)
    engine = faults.OwnEngine(tmp_path_factory.mktemp("engine"))
    engine.up()
    try:
        engine.load(tiny_image, docker_host)
        yield engine
    finally:
        engine.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    seconds = session.config.stash.get(faults.SECONDS, {})
    if os.environ.get(faults.WRITE) == "1" and seconds:
        faults.write(seconds)
