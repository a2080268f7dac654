"""The verb `sign`, and whose signatures count: options, and the policy of the host above them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.cli import main as cli
from builder.cli import registry as cli_registry
from builder.cli.options import RegistryArgs
from builder.errors import PreflightError, UsageError
from builder.manifest import policy
from builder.registry import keys
from builder.registry.signature import verify_signature
from tests.registries import StandIn
from tests.registry.test_client import image


@pytest.fixture
def openssl(tmp_path: Path) -> Callable[..., Path]:
    """``openssl(*arguments)``: runs it in an empty folder, where the first argument after -out is the result."""

    def openssl(*arguments: str) -> Path:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)
        return tmp_path / arguments[arguments.index("-out") + 1]

    return openssl


@pytest.fixture
def pair(openssl: Callable[..., Path]) -> tuple[Path, Path]:
    """A private key and its public one, in files."""
    private = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "cache.pem")
    return private, openssl("pkey", "-in", "cache.pem", "-pubout", "-out", "cache.pub")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose policy tests write."""
    folder = tmp_path / "etc"
    folder.mkdir()
    monkeypatch.setattr(policy, "PATH", folder / "policy.toml")
    return folder


def test_sign_prints_the_digest_and_tells_in_json(
    registry: StandIn, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with registry.client("sign/verb") as client:
        digest = image(client, b"layer", "one")
        name = f"{client.reference.name}:one"
        command = ["sign", name, "--key", str(pair[0]), "--stream", "nightly"]
        assert cli.main(command, environ={}) == 0
        assert capsys.readouterr().out == f"{client.reference.name}@{digest}\n"
        assert cli.main([*command, "--json"], environ={}) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["digest"], document["stream"], document["added"]) == (digest, "nightly", False)
        assert verify_signature(client, digest, keys.verification_keys([pair[1]])).stream == "nightly"


RSA = ("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", "key")
P384 = ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-out", "key")
LOCKED = ("pkey", "-in", "cache.pem", "-aes256", "-passout", "pass:x", "-out", "key")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (RSA, "holds a key of another kind (RSA): ECDSA on P-256 is wanted"),
        (P384, "holds a key of another kind (on the curve secp384r1): ECDSA on P-256 is wanted"),
        (LOCKED, "is encrypted, and this verb asks for no passphrase"),
        (("pkey", "-in", "cache.pem", "-pubout", "-out", "key"), "holds only a public key"),
        (("rand", "-out", "key", "100"), "holds no private key in PEM"),
    ],
)
def test_keys_that_cannot_sign_are_one_clear_error(
    pair: tuple[Path, Path],
    openssl: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    made: tuple[str, ...],
    said: str,
) -> None:
    path = openssl(*made)
    assert cli.main(["sign", "127.0.0.1:1/x:1", "--key", str(path)], environ={}) == 2
    assert f"--key: {path} {said}" in capsys.readouterr().err


def test_keys_of_cosign_and_missing_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cosign = tmp_path / "cosign.key"
    kind = "ENCRYPTED SIGSTORE PRIVATE KEY"
    cosign.write_text(f"-----BEGIN {kind}-----\neyJr\n-----END {kind}-----\n", encoding="utf-8")
    for path, said in ((cosign, "is a private key of cosign"), (tmp_path / "none", "is missing")):
        assert cli.main(["sign", "127.0.0.1:1/x:1", "--key", str(path)], environ={}) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("r.example/x",), "sign which image? Name its tag or its digest"),
        (("r.example/x:1", "--stream", "a b"), "--stream: 'a b' is no name of a stream"),
        (("r.example/x:1", "--ca-file", "/nonexistent"), "--ca-file: /nonexistent is no file"),
        (("r.example/x:1", "--ca-file", __file__), "holds no certificates in PEM (NO_CERTIFICATE_OR_CRL_FOUND)"),
        (("me:s3cret@r.example/x:1",), "a reference holds no credentials"),
    ],
)
def test_mistakes_are_one_sentence_and_no_request(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert cli.main(["sign", *words, "--key", str(pair[0])], environ={}) == 2
    written = capsys.readouterr().err
    assert said in written
    assert "s3cret" not in written


def test_public_keys_are_wanted_where_signatures_are_verified(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="holds a private key: machines that verify get the public one"):
        keys.verification_keys([pair[0]])


def test_key_without_cryptography_is_an_error(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(PreflightError, match=r"pip install 'warm-cache\[sign\]'"):
        cli_registry.trust(RegistryArgs(), str(pair[1]), None)


def test_one_file_may_hold_several_keys(pair: tuple[Path, Path], openssl: Callable[..., Path]) -> None:
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "next.pem")
    following = openssl("pkey", "-in", "next.pem", "-pubout", "-out", "next.pub")
    both = pair[1].with_name("both.pub")
    both.write_bytes(pair[1].read_bytes() + following.read_bytes())
    found = cli_registry.trust(RegistryArgs(), str(both), "nightly")
    assert found is not None
    assert (len({key.fingerprint for key in found.keys}), found.stream) == (2, "nightly")


def test_policy_names_the_keys_and_no_option_replaces_them(
    host: Path, pair: tuple[Path, Path], openssl: Callable[..., Path]
) -> None:
    own = host / "own.pub"
    own.write_bytes(pair[1].read_bytes())
    policy.PATH.write_text(f'schema = 1\n[registry]\nkeys = ["{own}"]\nstream = "release"\n', encoding="utf-8")
    for key in (None, str(own)):
        found = cli_registry.trust(RegistryArgs(), key, None)
        assert found is not None
        assert ([each.name for each in found.keys], found.stream) == ([str(own)], "release")
    with pytest.raises(UsageError, match=r"policy.toml:3 names the keys of this host, and no option replaces them"):
        cli_registry.trust(RegistryArgs(), str(pair[1]), None)
    with pytest.raises(UsageError, match=r"--stream nightly: .*says that this host takes 'release'"):
        cli_registry.trust(RegistryArgs(), None, "nightly")
    own.chmod(0o666)
    with pytest.raises(UsageError, match=r"names the key .*own.pub, which cannot be trusted: it can be written by oth"):
        cli_registry.trust(RegistryArgs(), None, None)


def test_stream_without_a_key_is_an_error(host: Path) -> None:
    assert cli_registry.trust(RegistryArgs(), None, None) is None
    with pytest.raises(UsageError, match="no key is named that could have signed it"):
        cli_registry.trust(RegistryArgs(), None, "nightly")
    policy.PATH.write_text('schema = 1\n[registry]\nkeys = ["relative.pub"]\nstream = "a b"\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"expected absolute paths of public keys.*expected the name of a stream"):
        policy.current()
