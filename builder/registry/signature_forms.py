"""The two forms in which registries keep signatures of images, before any key has verified them.

cosign's tag form: the signatures of ``sha256:HEX`` are the manifest ``sha256-HEX.sig`` of the same repository, one
layer each: a payload that names the digest, and in an annotation the signature of the payload. Source:
https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md.

cosign 3's form: a manifest that refers to the image has a sigstore bundle, a DSSE envelope around an in-toto statement
with the image's digest as its subject. Sources: ``signDigestBundle`` (cosign, cmd/cosign/cli/sign/sign.go) and
``WriteAttestationNewBundleFormat`` (pkg/oci/remote/write.go); https://github.com/secure-systems-lab/dsse. What needs
more than a key (certificates of keyless signatures, a transparency log) is not verified here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.errors import RegistryRefusedError
from builder.registry.client import RegistryClient
from builder.registry.documents import Descriptor, StoredManifest, json_object
from builder.text import printable, shortened

PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
KIND = "cosign container image signature"
#: The start of a bundle's type; its version follows.
BUNDLE = "application/vnd.dev.sigstore.bundle"
STATEMENT = "application/vnd.in-toto+json"
#: The predicate of a statement that is a signature of an image: other statements are about something else.
PREDICATE = "https://sigstore.dev/cosign/sign/v1"
#: More signatures, and longer payloads, are not read.
MOST, LIMIT = 64, 1 << 16


@dataclass(frozen=True)
class Candidate:
    """A signature before it is believed. signed: the bytes that it is of. digest, optional: as they claim."""

    signature: bytes
    signed: bytes
    digest: str
    optional: Mapping[str, Any]


def tag_of(digest: str) -> str:
    """Return the tag of the signatures of a manifest."""
    return f"{digest.replace(':', '-', 1)}.sig"


def of_tag(client: RegistryClient, stored: StoredManifest | None) -> tuple[list[Candidate], list[str]]:
    """Return the signatures of a manifest in cosign's tag form, and why others of it cannot be read."""
    if stored is None:
        return [], []
    found, problems = [], []
    try:
        layers = stored.layers[:MOST]
    except RegistryRefusedError as error:  # whatever is in its place, the other form may be there
        return [], [error.message]
    for layer in layers:
        try:
            found.append(_from_layer(client, layer))
        except RegistryRefusedError as error:
            problems.append(error.message)
    return found, problems


def _from_layer(client: RegistryClient, layer: Descriptor) -> Candidate:
    if layer.media_type != PAYLOAD_TYPE:
        raise RegistryRefusedError(f"a signature of type {printable(shortened(layer.media_type, 80))} is not known")
    payload = client.read_small_blob(layer.digest, layer.size, LIMIT)
    document = json_object(payload, "the payload of a signature")
    critical = document.get("critical")
    image = critical.get("image") if isinstance(critical, dict) else None
    digest = image.get("docker-manifest-digest") if isinstance(image, dict) else None
    if not isinstance(critical, dict) or critical.get("type") != KIND or not isinstance(digest, str):
        raise RegistryRefusedError("the payload of a signature names no image")
    optional = document.get("optional")
    return Candidate(
        _decoded(layer.annotations.get(SIGNATURE, "")), payload, digest, optional if isinstance(optional, dict) else {}
    )


def _decoded(text: object) -> bytes:
    """Return the bytes of a base64 text. Raises RegistryRefusedError."""
    try:
        if isinstance(text, str) and text:
            return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        pass
    raise RegistryRefusedError("a signature is no base64")


def of_referrers(client: RegistryClient, digest: str) -> tuple[list[Candidate], list[str]]:
    """Return the signatures in bundles that refer to a manifest, and why others cannot be used."""
    index = client.referrers(digest)
    found: list[Candidate] = []
    problems: list[str] = []
    try:
        rows = index.manifests[:MOST] if index is not None else ()
    except RegistryRefusedError as error:
        return [], [error.message]
    for each in rows:
        try:
            found += _of_manifest(client, each)
        except RegistryRefusedError as error:
            problems.append(error.message)
    return found, problems


def _of_manifest(client: RegistryClient, described: Descriptor) -> list[Candidate]:
    manifest = client.get_manifest(described.digest)
    layers = [layer for layer in manifest.layers[:MOST] if layer.media_type.startswith(BUNDLE)]
    if layers:
        return [_from_bundle(client.read_small_blob(layer.digest, layer.size, 4 * LIMIT)) for layer in layers]
    return []


def _from_bundle(raw: bytes) -> Candidate:
    bundle = json_object(raw, "a sigstore bundle")
    envelope = bundle.get("dsseEnvelope")
    material = bundle.get("verificationMaterial")
    if isinstance(material, dict) and ("certificate" in material or "x509CertificateChain" in material):
        raise RegistryRefusedError(
            "a sigstore bundle (cosign 3) is signed with a certificate, which this builder does not verify: sign with "
            "a key, cosign sign --key FILE"
        )
    if not isinstance(envelope, dict):
        raise RegistryRefusedError("a sigstore bundle (cosign 3) has no DSSE envelope, which signatures of images have")
    payload = _decoded(envelope.get("payload"))
    kind = envelope.get("payloadType")
    signatures = envelope.get("signatures")
    first = signatures[0] if isinstance(signatures, list) and len(signatures) == 1 else None
    if kind != STATEMENT or not isinstance(first, dict):
        raise RegistryRefusedError("a sigstore bundle (cosign 3) has no in-toto statement with one signature")
    statement = json_object(payload, "the statement of a sigstore bundle")
    if statement.get("predicateType") != PREDICATE:
        shown = printable(shortened(str(statement.get("predicateType")), 80))
        raise RegistryRefusedError(f"a sigstore bundle (cosign 3) is no signature of an image, but {shown}")
    digest, optional = _subject(statement)
    return Candidate(_decoded(first.get("sig")), _encoded(STATEMENT, payload), digest, optional)


def _subject(statement: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the digest of a statement's only subject, and its annotations."""
    subjects = statement.get("subject")
    subject = subjects[0] if isinstance(subjects, list) and len(subjects) == 1 else None
    digests = subject.get("digest") if isinstance(subject, dict) else None
    value = digests.get("sha256") if isinstance(digests, dict) else None
    if not isinstance(subject, dict) or not isinstance(value, str):
        raise RegistryRefusedError("the statement of a sigstore bundle names no image")
    annotations = subject.get("annotations")
    return f"sha256:{value}", annotations if isinstance(annotations, dict) else {}


def _encoded(kind: str, payload: bytes) -> bytes:
    """Return the bytes that a DSSE envelope's signature is of (its PAE)."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
