"""The webhook takes no longer than it may, however the other side drags it out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from builder.errors import UsageError
from builder.report import webhook


@pytest.fixture
def dripping() -> Iterator[str]:
    """The URL of a server that answers byte by byte, without end."""
    server = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip() -> None:
        client, _ = server.accept()
        with client:
            client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not over.wait(0.02):
                client.sendall(b".")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/SECRET"
    over.set()
    thread.join(5)
    server.close()


def test_post_with_an_endless_answer_is_given_up(dripping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "ALTOGETHER", 0.5)
    began = time.monotonic()
    assert webhook.post(dripping, {}) == "127.0.0.1 did not answer in time"
    assert time.monotonic() - began < 5


def test_post_with_a_stuck_name_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        over.wait(30)
        raise socket.gaierror(-3, "never")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()
    try:
        assert (
            webhook.post("https://hooks.example/SECRET", {}, give_up=lambda: True)
            == "hooks.example did not answer in time"
        )
        assert time.monotonic() - began < 5
    finally:
        over.set()


@pytest.mark.parametrize(
    "url", ["http://[bad", "http://[::1", "ftp://x/", "https://", "http://:1/", "http://x:y/", "http://a b/", "x", ""]
)
def test_invalid_url_is_usage_error_that_hides_it(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        webhook.checked(url, "WARM_CACHE_WEBHOOK")
    assert caught.value.message == (
        "WARM_CACHE_WEBHOOK: expected a URL that begins with https:// or http:// (the value is not shown)"
    )


@pytest.mark.parametrize("url", ["http://.../", "http://\udcff/", "https://x..y/", "http://127.0.0.1:0/"])
def test_post_to_an_odd_url_is_a_remark(url: str) -> None:
    assert webhook.post(webhook.checked(url, "--webhook") or "", {})
