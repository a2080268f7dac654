"""The verb `audit`: what a job compiled although the cache is warm, where there is no engine.

``--here --before FILE`` records what the cache holds, ``--after FILE`` compares with it: in runner containers,
where jobs use the mounted cache itself. Both load the standard library alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from builder import files
from builder.cache import snapshot
from builder.cache.layout import FamilyDirectory, claimable_directories
from builder.cli.invocation import Invocation
from builder.cli.options import Args
from builder.errors import PreflightError, UsageError
from builder.report import audit
from builder.report.results import Section


@dataclass(frozen=True, kw_only=True)
class AuditArgs(Args):
    """Arguments of `audit`."""

    cache: str | None = None
    before: str | None = None
    after: str | None = None
    fail_on_jit: bool = False
    here: bool = False


@dataclass
class SnapshotSection(Section):
    """Path of the record that was written."""

    snapshot: str


def run(args: AuditArgs, invocation: Invocation) -> None:
    """Write a snapshot, or compare with one. Raises ColdError with --fail-on-jit if anything was compiled."""
    if not args.here:
        raise UsageError(
            "audit compares the cache of the environment that it runs in with what it was: pass --here and "
            "--before FILE or --after FILE. What a job changed in a view: warm-cache view audit JOB"
        )
    if bool(args.before) == bool(args.after):
        raise UsageError("audit --here needs --before FILE, ahead of the job, or --after FILE, behind it")
    places = _places(args, invocation)
    if args.before:
        _record(args.before, places, invocation)
    elif args.after:
        _compare(args.after, places, args, invocation)


def _record(path: str, places: list[FamilyDirectory], invocation: Invocation) -> None:
    document = json.dumps(snapshot.take(places)).encode("ascii")
    try:
        files.replace_file(Path(path), document)
    except (OSError, ValueError) as error:
        raise UsageError(f"--before: cannot write {path!r}: {files.why(error)}") from None
    invocation.report.add(SnapshotSection(path))
    invocation.console.say(f"recorded what {len(places)} family directories hold")


def _compare(path: str, places: list[FamilyDirectory], args: AuditArgs, invocation: Invocation) -> None:
    try:
        found = snapshot.compare(snapshot.read(Path(path)), places)
    except snapshot.SnapshotError as error:
        raise UsageError(f"--after: {error}") from None
    invocation.report.add(audit.AuditSection.of(found))
    invocation.report.add(audit.JobSection.of(invocation.environ))
    invocation.report.text = None if args.json else audit.text_of(found, "the job")
    if args.fail_on_jit:
        audit.raise_if_compiled(found, "the job")


def _places(args: AuditArgs, invocation: Invocation) -> list[FamilyDirectory]:
    """Return the family directories to compare: those below --cache, else those that variables name here."""
    if args.cache:
        root = invocation.cache(args.cache).root
        if root is None:
            raise UsageError("--cache: audit --here needs a directory: name the one that the cache is mounted at")
        if not root.is_dir():
            raise PreflightError(f"there is no cache at {root}")
        return list(claimable_directories(root))
    places = snapshot.in_environment(invocation.environ)
    if not places:
        raise UsageError(
            "which cache? No variable of a family (SGLANG_DG_CACHE_DIR, TRITON_CACHE_DIR, …) is set here: pass "
            "--cache DIR, or set what warm-cache env prints"
        )
    return places
