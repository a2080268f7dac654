"""The verb `doctor`: everything that prevents this machine from running the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.run import diagnostics


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(ManifestArgs):
    """Arguments of `doctor`."""

    allow_busy: bool = False


def run(args: DoctorArgs, invocation: Invocation) -> None:
    """Report every check. Raises PreflightError if a warm-up cannot run."""
    manifest = invocation.manifest()
    with invocation.containers(invocation.context(manifest, allow_busy=args.allow_busy)) as executor:
        diagnostics.doctor(executor)
