"""Registries that the tests of this folder share, and no credentials of the person who runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registries import StandIn, stand_in

LOGIN = ("builder", "s3cret-of-the-tests")


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which this test's `docker login` keeps credentials: it has none."""
    folder = tmp_path / "docker-config"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """A registry that speaks plain http and asks for no login. Tests use repositories of their own names."""
    with stand_in(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="session")
def registry_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """A registry that speaks TLS with a certificate of its own, and asks for LOGIN."""
    with stand_in(tmp_path_factory.mktemp("registry-tls"), "--tls", "--auth", ":".join(LOGIN)) as found:
        yield found
