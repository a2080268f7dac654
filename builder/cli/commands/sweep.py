"""The verb `sweep`: remove containers of killed builders, and quarantine unsafe leftovers in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.run import sweep


@dataclass(frozen=True, kw_only=True)
class SweepArgs(ManifestArgs):
    """Arguments of `sweep`."""

    lock_timeout: str | None = None


def run(args: SweepArgs, invocation: Invocation) -> None:
    """Remove what killed builders left on the engine and in the cache root."""
    manifest = invocation.manifest(lock_timeout=args.lock_timeout)
    with invocation.containers(invocation.context(manifest)) as executor:
        sweep.sweep(executor)
