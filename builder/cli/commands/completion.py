"""The verb `completion`: a script with which a shell completes verbs, options, profiles and paths.

shtab makes it from the parsers that read the command line, so that both know the same words.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from builder.cli import parser
from builder.cli.invocation import Invocation
from builder.cli.options import OPTIONS, Args
from builder.cli.verbs import VERBS
from builder.errors import PreflightError
from builder.manifest.load import profiles


@dataclass(frozen=True, kw_only=True)
class CompletionArgs(Args):
    """Arguments of `completion`."""

    shell: str


def run(args: CompletionArgs, invocation: Invocation) -> None:
    """Print the script for a shell. Raises PreflightError where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        why = "the package shtab, which writes such scripts, is not installed: pip install shtab"
        raise PreflightError(why) from None
    paths = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY, "DIR|volume:NAME": shtab.DIRECTORY}

    def fill(name: str, verb: argparse.ArgumentParser) -> None:
        for action in parser.add_options(verb, name):
            option: dict[str, Any] = OPTIONS.get(action.dest.replace("_", "-"), {})
            of_argument = {each.name: each.choices for each in VERBS[name].arguments}.get(action.dest)
            action.choices = profiles() if action.dest == "profile" else option.get("choices") or of_argument or None
            if action.metavar in paths:
                action.complete = paths[str(action.metavar)]  # type: ignore[attr-defined]

    invocation.report.text = shtab.complete(parser.top(fill), shell=args.shell).rstrip("\n")
