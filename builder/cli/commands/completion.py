"""The verb `completion`: prints a script by which a shell completes verbs, options, profiles and paths.

shtab makes it from the same parsers that read the command line, so that it cannot know other words than they do.
"""

from __future__ import annotations

import argparse
from typing import Any

from builder.cli import parser as arguments
from builder.cli.options import OPTIONS, VERBS
from builder.errors import PreflightError
from builder.manifest.load import profiles
from builder.run.call import Call


def completion(call: Call) -> None:
    """Prints the script for the shell that was named. Raises PreflightError where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        why = "the package shtab, which writes such scripts, is not installed: pip install shtab"
        raise PreflightError(why) from None
    paths = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY, "DIR|volume:NAME": shtab.DIRECTORY}

    def fill(name: str, parser: argparse.ArgumentParser) -> None:
        for action in arguments.add_words(parser, VERBS[name]):
            option: dict[str, Any] = OPTIONS.get(action.dest.replace("_", "-"), {})
            of_argument = {each.name: each.choices for each in VERBS[name].arguments}.get(action.dest)
            action.choices = profiles() if action.dest == "profile" else option.get("choices") or of_argument or None
            if action.metavar in paths:
                action.complete = paths[str(action.metavar)]  # type: ignore[attr-defined]

    call.report.text = shtab.complete(arguments.top(fill), shell=call.said.shell).rstrip("\n")
