"""What a registry serves as JSON: manifests, lists, errors. Whatever shape it has: RegistryRefusedError at worst."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from builder.errors import RegistryRefusedError
from builder.registry.reference import DIGEST
from builder.text import printable, shortened

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
#: What a manifest may be; registries answer in the first of these forms that they have.
MANIFESTS = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX)

#: Larger manifests are refused by many registries, and by this client.
MANIFEST_LIMIT = 4 << 20
#: More layers, and blobs of more bytes, are not believed.
_MOST_LAYERS, _MOST_BYTES = 10_000, 1 << 50


def digest_of(raw: bytes) -> str:
    """Return the digest by which a registry names these bytes."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


@dataclass(frozen=True)
class Descriptor:
    """A manifest's row for a blob, or for another manifest."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the descriptor as it is written in a manifest."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return {**found, "annotations": dict(sorted(self.annotations.items()))} if self.annotations else found


@dataclass(frozen=True)
class StoredManifest:
    """A manifest as a registry has it: its bytes, their proven digest, and the type that it was served with.

    Every property raises RegistryRefusedError where the manifest does not have the form that OCI gives it.
    """

    raw: bytes
    digest: str
    media_type: str

    @cached_property
    def document(self) -> Mapping[str, Any]:
        return json_object(self.raw, f"the manifest {self.digest}")

    @cached_property
    def annotations(self) -> Mapping[str, str]:
        return _texts(self.document.get("annotations", {}), self._refusal("annotations"))

    @cached_property
    def config(self) -> Descriptor:
        return self._descriptor(self.document.get("config"), "config")

    @cached_property
    def layers(self) -> tuple[Descriptor, ...]:
        return self._list("layers")

    @cached_property
    def manifests(self) -> tuple[Descriptor, ...]:
        """The manifests that an index lists."""
        return self._list("manifests")

    def _list(self, name: str) -> tuple[Descriptor, ...]:
        found = self.document.get(name)
        if not isinstance(found, list) or len(found) > _MOST_LAYERS:
            raise self._refusal(name)
        return tuple(self._descriptor(each, f"{name}[{index}]") for index, each in enumerate(found))

    def _descriptor(self, found: object, name: str) -> Descriptor:
        if not isinstance(found, dict):
            raise self._refusal(name)
        media_type, digest, size = found.get("mediaType"), found.get("digest"), found.get("size")
        if not isinstance(media_type, str) or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise self._refusal(name)
        if type(size) is not int or not 0 <= size <= _MOST_BYTES:
            raise self._refusal(name)
        return Descriptor(media_type, digest, size, _texts(found.get("annotations", {}), self._refusal(name)))

    def _refusal(self, name: str) -> RegistryRefusedError:
        return RegistryRefusedError(f"the manifest {self.digest} has no {name} of the form that OCI gives it")


def json_object(raw: bytes, what: str) -> Mapping[str, Any]:
    """Return the JSON object in these bytes. Raises RegistryRefusedError. what: for the message, ``the token``."""
    try:
        found = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise RegistryRefusedError(f"{what} is no JSON") from None
    if not isinstance(found, dict):
        raise RegistryRefusedError(f"{what} is no JSON object")
    return found


def dumped(document: object) -> bytes:
    """Return a document as the bytes of a manifest or config: the same for the same content."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def error_text(raw: bytes) -> str:
    """Return code and message of an error in the form of the distribution API, on one line; "" where it has another."""
    try:
        errors = json_object(raw, "").get("errors")
    except RegistryRefusedError:
        return ""
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    parts = [first.get("code"), first.get("message")]
    return printable(shortened(": ".join(part for part in parts if isinstance(part, str) and part), 200))


def _texts(found: object, refusal: RegistryRefusedError) -> Mapping[str, str]:
    """Return a mapping of texts; null counts as empty, as Go writes it."""
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise refusal
    return found
