"""What registries write in headers and documents, read without believing any of it."""

from __future__ import annotations

import ssl
import time

import pytest

from builder.errors import RegistryRefusedError
from builder.registry.authorization import Authorization, TokenAnswer, challenges
from builder.registry.credentials import Credentials
from builder.registry.documents import StoredManifest, digest_of, error_text
from builder.registry.failures import PlainHttpError, TransientError, failure, retry_after
from builder.registry.signature import format_time, parse_time


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://a/token",service="r, x",scope="repository:a/b:pull,push"',
            [("bearer", {"realm": "https://a/token", "service": "r, x", "scope": "repository:a/b:pull,push"})],
        ),
        ('Basic realm="x", Bearer realm=y', [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (r'Negotiate, Basic realm="a \"b\""', [("negotiate", {}), ("basic", {"realm": 'a "b"'})]),
        ('Bearer realm="never ends', [("bearer", {"realm": ""})]),
        ("=,=", []),
        ("", []),
    ],
)
def test_challenges(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    found = [(each.scheme, dict(each.parameters)) for each in challenges(header)]
    if header.endswith("ends"):  # whatever it makes of it, the realm is none
        assert [scheme for scheme, _ in found][:1] == ["bearer"]
    else:
        assert found == expected


BEARER = 'Bearer realm="https://tokens.example/t?x=1",service="r"'


@pytest.mark.parametrize(
    ("raw", "token"),
    [
        (b'{"token": "abc"}', "abc"),
        (b'{"access_token": "abc", "expires_in": 1e400}', "abc"),
        (b'{"token": "abc", "expires_in": "soon"}', "abc"),
        (b'{"token": "abc", "expires_in": true}', "abc"),
        (b'{"token": "a\\nb"}', None),
        (b'{"token": 7}', None),
        (b'{"token": ""}', None),
        (b"[]", None),
        (b"<html>", None),
    ],
)
def test_token_answers_of_any_shape(raw: bytes, token: str | None) -> None:
    asked: list[str] = []

    def fetch(method: str, url: str, headers: object, form: object) -> TokenAnswer:
        asked.append(url)
        return TokenAnswer(200, raw)

    authorization = Authorization("r.example", lambda: None, fetch)
    if token is None:
        with pytest.raises(RegistryRefusedError, match=r"its token server tokens.example gave no token"):
            authorization.renew(BEARER, "repository:x:pull", None)
    else:
        authorization.renew(BEARER, "repository:x:pull", None)
        assert authorization.header("repository:x:pull") == f"Bearer {token}"
        assert authorization.header("repository:x:pull,push") is None
    assert asked == ["https://tokens.example/t?x=1&service=r&scope=repository%3Ax%3Apull"]


def test_identity_token_is_exchanged_by_post() -> None:
    sent: list[tuple[str, str, object]] = []

    def fetch(method: str, url: str, headers: object, form: object) -> TokenAnswer:
        sent.append((method, url, form))
        return TokenAnswer(200, b'{"access_token": "abc"}')

    authorization = Authorization("r.example", lambda: Credentials(identity_token="1dentity"), fetch)
    authorization.renew(BEARER, "repository:x:pull", None)
    ((method, url, form),) = sent
    assert (method, url) == ("POST", "https://tokens.example/t?x=1")
    assert isinstance(form, dict)
    assert (form["grant_type"], form["refresh_token"]) == ("refresh_token", "1dentity")
    assert authorization.redacted("1dentity and abc") == "<secret> and <secret>"


def test_way_to_log_in_that_is_not_known() -> None:
    authorization = Authorization("r.example", lambda: None, lambda *_: TokenAnswer(500, b""))
    with pytest.raises(RegistryRefusedError, match=r"does not know \(negotiate\): it knows Bearer and Basic"):
        authorization.renew("Negotiate", "repository:x:pull", None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("9" * 30, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert retry_after(text) == seconds


def test_retry_after_by_date() -> None:
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    found = retry_after(in_a_minute)
    assert found is not None
    assert 50 < found <= 60


@pytest.mark.parametrize(
    "document",
    [
        b'{"layers": [{"mediaType": "x", "digest": "sha256:12", "size": 1}]}',
        b'{"layers": [{"mediaType": "x", "digest": "sha256:%s", "size": -1}]}' % (b"a" * 64),
        b'{"layers": [{"mediaType": "x", "digest": "sha256:%s", "size": true}]}' % (b"a" * 64),
        b'{"layers": [{"mediaType": "x", "digest": "sha256:%s", "size": 1e3}]}' % (b"a" * 64),
        b'{"layers": [{"mediaType": "x", "digest": "sha256:%s", "size": 1, "annotations": {"a": 1}}]}' % (b"a" * 64),
        b'{"layers": {}}',
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"layers": ' + b"[" * 50_000,
    ],
)
def test_manifest_of_any_shape_is_one_error(document: bytes) -> None:
    with pytest.raises(RegistryRefusedError):
        _ = StoredManifest(document, digest_of(document), "").layers


def test_error_text_is_one_printable_line() -> None:
    raw = b'{"errors": [{"code": "DENIED", "message": "a\\nb\\u001b[2J", "detail": {"x": 1}}]}'
    assert error_text(raw) == r"DENIED: a\nb\x1b[2J"
    for other in (b"", b"[]", b'{"errors": {}}', b'{"errors": [7]}', b'{"errors": [{"code": 7}]}'):
        assert error_text(other) == ""


def test_failures_name_the_host_and_no_url() -> None:
    import requests
    import urllib3

    def wrapped(inner: Exception) -> requests.ConnectionError:
        pool = urllib3.HTTPSConnectionPool("r.example")
        return requests.ConnectionError(urllib3.exceptions.MaxRetryError(pool, "/v2/?_state=s3cret", inner))

    refused = failure(wrapped(ConnectionRefusedError(111, "Connection refused")), "r.example")
    assert isinstance(refused, TransientError)
    assert str(refused) == "r.example: Connection refused"
    plain = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1000)")
    plain.reason = "WRONG_VERSION_NUMBER"
    assert isinstance(failure(wrapped(plain), "r.example"), PlainHttpError)
    invalid = failure(requests.exceptions.InvalidURL("http://s3cret"), "r.example")
    assert isinstance(invalid, RegistryRefusedError)
    assert "s3cret" not in str(invalid)


@pytest.mark.parametrize("text", ["2026-11-29T03:15:00Z", "2026-11-29T04:15:00.5+01:00", "2026-11-28T19:15:00-08:00"])
def test_times(text: str) -> None:
    seconds = parse_time(text)
    assert seconds is not None
    assert format_time(seconds) == "2026-11-29T03:15:00Z"


@pytest.mark.parametrize("text", ["", "2026-11-29", "2026-11-29T03:15:00", "2026-13-29T03:15:00Z", "now", "9" * 99])
def test_times_that_are_none(text: str) -> None:
    assert parse_time(text) is None
