"""The verb `version`: which version this is, and of what."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from builder import __version__
from builder.cli.invocation import Invocation
from builder.cli.options import Args
from builder.report.results import Section


@dataclass(frozen=True, kw_only=True)
class VersionArgs(Args):
    """Arguments of `version`."""


@dataclass
class VersionSection(Section):
    """The versions of the program and of its Python."""

    version: str
    python: str


def run(args: VersionArgs, invocation: Invocation) -> None:
    """Print the version of the program, and of the Python that runs it."""
    python = platform.python_version()
    invocation.report.add(VersionSection(__version__, python))
    invocation.report.text = None if args.json else f"warm-cache {__version__} (Python {python})"
