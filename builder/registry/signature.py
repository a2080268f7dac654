"""Signatures of images, as cosign makes them with a key: which key signed a digest, for which stream and time.

A valid signature alone does not prove that an image is meant for this machine, or that it is the newest: so the
payload's optional part names a stream and a time, which `require_current` compares.
"""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from builder.errors import RegistryRefusedError, UsageError
from builder.registry.client import RegistryClient
from builder.registry.documents import (
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    StoredManifest,
    digest_of,
    dumped,
)
from builder.registry.keys import SigningKey, VerificationKey
from builder.registry.signature_forms import (
    KIND,
    MOST,
    PAYLOAD_TYPE,
    SIGNATURE,
    Candidate,
    of_referrers,
    of_tag,
    tag_of,
)
from builder.text import printable, shortened

#: Annotations of a cache image, and names in a payload's optional part (`cosign sign -a NAME=VALUE` writes them too).
STREAM, TIME = "io.sglang.warm-cache.stream", "io.sglang.warm-cache.time"
CREATED = "org.opencontainers.image.created"

_STREAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class SignedImage:
    """An image with a verified signature. stream, time (seconds since 1970): as signed; None where they were not."""

    digest: str
    key: VerificationKey
    stream: str | None = None
    time: float | None = None


def is_stream(text: str) -> bool:
    """Return whether this can be the name of a stream."""
    return bool(_STREAM.fullmatch(text))


def sign(
    client: RegistryClient, digest: str, key: SigningKey, *, stream: str | None = None, time: float
) -> tuple[SignedImage, bool]:
    """Sign a manifest that the registry has; return what is signed, and whether a signature was added.

    The signatures of others stay. One by this key, for this stream, is enough: nothing is added. Raises UsageError for
    an image of another stream.

    stream: None for that of the image, if it has one.
    time: seconds since 1970, for an image without a time of its making.
    """
    image = client.get_manifest(digest)
    own = image.annotations.get(STREAM) or None
    if stream is not None and own not in (None, stream):
        raise UsageError(f"{digest[:19]}… was pushed for the stream {own!r}, and is not signed for {stream!r}")
    if stream is None and own is not None and is_stream(own):
        stream = own
    made = _own_time(image)
    time = float(int(time if made is None else made))
    optional = {TIME: format_time(time), **({STREAM: stream} if stream is not None else {})}
    payload = dumped(
        {
            "critical": {
                "identity": {"docker-reference": client.reference.name},
                "image": {"docker-manifest-digest": digest},
                "type": KIND,
            },
            "optional": optional,
        }
    )
    for _ in range(3):
        stored = client.find_manifest(tag_of(digest))
        for signed in _verified(of_tag(client, stored)[0], digest, [key.public]):
            if signed.stream == stream:
                return signed, False
        added = _add(client, digest, stored, payload, key)
        # Two that sign at the same time read the same manifest: the later one has to add its own again.
        after = client.find_manifest(tag_of(digest))
        if after is not None and added in after.layers:
            return SignedImage(digest, key.public, stream, time), True
    raise RegistryRefusedError(f"{client.reference.name}: others write {tag_of(digest)} at the same time; sign again")


def verify_signature(
    client: RegistryClient, digest: str, keys: Sequence[VerificationKey], *, stream: str | None = None
) -> SignedImage:
    """Return the verified signature of a manifest. Raises RegistryRefusedError: one sentence for each way to have none.

    keys: any of them is enough, so that a new one can be brought in before the old one leaves.
    stream: of several signatures, those of this stream count first; `require_current` decides whether it is right.
    """
    candidates, unreadable = of_tag(client, client.find_manifest(tag_of(digest)))
    found = _verified(candidates, digest, keys)
    if not found:
        more, also = of_referrers(client, digest)
        found = _verified(more, digest, keys)
        candidates, unreadable = [*candidates, *more], [*unreadable, *also]
    if found:
        best = max(found, key=lambda each: (each.stream == stream, each.time or 0.0))
        # A signature by cosign need not name a time; that of the image is a part of what the digest proves.
        return best if best.time is not None else replace(best, time=_own_time(client.get_manifest(digest)))
    raise _unsigned(client, digest, keys, candidates, unreadable)


