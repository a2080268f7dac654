"""The real client against sockets that are no engines, or bad ones."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from builder.engine.client import Engine
from builder.errors import EngineLostError, EngineTimeoutError
from tests.fakes import http, listening


def test_connect_without_engine_names_address_and_remedy(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/docker.sock"
    with pytest.raises(EngineLostError) as lost:
        Engine(url).connect()
    assert url in lost.value.message
    assert "DOCKER_HOST" in lost.value.message
    assert "systemctl start docker" in lost.value.message
    assert "Traceback" not in lost.value.message


@pytest.mark.parametrize(
    "url", ["tcp://127.0.0.1:1", "nonsense", "ssh://", "ssh://-oProxyCommand=x", "tcp://host:port:x"]
)
def test_connect_to_bad_address_is_named(url: str) -> None:
    with pytest.raises(EngineLostError) as lost:
        Engine(url, timeout=2).connect()
    assert url in lost.value.message


def test_connect_to_silent_socket_times_out(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "s", lambda request: None) as url,
        pytest.raises(EngineTimeoutError, match="no answer in time"),
    ):
        Engine(url, timeout=0.2).connect()


def test_attach_to_silent_engine_times_out(tmp_path: Path) -> None:
    def answer(request: bytes) -> bytes | None:
        return None if b"/attach" in request else http({"ApiVersion": "1.41", "MinAPIVersion": "1.12"})

    with listening(tmp_path / "s", answer) as url:
        engine = Engine(url, timeout=0.3).connect()
        with pytest.raises(EngineTimeoutError):
            engine.attach_output("x")
        engine.close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (http({"ApiVersion": "1.39", "MinAPIVersion": "1.12"}), "it has API 1.39"),
        (http({"no": "version"}), "is no container engine"),
        (http(b"<html>"), "cannot reach a container engine"),
        (http(["x"]), "is no container engine"),
        (http({"message": "no"}, "403 Forbidden"), "no"),
        (b"\x00\x01garbage", "cannot reach a container engine"),
        (b"", "cannot reach a container engine"),
    ],
)
def test_connect_to_other_server_is_refused(tmp_path: Path, answer: bytes, told: str) -> None:
    with listening(tmp_path / "s", lambda request: answer) as url, pytest.raises(EngineLostError) as lost:
        Engine(url, timeout=2).connect()
    assert told in lost.value.message


@pytest.mark.parametrize(
    ("newest", "oldest", "spoken"), [("1.40", "1.12", "1.40"), ("1.99", "1.44", "1.45"), ("1.99", "1.98", "1.98")]
)
def test_api_version_is_common_to_both(tmp_path: Path, newest: str, oldest: str, spoken: str) -> None:
    from docker.constants import DEFAULT_DOCKER_API_VERSION  # noqa: TID251 - what docker-py knows is the other side

    spoken = DEFAULT_DOCKER_API_VERSION if spoken == "1.45" else spoken
    with listening(tmp_path / "s", lambda request: http({"ApiVersion": newest, "MinAPIVersion": oldest})) as url:
        engine = Engine(url, timeout=2).connect()
        assert engine.api_version == spoken
        engine.close()


def test_log_that_is_no_log_is_a_lost_engine(tmp_path: Path) -> None:
    def answer(request: bytes) -> bytes:
        return http(b"HTTP/1.1 500") if b"/logs" in request else http({"ApiVersion": "1.41", "MinAPIVersion": "1.12"})

    with (
        listening(tmp_path / "s", answer) as url,
        contextlib.closing(Engine(url, timeout=2)) as engine,
        pytest.raises(EngineLostError, match="cannot read the log of x: not a frame of the engine"),
    ):
        list(engine.log_frames("x", follow=False))
