"""Every failure of an engine becomes one sentence that says what to do; docker-py stays behind its border."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builder.engine.api import ContainerSpec, Mount
from builder.engine.client import Engine
from builder.engine.errors import NotFoundError, is_transient, loss, refusal
from builder.errors import EngineLostError, EngineRefusedError, EngineTimeoutError


@pytest.mark.parametrize(
    ("explanation", "told"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "install nvidia-container-toolkit"),
        (
            'invalid mount config for type "bind": bind source path does not exist: /data/x y',
            "has no /data/x y: create it",
        ),
        ("error setting rlimit type 8: operation not permitted", "CAP_SYS_RESOURCE"),
        ("write /var/lib/docker/x: no space left on device", "free space"),
        ("network nowhere not found", "docker network create"),
    ],
)
def test_refusal_keeps_engine_message_and_adds_remedy(explanation: str, told: str) -> None:
    error = refusal("cannot start it", 500, explanation)
    assert error.message.startswith(f"cannot start it: {explanation}")
    assert told in error.message
    assert (error.status, error.exit_code) == (500, 16)


def test_refusal_without_message_names_status() -> None:
    assert refusal("cannot start it", 503, "").message == "cannot start it: the engine answered with status 503"


def test_refusal_404_is_not_found() -> None:
    assert isinstance(refusal("x", 404, "No such container: y"), NotFoundError)
    assert not isinstance(refusal("x", 409, "Conflict"), NotFoundError)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOENT, "systemctl start docker"),
        (errno.ECONNREFUSED, "nothing listens there"),
        (errno.EACCES, "group docker"),
        (errno.ENETUNREACH, "Network is unreachable"),
    ],
)
def test_loss_names_innermost_cause(number: int, told: str) -> None:
    packed = Exception("Connection aborted.", OSError(number, os.strerror(number)))
    assert told in loss("cannot reach it", packed).message


def test_transient_errors_are_broken_connections_only() -> None:
    assert is_transient(EngineLostError("x"))
    for error in (EngineRefusedError("x"), NotFoundError("x"), EngineTimeoutError("x"), OSError("x")):
        assert not is_transient(error)


# --- the real client against sockets that are no engines ---


@contextmanager
def listening(path: Path, answer: Callable[[bytes], bytes | None]) -> Iterator[str]:
    """A unix socket whose every request gets this answer; None: silence."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            held.append(connection)
            request = connection.recv(65536)
            reply = answer(request) if request else b""
            if reply:
                connection.sendall(reply)
            if reply is not None:
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"unix://{path}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)
        for connection in held:
            connection.close()


def http(body: object, status: str = "200 OK") -> bytes:
    data = json.dumps(body).encode() if not isinstance(body, bytes) else body
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


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


# --- what is asked of the engine ---


def test_create_request_body_is_exact() -> None:
    spec = ContainerSpec(
        image="i",
        name="n",
        command=["c"],
        entrypoint=["e"],
        env={"A": "b=c"},
        labels={"l": "v"},
        mounts=(Mount("/a", "/b", read_only=True), Mount("v", "/c", kind="volume")),
        gpus=8,
        shm_size=32 << 30,
        network="none",
        stop_timeout=9,
        workdir="/w",
        stdin=True,
    )
    assert spec.body() == {
        "Image": "i",
        "Cmd": ["c"],
        "Entrypoint": ["e"],
        "Env": ["A=b=c"],
        "Labels": {"l": "v"},
        "WorkingDir": "/w",
        "StopTimeout": 9,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "OpenStdin": True,
        "StdinOnce": True,
        "HostConfig": {
            "Init": True,
            "IpcMode": "private",
            "ShmSize": 32 << 30,
            "NetworkMode": "none",
            "Mounts": [{"Type": "bind", "Source": "/a", "Target": "/b", "ReadOnly": True}],
            "Binds": ["v:/c:nocopy"],
            "Tmpfs": {},
            "Ulimits": [
                {"Name": "memlock", "Soft": -1, "Hard": -1},
                {"Name": "stack", "Soft": 67108864, "Hard": 67108864},
            ],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "1000g", "max-file": "1"}},
            "DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]], "Count": 8}],
        },
    }


@pytest.mark.parametrize(("gpus", "wanted"), [(-1, {"Count": -1}), (("2", "5"), {"DeviceIDs": ["2", "5"]})])
def test_gpus_by_count_or_index_are_device_requests(gpus: int | tuple[str, ...], wanted: dict[str, object]) -> None:
    host = ContainerSpec(image="i", name="n", gpus=gpus).body()["HostConfig"]
    assert host["DeviceRequests"] == [{"Driver": "", "Capabilities": [["gpu"]], **wanted}]


def test_gpus_none_is_no_device_request() -> None:
    body = ContainerSpec(image="i", name="n").body()
    assert "DeviceRequests" not in body["HostConfig"]
    assert not {"Cmd", "Entrypoint", "WorkingDir"} & body.keys()


# --- pulls, against an engine that answers by the book ---


def pulled(*messages: dict[str, object], found: bool = True) -> Callable[[bytes], bytes]:
    """An engine whose pull sends these messages."""

    def answer(request: bytes) -> bytes:
        path = request.split(b" ", 2)[1]
        if b"/images/create" in path:
            return http(b"\r\n".join(json.dumps(message).encode() for message in messages) + b"\r\n")
        if b"/images/" in path:
            none = http({"message": "No such image"}, "404 Not Found")
            return http({"Id": "sha256:x", "Config": None}) if found else none
        return http({"ApiVersion": "1.41", "MinAPIVersion": "1.12"})

    return answer


def layer(name: str, status: str, current: int = 0, total: int = 0) -> dict[str, object]:
    return {"id": name, "status": status, "progressDetail": {"current": current, "total": total} if total else {}}


def test_pull_progress_repeats_nothing(tmp_path: Path) -> None:
    messages: list[dict[str, object]] = [
        {"id": "v1", "status": "Pulling from sglang"},
        layer("a", "Already exists"),
        layer("b", "Pulling fs layer"),
        *(layer("b", "Downloading", at << 20, 4 << 30) for at in range(0, 4096, 64)),
        layer("b", "Extracting", 1, 2),
        layer("b", "Pull complete"),
        {"status": "Status: Downloaded newer image"},
    ]
    said: list[str] = []
    with listening(tmp_path / "s", pulled(*messages)) as url, contextlib.closing(Engine(url, timeout=2)) as engine:
        assert engine.pull("sglang:v1", said.append).id == "sha256:x"
    assert said == [
        "sglang:v1: 1 of 1 layers",
        "sglang:v1: 1 of 2 layers",
        "sglang:v1: 1 of 2 layers, 0 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers, 1 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers, 2 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers, 3 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers",
        "sglang:v1: 2 of 2 layers",
    ]


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (pulled(layer("a", "Downloading", 1, 2), {"error": "manifest unknown\x1b[1m"}), "manifest unknown"),
        (pulled(found=False), "does not have it"),
    ],
)
def test_pull_failure_names_reason(tmp_path: Path, engine: Callable[[bytes], bytes], told: str) -> None:
    with (
        listening(tmp_path / "s", engine) as url,
        contextlib.closing(Engine(url, timeout=2)) as client,
        pytest.raises(EngineRefusedError, match=told) as refused,
    ):
        client.pull("sglang:v1")
    assert refused.value.message.startswith("cannot pull sglang:v1: ")
    assert "\x1b" not in refused.value.message
