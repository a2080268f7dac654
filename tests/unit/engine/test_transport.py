"""How an engine is reached: by a first request that decides nothing, and never by the docker command's context."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine
from builder.engine.transport import context_host
from builder.errors import EngineLostError


class Played:
    """An engine of which only the first line of each request is looked at. oldest, newest: versions of its API."""

    def __init__(self, info: Mapping[str, Any] | bytes, *, newest: str = "1.41", oldest: str = "1.12") -> None:
        self.asked: list[str] = []
        self.files: dict[str, object] = {}
        self._info = info if isinstance(info, bytes) else json.dumps(info).encode()
        self._newest, self._oldest = newest, oldest

    def answer(self, request: bytes) -> bytes:
        path = request.split(b" ", 2)[1].decode()
        self.asked.append(path)
        version, _, name = path.removeprefix("/v").partition("/") if path.startswith("/v1") else ("", "", path[1:])
        bodies = {
            "info": self._info,
            "version": json.dumps({"ApiVersion": self._newest, "MinAPIVersion": self._oldest}).encode(),
            "_ping": b"OK",
            **{path[1:]: json.dumps(answer).encode() for path, answer in self.files.items()},
        }
        old = version and [int(part) for part in version.split(".")] < [int(part) for part in self._oldest.split(".")]
        status = "400 Bad Request" if old else "200 OK" if name in bodies else "404 Not Found"
        body = bodies.get(name, b"{}")
        head = f"HTTP/1.1 {status}\r\nApi-Version: {self._newest}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


@contextmanager
def played(path: Path, engine: Played) -> Iterator[Engine]:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                if request := connection.recv(65536):
                    connection.sendall(engine.answer(request))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    client = Engine(f"unix://{path}", timeout=5)
    try:
        yield client
    finally:
        client.close()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def here() -> dict[str, str]:
    return {"Name": os.uname().nodename, "KernelVersion": os.uname().release}


def test_connect_needs_one_request(tmp_path: Path) -> None:
    engine = Played(here())
    with played(tmp_path / "s", engine) as client:
        assert client.connect().local
        assert client.api_version == "1.41"
    assert engine.asked == ["/info", "/v1.41/_ping"]


def test_greeting_and_image_need_no_other_request(tmp_path: Path) -> None:
    engine = Played(here())
    engine.files["/images/org/model:1/json"] = {"Id": "sha256:1", "Config": {"WorkingDir": "/w"}}
    with played(tmp_path / "s", engine) as client:
        found = client.greet().image("org/model:1")
        assert client.local
    assert found is not None and (found.id, found.workdir) == ("sha256:1", "/w")
    assert engine.asked == ["/info", "/images/org/model:1/json"]


@pytest.mark.parametrize("info", [b"", b"no JSON", b"[]"])
def test_greeting_not_understood_connects(tmp_path: Path, info: bytes) -> None:
    engine = Played(info)
    with played(tmp_path / "s", engine) as client:
        assert client.greet().api_version == "1.41"


def test_greeting_of_too_old_engine_is_refused(tmp_path: Path) -> None:
    with played(tmp_path / "s", Played(here(), newest="1.39")) as client, pytest.raises(EngineLostError) as lost:
        client.greet()
    assert "it has API 1.39" in lost.value.message


@pytest.mark.parametrize("url", ["unix:///nonexistent/docker.sock", "nonsense"])
def test_greeting_without_engine_names_address(url: str) -> None:
    with pytest.raises(EngineLostError) as lost:
        Engine(url, timeout=2).greet()
    assert url in lost.value.message


@pytest.mark.parametrize("other", ["Name", "KernelVersion"])
def test_engine_of_other_host_is_not_local(tmp_path: Path, other: str) -> None:
    with played(tmp_path / "s", Played({**here(), other: "another"})) as client:
        assert not client.connect().local


def test_engine_without_our_version_gets_its_oldest(tmp_path: Path) -> None:
    engine = Played(here(), newest="1.99", oldest="1.98")
    with played(tmp_path / "s", engine) as client:
        assert client.connect().api_version == "1.98"
        assert client.local
    assert "/version" in engine.asked


def test_engine_too_old_is_refused(tmp_path: Path) -> None:
    with played(tmp_path / "s", Played(here(), newest="1.39")) as client, pytest.raises(EngineLostError) as lost:
        client.connect()
    assert "it has API 1.39" in lost.value.message


@pytest.mark.parametrize("info", [b"", b"no JSON", b"[]", b"[" * 10000])
def test_engine_without_headers_is_queried(tmp_path: Path, info: bytes) -> None:
    engine = Played(info)
    with played(tmp_path / "s", engine) as client:
        assert client.connect().api_version == "1.41"
        engine._info = json.dumps(here()).encode()
        assert client.local


def context(folder: Path, name: str, host: object = "unix:///run/user/1000/docker.sock") -> None:
    meta = folder / "contexts/meta" / hashlib.sha256(name.encode()).hexdigest()
    meta.mkdir(parents=True)
    (meta / "meta.json").write_text(json.dumps({"Name": name, "Endpoints": {"docker": {"Host": host}}}))


def test_context_host_is_that_of_the_current_context(tmp_path: Path) -> None:
    context(tmp_path, "rootless")
    context(tmp_path, "far", "ssh://gpu1")
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    assert context_host(environ) is None
    (tmp_path / "config.json").write_text('{"currentContext": "rootless"}')
    assert context_host(environ) == "unix:///run/user/1000/docker.sock"
    assert context_host({**environ, "DOCKER_CONTEXT": "far"}) == "ssh://gpu1"
    assert context_host({**environ, "DOCKER_CONTEXT": "gone"}) is None


@pytest.mark.parametrize("config", ["", "[]", "{", '{"currentContext": 3}', '{"currentContext": null}'])
def test_context_host_of_junk_is_none(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert context_host({"DOCKER_CONFIG": str(tmp_path)}) is None


@pytest.mark.parametrize("host", [None, 5, {}])
def test_context_host_of_junk_meta_is_none(tmp_path: Path, host: object) -> None:
    context(tmp_path, "odd", host)
    assert context_host({"DOCKER_CONFIG": str(tmp_path), "DOCKER_CONTEXT": "odd"}) is None
