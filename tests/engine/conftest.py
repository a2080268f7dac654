"""Each test of a container gets a workshop of its own, and fails when it leaves something there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.engine import Engine
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
