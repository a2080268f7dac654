"""The client against a real registry: what is stored is what comes back, and what is there is not sent again."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from builder.errors import RegistryRefusedError
from builder.registry.client import RegistryClient
from builder.registry.documents import OCI_CONFIG, OCI_MANIFEST, digest_of, dumped
from tests.registries import StandIn
from tests.registry.conftest import LOGIN


def image(client: RegistryClient, layer: bytes, tag: str, *, created: str = "") -> str:
    """Store an image with this layer under a tag; return its digest."""
    config = b"{}"
    for blob in (config, layer):
        client.put_blob(digest_of(blob), len(blob), lambda blob=blob: [blob])  # type: ignore[misc]
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": digest_of(layer),
                "size": len(layer),
            }
        ],
    }
    if created:
        manifest["annotations"] = {"org.opencontainers.image.created": created}
    return client.put_manifest(dumped(manifest), OCI_MANIFEST, tag)


def log_in(folder: Path, host: str, user: str, password: str) -> None:
    """Keep a login as `docker login` does."""
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": pair}}}), encoding="utf-8")


def test_client_reads_back_what_it_stored(registry: StandIn) -> None:
    layer = os.urandom(3_000_001)
    with registry.client("client/round-trip") as client:
        digest = image(client, layer, "h200-1")
        found = client.get_manifest("h200-1")
        assert found.digest == digest == client.get_manifest(digest).digest
        (described,) = found.layers
        assert b"".join(client.read_blob(described.digest, described.size)) == layer
        assert client.has_blob(described.digest) == len(layer)


def test_client_sends_a_blob_once(registry: StandIn) -> None:
    blob, sent = os.urandom(100_000), list[int]()
    with registry.client("client/once") as client:
        assert client.put_blob(digest_of(blob), len(blob), lambda: [blob], sent.append) == len(blob)
        assert client.put_blob(digest_of(blob), len(blob), lambda: [blob], sent.append) == 0
    assert sum(sent) == len(blob)


def test_client_mounts_a_blob_of_another_repository(registry: StandIn) -> None:
    blob = os.urandom(100_000)
    with registry.client("client/first") as first, registry.client("client/second") as second:
        first.put_blob(digest_of(blob), len(blob), lambda: [blob])
        assert second.put_blob(digest_of(blob), len(blob), lambda: pytest.fail("sent"), mount_from="client/first") == 0
        assert second.has_blob(digest_of(blob)) == len(blob)


def test_tags_have_a_prefix_and_all_pages(registry: StandIn) -> None:
    with registry.client("client/tags") as client:
        digest = image(client, b"layer", "other-1")
        raw = client.get_manifest(digest).raw
        for number in range(3):
            client.put_manifest(raw, OCI_MANIFEST, f"h200-{number}")
        assert client.tags("h200-") == ("h200-0", "h200-1", "h200-2")
        assert len(client.tags()) == 4


def test_missing_is_told_apart(registry: StandIn) -> None:
    with registry.client("client/nothing-here") as client:
        with pytest.raises(RegistryRefusedError, match=r"has no client/nothing-here:none .*MANIFEST_UNKNOWN") as error:
            client.get_manifest("none")
        assert error.value.status == 404
        with pytest.raises(RegistryRefusedError, match="has no repository client/nothing-here"):
            client.tags()
        assert client.has_blob(digest_of(b"none")) is None
        assert client.find_manifest("none") is None


def test_tls_and_login(registry_tls: StandIn, docker_config: Path) -> None:
    log_in(docker_config, registry_tls.host, *LOGIN)
    with registry_tls.client("client/tls") as client:
        digest = image(client, b"layer", "one")
        assert client.get_manifest("one").digest == digest


def test_login_missing_and_wrong(registry_tls: StandIn, docker_config: Path) -> None:
    with registry_tls.client("client/tls") as client:
        with pytest.raises(RegistryRefusedError, match=f"no credentials for it: docker login {registry_tls.host}"):
            client.tags()
        log_in(docker_config, registry_tls.host, LOGIN[0], "wr0ng-secret")
    with registry_tls.client("client/tls") as client:
        with pytest.raises(RegistryRefusedError, match="does not accept the login of builder") as error:
            client.tags()
        assert "wr0ng" not in str(error.value)


def test_certificate_has_to_be_known_or_ignored(registry_tls: StandIn, docker_config: Path) -> None:
    reference = registry_tls.reference("client/tls")
    log_in(docker_config, registry_tls.host, *LOGIN)
    with RegistryClient(reference) as client, pytest.raises(RegistryRefusedError, match=r"not trusted.*--ca-file FILE"):
        client.find_manifest("one")
    with RegistryClient(reference, insecure=True) as client:
        assert client.find_manifest("none") is None


@pytest.mark.attack(
    "serves a changed blob or manifest",
    by="registry",
    holds="12: the digest is compared before anything is used",
)
def test_damaged_blob_and_manifest_are_refused(registry: StandIn) -> None:
    layer = os.urandom(200_000)
    with registry.client("client/damaged") as client:
        digest = image(client, layer, "one")
        for name in (digest_of(layer), digest):
            path = registry.blob(name)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        with pytest.raises(RegistryRefusedError, match="has another digest"):
            list(client.read_blob(digest_of(layer), len(layer)))
        with pytest.raises(RegistryRefusedError, match="served a manifest with digest"):
            client.get_manifest(digest)
