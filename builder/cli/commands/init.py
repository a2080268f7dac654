"""The verb `init`: a manifest to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder.cli.invocation import Invocation
from builder.cli.options import Args
from builder.errors import PreflightError, UsageError
from builder.manifest import template
from builder.report.results import Section
from builder.text import printable

DEFAULT = "warm-cache.toml"


@dataclass(frozen=True, kw_only=True)
class InitArgs(Args):
    """Arguments of `init`."""

    file: str | None = None
    profile: str | None = None


@dataclass
class InitSection(Section):
    """The file that was written."""

    file: str


def run(args: InitArgs, invocation: Invocation) -> None:
    """Write the file. Raises UsageError where it exists, and PreflightError where it cannot be written."""
    text = template.of_profile(args.profile) if args.profile else template.template()
    if args.file == "-":
        invocation.report.text = text.rstrip("\n")
        return
    path = Path(args.file or DEFAULT)
    name = printable(str(path))
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{name} exists, and is left as it is: name another file, or remove it") from None
    except OSError as error:
        raise PreflightError(f"{name} cannot be written: {error.strerror}") from None
    invocation.report.add(InitSection(str(path)))
    invocation.console.say(f"wrote {name}. Change it, and then: warm-cache doctor --manifest {name}")
