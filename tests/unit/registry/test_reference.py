"""References: what a name means, and what is wrong with one that means nothing."""

from __future__ import annotations

import pytest

from builder.errors import UsageError
from builder.registry.reference import parse

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest", "api_host"),
    [
        ("ghcr.io/org/jit:h200-1", "ghcr.io", "org/jit", "h200-1", None, "ghcr.io"),
        ("localhost/x", "localhost", "x", None, None, "localhost"),
        ("127.0.0.1:5000/a/b_c/d--e", "127.0.0.1:5000", "a/b_c/d--e", None, None, "127.0.0.1:5000"),
        ("[::1]:5000/x:1", "[::1]:5000", "x", "1", None, "[::1]:5000"),
        ("ubuntu:22.04", "docker.io", "library/ubuntu", "22.04", None, "registry-1.docker.io"),
        ("org/jit", "docker.io", "org/jit", None, None, "registry-1.docker.io"),
        (f"r.example/x:1@sha256:{HEX}", "r.example", "x", "1", f"sha256:{HEX}", "r.example"),
        (f"jit@sha256:{HEX}", "docker.io", "library/jit", None, f"sha256:{HEX}", "registry-1.docker.io"),
    ],
)
def test_parse(text: str, host: str, repository: str, tag: str | None, digest: str | None, api_host: str) -> None:
    found = parse(text)
    assert (found.host, found.repository, found.tag, found.digest) == (host, repository, tag, digest)
    assert found.api_host == api_host
    assert parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://ghcr.io/org/jit:1", "no https:// in front; did you mean ghcr.io/org/jit:1?"),
        ("oci://r.example/x", "did you mean r.example/x?"),
        ("ghcr.io/Org/jit:1", "'Org' is no part of a repository's name.*did you mean ghcr.io/org/jit:1?"),
        ("ghcr.io/org/jit:a b", "'a b' is no tag"),
        ("ghcr.io/org/jit:", "'' is no tag"),
        ("ghcr.io/", "the repository is missing"),
        ("ghcr.io//x", "'' is no part of a repository's name"),
        ("ghcr.io/x@sha256:12", "'sha256:12' is no digest"),
        (f"ghcr.io/x@SHA256:{HEX}", f"did you mean ghcr.io/x@sha256:{HEX}?"),
        ("ghcr.io:99999/x", "'ghcr.io:99999' is no host with a port"),
        ("exa_mple.io/x", "'exa_mple.io' is no host"),
        ("", "which image?"),
        ("r.example/" + "a" * 256, "at most 255 characters"),
        ("r.example/x\x1b[31m", r"'x\\x1b\[31m' is no part"),
    ],
)
def test_parse_refuses_with_what_would_be_right(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


@pytest.mark.parametrize("text", ["me:s3cret@r.example/x", "s3cret@r.example:5000/x"])
def test_parse_never_repeats_a_password(text: str) -> None:
    with pytest.raises(UsageError, match="docker login") as error:
        parse(text)
    assert "s3cret" not in error.value.message


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1:5000", True), ("127.8.8.8", True), ("[::1]:1", True), ("localhost:1", True), ("LocalHost", True)),
        *(("127.0.0.1.example", False), ("10.0.0.1", False), ("localhost.example:1", False), ("r.example", False)),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert parse(f"{host}/x").is_loopback is loopback
