"""The verb `verify`: check every entry of the cache."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.run import upkeep


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(ManifestArgs):
    """Arguments of `verify`."""

    repair: bool = False
    lock_timeout: str | None = None


def run(args: VerifyArgs, invocation: Invocation) -> None:
    """Check every entry. Raises ColdError if one is bad, with repair if one still is."""
    manifest = invocation.manifest(lock_timeout=args.lock_timeout)
    with invocation.containers(invocation.context(manifest)) as executor:
        upkeep.verify(executor, repair=args.repair)
