"""Signatures: ours against real cosign in both directions, and every way in which an image is not signed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.errors import RegistryRefusedError
from builder.registry import keys
from builder.registry.client import RegistryClient
from builder.registry.documents import OCI_INDEX, OCI_MANIFEST, Descriptor, dumped
from builder.registry.signature import STREAM, parse_time, require_current, sign, verify_signature
from builder.registry.signature_forms import tag_of
from tests.registries import StandIn, tool
from tests.registry.test_client import image

NOW = 1_795_900_000.0

Pair = tuple[keys.SigningKey, tuple[keys.VerificationKey, ...]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """``pair(name)``: a private key, and the public one, made by openssl as the documentation says."""
    folder = tmp_path_factory.mktemp("keys")

    def pair(name: str) -> Pair:
        private, public = folder / name, folder / f"{name}.pub"
        if not private.exists():
            made = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"]
            subprocess.run([*made, private], check=True, capture_output=True)
            subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
        return keys.signing_key(private), keys.verification_keys([public])

    return pair


def cosign(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "COSIGN_PASSWORD": "of-the-tests", "HOME": str(folder)}
    done = subprocess.run([program, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def test_cosign_verifies_each_of_our_signatures(registry: StandIn, pair: Callable[[str], Pair], tmp_path: Path) -> None:
    program = tool("cosign")
    with registry.client("signed/ours") as client:
        digest = image(client, b"ours", "one")
        for name in ("old", "new"):
            sign(client, digest, pair(name)[0], stream="nightly", time=NOW)
    for name in ("old", "new"):
        public = pair(name)[1][0].name
        arguments = ("--insecure-ignore-tlog=true", "-a", f"{STREAM}=nightly", f"{registry.host}/signed/ours@{digest}")
        assert "2026-11-28T" in cosign(program, tmp_path, "verify", "--key", public, *arguments).stdout


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_we_verify_what_cosign_signed(registry: StandIn, tmp_path: Path, form: str) -> None:
    """The bundle is what cosign 3 writes; 2.5 writes the same for an attestation that says what a signature does."""
    program = tool("cosign")
    cosign(program, tmp_path, "generate-key-pair")
    with registry.client(f"signed/by-cosign-{form}") as client:
        digest = image(client, b"theirs", "one", created="2026-11-28T10:00:00Z")
        name = f"{client.reference.name}@{digest}"
        if form == "tag":
            labels = ("-a", f"{STREAM}=release")
            cosign(program, tmp_path, "sign", "--key", "cosign.key", "--tlog-upload=false", "-y", *labels, name)
        else:
            (tmp_path / "predicate").write_text("{}", encoding="utf-8")
            kind = ("--type", "https://sigstore.dev/cosign/sign/v1", "--predicate", "predicate")
            bundle = ("--new-bundle-format", "--tlog-upload=false", "-y")
            cosign(program, tmp_path, "attest", "--key", "cosign.key", *bundle, *kind, name)
        found = verify_signature(client, digest, keys.verification_keys([tmp_path / "cosign.pub"]))
    # cosign signs no time; that of the image counts.
    assert (found.digest, found.time) == (digest, parse_time("2026-11-28T10:00:00Z"))
    assert found.stream == ("release" if form == "tag" else None)


def test_sign_again_adds_nothing(registry: StandIn, pair: Callable[[str], Pair]) -> None:
    key, public = pair("old")
    with registry.client("signed/again") as client:
        digest = image(client, b"again", "one")
        first, added = sign(client, digest, key, stream="nightly", time=NOW)
        assert added
        again, added = sign(client, digest, key, stream="nightly", time=NOW + 86400)
        assert not added
        assert (again.stream, again.time) == (first.stream, first.time) == ("nightly", NOW)
        _, added = sign(client, digest, key, stream="release", time=NOW)
        assert added
        assert verify_signature(client, digest, public, stream="release").stream == "release"
        assert len(client.get_manifest(tag_of(digest)).layers) == 2


def test_two_that_sign_at_the_same_time_both_stay(registry: StandIn, pair: Callable[[str], Pair]) -> None:
    """The other one writes between our reading and our writing, the same payload even."""
    with registry.client("signed/both") as client:
        digest = image(client, b"both", "one")
        put, late = client.put_manifest, iter([True])

        def overtaken(raw: bytes, media_type: str, reference: str | None = None) -> str:
            found = put(raw, media_type, reference)
            if next(late, None):
                client.put_manifest = put  # type: ignore[method-assign]
                put(other, media_type, reference)
            return found

        sign(client, digest, pair("new")[0], time=NOW)
        other = client.get_manifest(tag_of(digest)).raw
        client.put_manifest = overtaken  # type: ignore[method-assign]
        sign(client, digest, pair("old")[0], time=NOW)
        for name in ("old", "new"):
            assert verify_signature(client, digest, pair(name)[1]).digest == digest


def test_any_of_several_keys_is_enough(registry: StandIn, pair: Callable[[str], Pair]) -> None:
    with registry.client("signed/rotation") as client:
        digest = image(client, b"rotation", "one")
        sign(client, digest, pair("old")[0], time=NOW)
        both = pair("new")[1] + pair("old")[1]
        assert verify_signature(client, digest, both).key == pair("old")[1][0]


def unsigned(client: RegistryClient, digest: str, pair: Callable[[str], Pair]) -> str:
    """Not signed at all."""
    return "is not signed: .* has no sha256-.* and nothing refers to it"


def other_key(client: RegistryClient, digest: str, pair: Callable[[str], Pair]) -> str:
    """Signed by a key that does not count."""
    sign(client, digest, pair("new")[0], time=NOW)
    return r"is signed, but by no key that counts here \(.*old.pub \(SHA256:"


def other_image(client: RegistryClient, digest: str, pair: Callable[[str], Pair]) -> str:
    """The signature of another image, by the right key, moved to this image's tag."""
    other = image(client, b"the other one", "other")
    sign(client, other, pair("old")[0], time=NOW)
    client.put_manifest(client.get_manifest(tag_of(other)).raw, OCI_MANIFEST, tag_of(digest))
    return f"has the signature of another image: {other}"


