"""The verb `sign`: sign a cache image in a registry with a key."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from builder.cli import registry
from builder.cli.invocation import Invocation
from builder.cli.options import RegistryArgs
from builder.errors import UsageError
from builder.registry import keys, signature
from builder.registry.reference import parse
from builder.report.results import Section


@dataclass(frozen=True, kw_only=True)
class SignArgs(RegistryArgs):
    """Arguments of `sign`."""

    ref: str
    key: str | None = None
    stream: str | None = None


@dataclass
class SignSection(Section):
    """What was signed. key: its fingerprint. time: that counts against replay. added: False if it was signed before."""

    reference: str
    digest: str
    key: str
    stream: str | None
    time: str | None
    added: bool


def run(args: SignArgs, invocation: Invocation) -> None:
    """Sign the digest that the reference names now, and print it."""
    reference = parse(args.ref)
    if not args.key:
        raise UsageError(f"sign with which key? --key FILE names a private one, made so: {keys.MAKE_A_KEY}")
    named = reference.digest or reference.tag
    if named is None:
        raise UsageError(f"REF {reference}: sign which image? Name its tag or its digest")
    stream = registry.checked_stream(args.stream, args.location("stream")) if args.stream is not None else None
    key = keys.signing_key(Path(args.key), args.location("key"))
    with invocation.signals.handled(), registry.client(args, invocation, reference) as client:
        digest = client.get_manifest(named).digest
        signed, added = signature.sign(client, digest, key, stream=stream, time=time.time())
    image = f"{reference.name}@{digest}"
    moment = signature.format_time(signed.time) if signed.time is not None else None
    invocation.report.add(SignSection(image, digest, signed.key.fingerprint, signed.stream, moment, added))
    invocation.report.text = None if args.json else image
    of_stream = f" for the stream {signed.stream}" if signed.stream else ""
    done = "signed" if added else "was already signed"
    invocation.console.say(f"{image} {done} by {signed.key.fingerprint}{of_stream}, of {moment}")
