"""The client where something stands before the registry: token servers, limits, redirects, broken connections."""

from __future__ import annotations

import base64
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from builder.errors import Interrupted, RegistryLostError, RegistryRefusedError
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.registry import client as client_module
from builder.registry import transport
from builder.registry.client import RegistryClient
from builder.registry.documents import digest_of
from builder.registry.reference import Reference, is_loopback
from tests.registries import StandIn
from tests.registry.conftest import LOGIN
from tests.registry.front import LOST, Request, TokenServer, front
from tests.registry.test_client import image, log_in

# --- tokens ----------------------------------------------------------------------------------------------------------


def test_token_is_asked_for_once_and_with_the_login(registry: StandIn, docker_config: Path) -> None:
    rule = TokenServer(base64.b64encode(":".join(LOGIN).encode()).decode())
    with front(registry.host, rule) as before, before.client("field/token") as client:
        log_in(docker_config, before.host, *LOGIN)
        digest = image(client, os.urandom(1000), "one")
        assert client.get_manifest("one").digest == digest
        assert len(rule.issued) == 2  # to write, and to read
        assert set(rule.scopes) <= {"repository:field/token:pull,push", "repository:x:pull,push"}
        sent = [each.headers.get("Authorization", "") for each in before.requests if "/token" not in each.path]
        assert not any(value.startswith("Basic") for value in sent)


def test_token_without_a_login_and_with_a_wrong_one(registry: StandIn, docker_config: Path) -> None:
    with front(registry.host, TokenServer()) as before, before.client("field/token") as client:
        assert client.find_manifest("none") is None  # anyone gets one
    with front(registry.host, TokenServer("nobody's")) as before:
        with (
            before.client("field/token") as client,
            pytest.raises(RegistryRefusedError, match="there are no cred") as e,
        ):
            client.tags()
        assert e.value.status == 401
        log_in(docker_config, before.host, *LOGIN)
        with before.client("field/token") as client, pytest.raises(RegistryRefusedError, match="the login of builder"):
            client.tags()


def test_token_that_ends_early_is_renewed(registry: StandIn) -> None:
    rule = TokenServer()
    with front(registry.host, rule) as before, before.client("field/early") as client:
        image(client, b"layer", "one")
        rule.valid.clear()
        assert client.tags() == ("one",)
        blob = os.urandom(3_000_000)
        client.has_blob(digest_of(blob))

        def ends_while_it_is_opened() -> Iterator[bytes]:
            if len(rule.issued) < 6:
                rule.valid.clear()
            yield blob

        assert client.put_blob(digest_of(blob), len(blob), ends_while_it_is_opened) == len(blob)


@pytest.mark.attack(
    "names a token server that speaks plain http",
    by="registry",
    holds="12: no login is sent there",
)
def test_token_server_over_plain_http_gets_no_login(registry: StandIn, docker_config: Path) -> None:
    """A registry on this machine that names another host's plain http: the login stays here."""
    rule = TokenServer(realm="http://tokens.example/token")
    with front(registry.host, rule) as before, before.client("field/realm") as client:
        log_in(docker_config, before.host, *LOGIN)
        with pytest.raises(RegistryRefusedError, match=r"on to tokens.example over plain http, which only --insecure"):
            client.tags()


