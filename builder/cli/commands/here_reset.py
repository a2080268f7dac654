"""The verb `here-reset`: a container's own copy of the cache, equal to a published one again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder.cache import reset
from builder.cli.invocation import Invocation
from builder.cli.options import Args
from builder.errors import CANNOT_RUN, PreflightError, UsageError
from builder.report.results import Section
from builder.text import counted

#: Where the copy is by default: the mount path of caches.
TARGET = "/jit"


@dataclass(frozen=True, kw_only=True)
class HereResetArgs(Args):
    """Arguments of `here-reset`."""

    source: str | None = None
    target: str | None = None


@dataclass(kw_only=True)
class ResetResult(reset.Outcome):
    """What was done, and where."""

    source: str
    target: str


@dataclass
class ResetSection(Section):
    """The result of a reset."""

    reset: ResetResult


def run(args: HereResetArgs, invocation: Invocation) -> None:
    """Reset the copy. Raises UsageError without a source, and PreflightError where it is refused or fails."""
    if not args.source:
        raise UsageError("which cache? Pass --source DIR: a root or a generation, mounted read-only")
    source, target = Path(args.source), Path(args.target or TARGET)
    for option, path in (("source", source), ("target", target)):
        if not path.is_absolute():
            raise UsageError(f"{args.location(option)} is {str(path)!r}: an absolute path is wanted")
    try:
        done = reset.reset(source, target, whatever=target == Path(TARGET))
    except reset.ResetError as error:
        raise PreflightError(f"{CANNOT_RUN}: {error}") from None
    invocation.report.cache = str(target)
    invocation.report.add(ResetSection(ResetResult(source=str(source), target=str(target), **vars(done))))
    invocation.report.warnings += [f"not copied: {name}" for name in done.skipped]
    invocation.console.say(
        f"warm-cache: {target} is as {source} is: {counted(done.copied, 'file')} copied, {done.removed} removed, "
        f"{done.kept} kept, in {done.seconds:.1f} s"
    )