def no_signature(client: RegistryClient, digest: str, pair: Callable[[str], Pair]) -> str:
    """Something that is no signature in its place."""
    client.put_manifest(client.get_manifest(digest).raw, OCI_MANIFEST, tag_of(digest))
    return "has no signature that can be read: .*tar.gzip is not known"


def an_index(client: RegistryClient, digest: str, pair: Callable[[str], Pair]) -> str:
    """An index in the place of the signature, and an image in that of what refers to this one."""
    row = Descriptor(OCI_MANIFEST, digest, len(client.get_manifest(digest).raw)).document()
    index = dumped({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [row]})
    client.put_manifest(index, OCI_INDEX, tag_of(digest))
    client.put_manifest(client.get_manifest(digest).raw, OCI_MANIFEST, tag_of(digest).removesuffix(".sig"))
    return "has no signature that can be read: the manifest .* has no layers of the form"


@pytest.mark.attack(
    "serves an image without a signature, with one by another key, or with that of another image",
    by="registry",
    holds="12, each with its sentence, before the first layer",
)
@pytest.mark.parametrize("how", [unsigned, other_key, other_image, no_signature, an_index])
def test_unsigned_is_refused(
    registry: StandIn, pair: Callable[[str], Pair], how: Callable[[RegistryClient, str, Callable[[str], Pair]], str]
) -> None:
    with registry.client(f"signed/{how.__name__.replace('_', '-')}") as client:
        digest = image(client, how.__name__.encode(), "one")
        expected = how(client, digest, pair)
        with pytest.raises(RegistryRefusedError, match=expected):
            verify_signature(client, digest, pair("old")[1])


@pytest.mark.attack(
    "changes what a signature is for",
    by="registry",
    holds="12: the payload is proven by its digest, and then by the key",
)
def test_changed_payload_is_refused(registry: StandIn, pair: Callable[[str], Pair]) -> None:
    """The registry serves another payload under the digest of the signed one."""
    key, public = pair("old")
    with registry.client("signed/changed") as client:
        digest = image(client, b"changed", "one")
        sign(client, digest, key, stream="nightly", time=NOW)
        (layer,) = client.get_manifest(tag_of(digest)).layers
        path = registry.blob(layer.digest)
        path.write_bytes(path.read_bytes().replace(b"nightly", b"release"))
        with pytest.raises(RegistryRefusedError, match=r"has no signature that can be read: .* has another digest"):
            verify_signature(client, digest, public)


@pytest.mark.attack(
    "serves an older signed image, or one of another stream",
    by="registry",
    holds="12: stream and time are signed, and what is older than the last restored one is refused",
)
def test_replay_is_refused(registry: StandIn, pair: Callable[[str], Pair]) -> None:
    key, public = pair("old")
    with registry.client("signed/replay") as client:
        digest = image(client, b"replay", "one")
        sign(client, digest, key, stream="nightly", time=NOW)
        found = verify_signature(client, digest, public)
    require_current(found, stream="nightly", restored=NOW)
    require_current(found, stream=None, restored=None)
    with pytest.raises(RegistryRefusedError, match="signed for the stream 'nightly', and this machine takes 'release'"):
        require_current(found, stream="release", restored=None)
    with pytest.raises(RegistryRefusedError, match=r"older than the image of 2026-11-.* Only --fallback takes older"):
        require_current(found, stream="nightly", restored=NOW + 1)
