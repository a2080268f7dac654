"""Whatever answers at an engine's address, with whatever status and body: an EngineLostError in one sentence."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.engine import answers
from builder.engine.api import ContainerSpec
from builder.engine.client import Engine
from builder.errors import EngineLostError, EngineRefusedError
from tests.fakes import http, listening

INFO = {"ID": "X", "Name": "host", "ServerVersion": "20.10"}
HTML = b"<html>\n<body>\x1b[31m502 Bad Gateway</body></html>"
#: Bodies that no engine gives; each is sent with every status.
BODIES: dict[str, bytes] = {
    "empty": b"",
    "html": HTML,
    "null": b"null",
    "number": b"7",
    "text": b'"x"',
    "true": b"true",
    "list": b"[]",
    "list-of-numbers": b"[1]",
    "list-of-lists": b"[[]]",
    "list-of-empty": b"[{}]",
    "object": b"{}",
    "error-text": b'{"error":"no backend"}',
    "error-object": b'{"error":{"code":7}}',
    "message-object": b'{"message":{"a":1}}',
    "message-null": b'{"message":null}',
    "wrong-fields": json.dumps(
        {
            **dict.fromkeys(("Id", "State", "Config", "Name", "Labels", "Volumes", "Descriptor", "RepoDigests"), 7),
            "Status": [],
            "HostConfig": "x",
        }
    ).encode(),
    "wrong-entries": json.dumps([{"Id": "x", "Names": 7, "Labels": [], "Mounts": "x", "RepoTags": {}}]).encode(),
    "deep": b"[" * 100_000,
    "bad-utf-8": b'{"message":"\xff\xfe"}',
    "huge-number": b'{"Id":' + b"9" * 5000 + b"}",
}
STATUSES = ("200 OK", "404 Not Found", "503 Service Unavailable")


def calls() -> dict[str, tuple[str, Callable[[Engine], Any]]]:
    """Return the part of its request that names each endpoint, and a call that makes it."""
    spec = ContainerSpec(image="i", name="n")
    return {
        "info": ("/info", lambda engine: engine.info),
        "create": ("/containers/create", lambda engine: engine.create(spec)),
        "start": ("/start", lambda engine: engine.start("c")),
        "state": ("/containers/c/json", lambda engine: engine.state("c")),
        "stop": ("/stop", lambda engine: engine.stop("c", 0)),
        "remove": ("DELETE", lambda engine: engine.remove("c")),
        "containers": ("/containers/json", lambda engine: engine.containers(["l"])),
        "containers_with_gpus": ("/containers/json", lambda engine: engine.containers_with_gpus()),
        "attach": ("/attach", lambda engine: engine.attach_output("c").close()),
        "logs": ("/logs", lambda engine: list(engine.log_frames("c", follow=False))),
        "archive": ("/archive", lambda engine: list(engine.archive("c", "/x"))),
        "link_target": ("/archive", lambda engine: engine.link_target("c", "/x")),
        "image": ("/images/i/json", lambda engine: engine.image("i")),
        "images": ("/images/json", lambda engine: engine.images()),
        "images_in_use": ("/containers/json", lambda engine: engine.images_in_use()),
        "remove_image": ("DELETE", lambda engine: engine.remove_image("i")),
        "registry_digest": ("/distribution", lambda engine: engine.registry_digest("i")),
        "pull": ("/images/create", lambda engine: engine.pull("i")),
        "build": ("/build", lambda engine: engine.build(b"", tag="t")),
        "volume": ("/volumes/v", lambda engine: engine.volume("v")),
        "volumes": ("/volumes", lambda engine: engine.volumes("l")),
        "create_volume": ("/volumes/create", lambda engine: engine.create_volume("v", options={}, labels={})),
        "remove_volume": ("DELETE", lambda engine: engine.remove_volume("v")),
        "users": ("/containers/json", lambda engine: engine.users("v")),
        "mounting": ("/containers/json", lambda engine: engine.mounting(["s"])),
    }


@contextlib.contextmanager
def answering(path: Path, part: str) -> Iterator[tuple[Engine, list[bytes]]]:
    """Yield an engine that gives the last of these answers to requests with this part, and says 404 to all others."""
    replies = [b""]

    def answer(request: bytes) -> bytes:
        head = request.split(b"\r\n", 1)[0].decode()
        if head.startswith("GET /info "):
            return http(INFO).replace(b"\r\n", b"\r\nApi-Version: 1.41\r\n", 1)
        if "/_ping" in head:
            return http(b"OK")
        return replies[-1] if part in head else http({"message": "no such thing"}, "404 Not Found")

    with listening(path, answer) as url, contextlib.closing(Engine(url, timeout=5).connect()) as engine:
        yield engine, replies


def closing(body: bytes, status: str) -> bytes:
    """Return an answer after which the connection ends, so that none is used twice."""
    return http(body, status).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


def outcome(engine: Engine, call: Callable[[Engine], Any]) -> EngineLostError | None:
    try:
        call(engine)
    except EngineLostError as error:
        return error
    return None


@pytest.mark.parametrize("endpoint", calls())
def test_any_answer_is_a_result_or_one_sentence(tmp_path: Path, endpoint: str) -> None:
    part, call = calls()[endpoint]
    with answering(tmp_path / "s", part) as (engine, replies):
        for status, (name, body) in itertools.product(STATUSES, BODIES.items()):
            replies.append(closing(body, status))
            error = outcome(engine, call)
            if error is None:  # nothing but success, and what does not exist, is a result
                assert status.startswith(("2", "404")), (status, name)
            else:
                assert "\n" not in error.message and "\x1b" not in error.message, (status, name)
                assert error.message.startswith(("cannot ", "building ", "the engine ")), (status, name)
                assert isinstance(error, EngineRefusedError), (status, name, error)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"message":"no space"}', "no space"),
        (b'{"error":"no\\nbackend"}', "no backend"),
        (b"[1]", "[1]"),
        (b'"x"', "x"),
        (b"", ""),
        (HTML, "<html> <body>502 Bad Gateway</body></html>"),
    ],
)
def test_explanation_is_one_line(body: bytes, text: str) -> None:
    assert answers.explanation(body) == text


def test_connect_to_any_answer_is_refused(tmp_path: Path) -> None:
    replies = [b""]
    with listening(tmp_path / "s", lambda request: replies[-1]) as url:
        for status, body in itertools.product(STATUSES, BODIES.values()):
            replies.append(closing(body, status))
            error = outcome(Engine(url, timeout=5), lambda engine: engine.connect())
            assert error is not None and "\n" not in error.message
            assert url in error.message
