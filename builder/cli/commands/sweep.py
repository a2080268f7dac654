"""The verb `sweep`: remove containers of killed builders, and with a manifest unsafe leftovers in its cache."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.manifest.load import without_tasks
from builder.run import sweep


@dataclass(frozen=True, kw_only=True)
class SweepArgs(ManifestArgs):
    """Arguments of `sweep`."""

    lock_timeout: str | None = None


def run(args: SweepArgs, invocation: Invocation) -> None:
    """Remove what killed builders left on the engine, and with a manifest in the cache root."""
    if args.names_manifest or args.cache or args.image or args.models:
        manifest = invocation.manifest(lock_timeout=args.lock_timeout)
        with invocation.containers(invocation.context(manifest)) as executor:
            sweep.sweep(executor)
    else:
        with invocation.containers(invocation.context(without_tasks())) as executor:
            sweep.sweep_engine(executor)