def test_netrc_and_proxies_of_the_environment_are_not_for_this_machine(
    registry: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\n", encoding="utf-8")
    (tmp_path / ".netrc").chmod(0o600)
    for name in ("http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with front(registry.host, lambda _: None) as before, before.client("field/netrc") as client:
        assert client.find_manifest("none") is None
        assert [each.headers.get("Authorization") for each in before.requests] == [None, None]


def test_plain_http_of_another_machine_needs_insecure(registry: StandIn) -> None:
    addresses = [each.address for found in psutil.net_if_addrs().values() for each in found if each.family == 2]
    others = [address for address in addresses if not is_loopback(address)]
    if not others:
        pytest.skip("this machine has no address but its loopback")
    with front(registry.host, lambda _: None, name=others[0]) as before:
        with (
            before.client("field/plain") as client,
            pytest.raises(RegistryRefusedError, match="Pass --insecure"),
        ):
            client.tags()
        with RegistryClient(before.reference("field/plain"), insecure=True) as client:
            assert client.find_manifest("none") is None


# --- limits and redirects --------------------------------------------------------------------------------------------


def test_rate_limit_is_waited_for(registry: StandIn) -> None:
    with registry.client("field/rate") as client:
        image(client, b"layer", "one")
    refusals = iter([1, 0])

    def rule(request: Request) -> bool | None:
        if request.path.endswith("/manifests/one") and (after := next(refusals, None)) is not None:
            return request.answer(429, b'{"errors":[{"code":"TOOMANYREQUESTS"}]}', Retry_After=str(after))
        return None

    with front(registry.host, rule) as before, before.client("field/rate") as client:
        started = time.monotonic()
        client.get_manifest("one")
        assert time.monotonic() - started >= 1
        assert len([each for each in before.requests if each.path.endswith("/one")]) == 3


def test_rate_limit_beyond_the_deadline_ends_at_once(registry: StandIn) -> None:
    with front(registry.host, lambda request: request.answer(429, Retry_After="3600")) as before:
        client = RegistryClient(before.reference("field/rate"), deadline=Deadline(60))
        started = time.monotonic()
        with client, pytest.raises(RegistryLostError, match=r"limits its rate.*it asks to wait 3600 s more"):
            client.tags()
        assert time.monotonic() - started < 10


def test_fifty_pulls_at_once_of_a_registry_that_limits_its_rate(registry: StandIn) -> None:
    """20 requests in a quarter of a second for all: each pull gets its image, and few requests are made in vain."""
    layer = os.urandom(10_000)
    with registry.client("field/fifty") as client:
        image(client, layer, "one")
    lock, window = threading.Lock(), [0.0, 0.0]

    def rule(request: Request) -> bool | None:
        with lock:
            now = time.monotonic()
            if now - window[0] >= 0.25:
                window[:] = [now, 0]
            window[1] += 1
            return request.answer(429, Retry_After="1") if window[1] > 20 else None

    def pull(_: int) -> bool:
        with before.client("field/fifty") as client:
            (found,) = client.get_manifest("one").layers
            return b"".join(client.read_blob(found.digest, found.size)) == layer

    with front(registry.host, rule) as before, ThreadPoolExecutor(50) as pool:
        assert all(pool.map(pull, range(50)))
    # A pull needs three: one for the address, and one each for the manifest and the layer.
    assert len(before.requests) < 50 * 3 * 4


@pytest.mark.attack(
    "redirects a blob to another host",
    by="registry",
    holds="it is read without the login or the token, and no message has the address with its signature",
)
def test_redirect_to_another_host_carries_no_credentials(registry: StandIn, docker_config: Path) -> None:
    layer = os.urandom(50_000)
    with registry.client("field/redirect") as client:
        image(client, layer, "one")
    rule = TokenServer()

    def to_storage(request: Request) -> bool | None:
        if rule(request):
            return True
        if "/blobs/sha256" in request.path and request.method == "GET":
            return request.answer(307, Location=f"{storage.name}{request.path}?signature=s3cret")
        return None

    with (
        front(registry.host, lambda _: None, name="localhost") as storage,
        front(registry.host, to_storage) as before,
        before.client("field/redirect") as client,
    ):
        (found,) = client.get_manifest("one").layers
        assert b"".join(client.read_blob(found.digest, found.size)) == layer
        assert [each.headers.get("Authorization") for each in storage.requests] == [None]
        path = registry.blob(found.digest)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(RegistryRefusedError) as refused:
            list(client.read_blob(found.digest, found.size))
        assert "s3cret" not in refused.value.message


@pytest.mark.attack(
    "redirects to plain http, to a file, or without end",
    by="registry",
    holds="12, each with its sentence",
)
@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://storage.example/blob", "on to storage.example over plain http"),
        ("file:///etc/passwd", "names an address that is none"),
        ("/v2/field/loop/blobs/again", "redirects more than 5 times"),
    ],
)
def test_redirect_that_is_not_followed(registry: StandIn, location: str, said: str) -> None:
    def rule(request: Request) -> bool | None:
        return request.answer(307, Location=location) if "/blobs/" in request.path else None

    with (
        front(registry.host, rule) as before,
        before.client("field/loop") as client,
        pytest.raises(RegistryRefusedError, match=said),
    ):
        list(client.read_blob(digest_of(b"x"), 1))


