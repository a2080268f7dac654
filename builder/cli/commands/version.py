"""The verb `version`: which version this is, and of what."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from builder import __version__
from builder.cli.invocation import Invocation
from builder.cli.options import Args


@dataclass(frozen=True, kw_only=True)
class VersionArgs(Args):
    """Arguments of `version`."""


def run(args: VersionArgs, invocation: Invocation) -> None:
    """Print the version of the program, and of the Python that runs it."""
    python = platform.python_version()
    invocation.report.extra.update(version=__version__, python=python)
    invocation.report.text = None if args.json else f"warm-cache {__version__} (Python {python})"
