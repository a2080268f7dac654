"""Registries as verbs reach them, and the keys that count: from options, and from the host's policy above them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from builder.cli.invocation import Invocation
from builder.cli.options import RegistryArgs
from builder.errors import UsageError
from builder.host.deadlines import Deadline
from builder.manifest import policy
from builder.registry import keys, signature
from builder.registry.client import RegistryClient
from builder.registry.reference import Reference
from builder.text import printable, shortened


@dataclass(frozen=True)
class Trust:
    """The keys and the stream of images that this machine takes. stream: None for any."""

    keys: tuple[keys.VerificationKey, ...]
    stream: str | None


def client(
    args: RegistryArgs, invocation: Invocation, reference: Reference, *, deadline: Deadline | None = None
) -> RegistryClient:
    """Return a client for the repository of a reference. Raises UsageError for certificates that are none."""
    ca_file = Path(args.ca_file) if args.ca_file else None
    if ca_file is not None and not ca_file.is_file():
        raise UsageError(f"{args.location('ca-file')}: {printable(str(ca_file))} is no file")
    return RegistryClient(
        reference, insecure=args.insecure, ca_file=ca_file, deadline=deadline, cancel=invocation.cancel
    )


def trust(args: RegistryArgs, key: str | None, stream: str | None) -> Trust | None:
    """Return the keys that count; None where neither an option nor the policy names a key.

    The policy has the last word: an option that names another key or another stream is an error, and none is needed.
    Raises UsageError, and PreflightError where keys are named that nothing here can check.
    """
    rules = policy.current()
    if stream is not None:
        checked_stream(stream, args.location("stream"))
    bound = rules.registry if rules is not None else policy.NO_REGISTRY
    if bound.keys:
        allowed = [os.path.realpath(path) for path in bound.keys]
        if key and os.path.realpath(key) not in allowed:
            raise UsageError(
                f"{args.location('key')} {printable(key)}: {bound.location} names the keys of this host, and no option "
                "replaces them; leave it out"
            )
        policy.require_trusted(bound.keys)
        found = keys.verification_keys(bound.keys, f"{bound.location} [registry] keys")
    elif key:
        found = keys.verification_keys([Path(key)], args.location("key"))
    elif stream is not None or bound.stream is not None:
        where = args.location("stream") if stream is not None else f"{bound.location} [registry] stream"
        raise UsageError(f"{where}: a stream is a part of a signature, and no key is named that could have signed it")
    else:
        return None
    if bound.stream is not None and stream not in (None, bound.stream):
        raise UsageError(
            f"{args.location('stream')} {stream}: {bound.location} says that this host takes {bound.stream!r}"
        )
    return Trust(found, bound.stream or stream)


def checked_stream(text: str, location: str) -> str:
    """Return the name of a stream. Raises UsageError for what can be none."""
    if not signature.is_stream(text):
        shown = shortened(text, 140)
        raise UsageError(f"{location}: {shown!r} is no name of a stream: letters, digits and, after the first, . _ / -")
    return text