@pytest.mark.attack(
    "continues its list of tags at another host",
    by="registry",
    holds="12: nothing is requested there",
)
def test_list_of_tags_that_continues_elsewhere_is_refused(registry: StandIn) -> None:
    pages = {"": ("a-1", '</v2/field/pages/tags/list?n=1000&last=a-1>; rel="next"'), "last=a-1": ("b-1", "")}

    def rule(request: Request) -> bool | None:
        if "/tags/list" not in request.path:
            return None
        tag, link = pages["last=a-1" if "last=" in request.path else ""]
        return request.answer(
            200, b'{"name":"x","tags":["%s", 7, "a b"]}' % tag.encode(), **({"Link": link} if link else {})
        )

    with front(registry.host, rule) as before, before.client("field/pages") as client:
        assert client.tags() == ("a-1", "b-1")
        pages[""] = ("a-1", '<https://elsewhere.example/v2/x/tags/list>; rel="next"')
        with pytest.raises(RegistryRefusedError, match="continues its list of tags at another host"):
            client.tags()


# --- connections that break -------------------------------------------------------------------------------------------


def test_broken_download_goes_on_where_it_broke(registry: StandIn) -> None:
    layer = os.urandom(2_500_000)
    with registry.client("field/cut") as client:
        image(client, layer, "one")
    cuts = iter([1_000_000, 700_000])

    def rule(request: Request) -> int | None:
        return next(cuts, None) if "/blobs/sha256" in request.path and request.method == "GET" else None

    with front(registry.host, rule) as before, before.client("field/cut") as client:
        assert b"".join(client.read_blob(digest_of(layer), len(layer))) == layer
        ranges = [
            each.headers.get("Range") for each in before.requests if each.method == "GET" and "/sha256" in each.path
        ]
    assert ranges[0] is None
    assert len(ranges) == 3
    starts = [int(re.fullmatch(r"bytes=(\d+)-", text or "")[1]) for text in ranges[1:]]  # type: ignore[index]
    assert 0 < starts[0] < starts[1] < len(layer)


def test_broken_upload_starts_anew(registry: StandIn) -> None:
    blob, moved = os.urandom(2_500_000), list[int]()
    cuts, opened = iter([1_000_000]), list[int]()

    def rule(request: Request) -> int | None:
        return next(cuts, None) if request.method == "PUT" else None

    def stream() -> Iterator[bytes]:
        opened.append(1)
        for start in range(0, len(blob), 300_000):
            yield blob[start : start + 300_000]

    with front(registry.host, rule) as before, before.client("field/cut-up") as client:
        assert client.put_blob(digest_of(blob), len(blob), stream, moved.append) == len(blob)
        assert client.has_blob(digest_of(blob)) == len(blob)
    assert len(opened) == 2
    assert sum(moved) == len(blob)


def test_blob_whose_answer_was_lost_is_not_sent_again(registry: StandIn) -> None:
    blob, opened, moved = os.urandom(100_000), list[int](), list[int]()

    def stream() -> list[bytes]:
        opened.append(1)
        return [blob]

    def rule(request: Request) -> int | None:
        return LOST if request.method == "PUT" else None

    with front(registry.host, rule) as before, before.client("field/lost") as client:
        assert client.put_blob(digest_of(blob), len(blob), stream, moved.append) == len(blob)
    assert (len(opened), sum(moved)) == (1, len(blob))