def require_current(signed: SignedImage, *, stream: str | None, restored: float | None) -> None:
    """Raise RegistryRefusedError for an image of another stream, or one that is older than the last restored one.

    stream: the one that this machine takes; None for any. restored: the signed time of the image that was restored
    last; None if there was none.
    """
    shown = f"{signed.digest[:19]}…"
    if stream is not None and signed.stream != stream:
        which = f"for the stream {signed.stream!r}" if signed.stream is not None else "for no stream"
        raise RegistryRefusedError(f"{shown} is signed {which}, and this machine takes {stream!r}")
    if restored is None:
        return
    last = format_time(restored)
    if signed.time is None:
        raise RegistryRefusedError(
            f"{shown} is signed without a time, so that it may be older than the image of {last} that was restored here"
        )
    if signed.time < restored:
        raise RegistryRefusedError(
            f"{shown} is of {format_time(signed.time)}, older than the image of {last} that was restored here: the "
            "tag was moved back, or the registry serves an old one. Only --fallback takes older ones"
        )


def parse_time(text: str) -> float | None:
    """Return seconds since 1970 of an RFC 3339 time; None for anything else."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", text):
        return None
    whole = re.sub(r"\.\d+", "", text).replace("Z", "+00:00")
    try:
        return datetime.datetime.fromisoformat(whole).timestamp()
    except (ValueError, OverflowError):
        return None


def format_time(seconds: float) -> str:
    """Return an RFC 3339 time in UTC, in whole seconds."""
    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- judging ----------------------------------------------------------------------------------------------------------


def _verified(candidates: Sequence[Candidate], digest: str, keys: Sequence[VerificationKey]) -> list[SignedImage]:
    """Return the signatures of this digest that one of the keys verifies."""
    found = []
    for each in candidates:
        if each.digest == digest:
            key = next((key for key in keys if key.verifies(each.signature, each.signed)), None)
            if key is not None:
                stream, time = each.optional.get(STREAM), each.optional.get(TIME)
                found.append(
                    SignedImage(
                        digest,
                        key,
                        stream if isinstance(stream, str) and is_stream(stream) else None,
                        parse_time(time) if isinstance(time, str) else None,
                    )
                )
    return found


def _unsigned(
    client: RegistryClient,
    digest: str,
    keys: Sequence[VerificationKey],
    candidates: Sequence[Candidate],
    unreadable: Sequence[str],
) -> RegistryRefusedError:
    """Return the error for an image without a signature that one of the keys verifies."""
    image = f"{client.reference.name}@{digest}"
    others = sorted({each.digest for each in candidates if each.digest != digest})
    if any(each.digest == digest for each in candidates):
        why = f"is signed, but by no key that counts here ({', '.join(map(str, keys))})"
    elif others:
        why = f"has the signature of another image: {printable(shortened(others[0], 80))}"
    elif unreadable:
        why = f"has no signature that can be read: {unreadable[0]}"
    else:
        why = (
            f"is not signed: {client.reference.repository} has no {tag_of(digest)[:23]}….sig, and nothing refers to it"
        )
    return RegistryRefusedError(f"{image} {why}. Nothing of it was used")


# --- writing ----------------------------------------------------------------------------------------------------------


def _own_time(image: StoredManifest) -> float | None:
    """Return when an image was made, by its annotations, which its digest holds; None where they have no time.

    The time of signing would make an old image new when a second key signs it.
    """
    text = image.annotations.get(TIME, "")
    if text.isascii() and text.isdigit() and len(text) < 12:
        return float(text)
    return parse_time(image.annotations.get(CREATED, ""))


def _add(
    client: RegistryClient, digest: str, stored: StoredManifest | None, payload: bytes, key: SigningKey
) -> Descriptor:
    """Store the signatures that were there, and one more; return its layer."""
    before = stored.layers if stored is not None else ()
    if len(before) >= MOST:
        raise RegistryRefusedError(f"{tag_of(digest)} has {len(before)} signatures: more are not read")
    annotations = {SIGNATURE: base64.b64encode(key.sign(payload)).decode("ascii")}
    added = Descriptor(PAYLOAD_TYPE, digest_of(payload), len(payload), annotations)
    layers = (*before, added)
    # As cosign writes it: an image with no platform; its layers are the payloads as they are.
    config = dumped(
        {
            "architecture": "",
            "os": "",
            "config": {},
            "created": "0001-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
            "history": [{"created": "0001-01-01T00:00:00Z"} for _ in layers],
        }
    )
    for blob in (payload, config):
        client.put_blob(digest_of(blob), len(blob), lambda blob=blob: [blob])  # type: ignore[misc]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": Descriptor(OCI_CONFIG, digest_of(config), len(config)).document(),
        "layers": [layer.document() for layer in layers],
    }
    client.put_manifest(dumped(manifest), OCI_MANIFEST, tag_of(digest))
    return added