def test_registry_that_always_breaks_is_lost(registry: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_READS", 2)
    layer = os.urandom(500_000)
    with registry.client("field/always") as client:
        image(client, layer, "one")

    def rule(request: Request) -> int | None:
        return 0 if "/blobs/sha256" in request.path else None

    with (
        front(registry.host, rule) as before,
        before.client("field/always") as client,
        pytest.raises(RegistryLostError, match="cannot read the blob field/always@sha256:"),
    ):
        list(client.read_blob(digest_of(layer), len(layer)))


def test_server_errors_are_tried_again_and_refusals_are_not(registry: StandIn) -> None:
    with registry.client("field/errors") as client:
        image(client, b"layer", "one")
    statuses = iter([500, 503, 403])

    def rule(request: Request) -> bool | None:
        if request.path.endswith("/one") and (status := next(statuses, None)):
            return request.answer(status, b'{"errors":[{"code":"DENIED","message":"no\\u001b[31m"}]}')
        return None

    with front(registry.host, rule) as before, before.client("field/errors") as client:
        with pytest.raises(RegistryRefusedError, match=r"wants a login to read the manifest.*DENIED: no\\x1b") as error:
            client.get_manifest("one")
        assert error.value.status == 403
        assert client.get_manifest("one").layers


def test_blob_that_changes_while_it_is_sent_is_named(registry: StandIn) -> None:
    with registry.client("field/changes") as client:
        for size in (900, 1100):
            with pytest.raises(RegistryRefusedError, match=r"it became (longer|shorter) while it was sent"):
                client.put_blob(digest_of(b"x" * 1000), 1000, lambda size=size: [b"x" * size])  # type: ignore[misc]


@pytest.mark.parametrize("raw", [b"[]", b'{"errors": 7}', b"\xff", b"[" * 100_000, b'{"tags": "x"}', b"1e999"])
def test_json_of_any_shape_is_one_error(registry: StandIn, raw: bytes) -> None:
    with (
        front(registry.host, lambda each: each.answer(200, raw) if "list" in each.path else None) as before,
        before.client("field/shapes") as client,
        pytest.raises(RegistryRefusedError),
    ):
        client.tags()


@pytest.mark.attack(
    "serves a manifest without end",
    by="registry",
    holds="12 after 4 MiB",
)
def test_manifest_that_never_ends_is_refused(registry: StandIn) -> None:
    def rule(request: Request) -> bool | None:
        return request.answer(200, b" " * (5 << 20)) if "/one" in request.path else None

    with (
        front(registry.host, rule) as before,
        before.client("field/endless") as client,
        pytest.raises(RegistryRefusedError, match="more than 4194304 b"),
    ):
        client.get_manifest("one")


# --- what never answers ----------------------------------------------------------------------------------------------


@pytest.fixture
def deaf() -> Iterator[str]:
    """A host that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_deadline_ends_a_wait(deaf: str) -> None:
    started = time.monotonic()
    reference = Reference(deaf, "x")
    with (
        RegistryClient(reference, deadline=Deadline(0.5)) as client,
        pytest.raises(RegistryLostError, match="deadline"),
    ):
        client.tags()
    assert time.monotonic() - started < 5


def test_signal_ends_a_wait(deaf: str) -> None:
    cancel = Cancel()
    threading.Timer(0.3, cancel.set, (15,)).start()
    started = time.monotonic()
    with RegistryClient(Reference(deaf, "x"), cancel=cancel) as client, pytest.raises(Interrupted):
        client.tags()
    assert time.monotonic() - started < 5


@pytest.mark.attack(
    "answers byte by byte without end",
    by="registry",
    holds="16 at the deadline",
)
def test_bytes_that_drip_are_ended_by_the_deadline(registry: StandIn) -> None:
    """One byte now and then is no progress: a time-out between bytes would wait for ever."""
    enough = threading.Event()

    def rule(request: Request) -> bool | None:
        if "/one" not in request.path:
            return None
        request.handler.send_response(200)
        request.handler.send_header("Content-Length", "1000")
        request.handler.end_headers()
        while not enough.wait(0.05):
            request.handler.wfile.write(b" ")
            request.handler.wfile.flush()
        return True

    with front(registry.host, rule) as before:
        started = time.monotonic()
        client = RegistryClient(before.reference("field/drip"), deadline=Deadline(1))
        with client, pytest.raises(RegistryLostError, match="deadline"):
            client.get_manifest("one")
        took = time.monotonic() - started
        enough.set()
    assert took < 5


def test_stall_of_an_upload_is_noticed(registry: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that takes a part and no more: the time is counted from the last byte."""
    monkeypatch.setattr(transport, "_STALL", 0.6)
    monkeypatch.setattr(transport, "_ATTEMPTS", 2)
    over = threading.Event()

    def rule(request: Request) -> bool | None:
        return over.wait(20) if request.method == "PUT" else None

    blob = os.urandom(20_000_000)
    with front(registry.host, rule) as before, before.client("field/stall") as client:
        started = time.monotonic()
        with pytest.raises(RegistryLostError, match="took no byte"):
            client.put_blob(digest_of(blob), len(blob), lambda: [blob])
        assert time.monotonic() - started < 10
        over.set()
