"""What a job did in spite of the warm cache, for people and machines; and the audit that needs no engine.

``audit --here --before FILE`` notes what the cache holds, ``--after FILE`` compares: for runner containers, whose jobs
work on the mounted cache itself. Both load the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder import files
from builder.cache import findings, snapshot
from builder.cache.findings import KINDS, Audit
from builder.cache.layout import FamilyDirectory, claimable_directories
from builder.errors import ColdError, PreflightError, UsageError
from builder.run.call import Call

#: Findings that are listed for people; the document has more.
MOST_LISTED = 40
#: What each kind is called in a list.
_SAID = {
    "compiled": "compiled in spite of the cache",
    "rewritten": "compiled again, or written over",
    "damaged": "damaged",
    "deleted": "deleted",
    "foreign": "left there, and no entry",
}


def elsewhere(_call: Call) -> None:
    """Without --here nothing says which cache is meant."""
    raise UsageError(
        "audit compares the cache of the environment that it runs in with what it was: pass --here and --before FILE "
        "or --after FILE. What a job did to a view: warm-cache view audit JOB"
    )


def here(call: Call) -> None:
    """Writes a snapshot, or compares with one. Raises ColdError with --fail-on-jit when anything was compiled."""
    said = call.said
    if bool(said.before) == bool(said.after):
        raise UsageError("audit --here wants --before FILE, ahead of the job, or --after FILE, behind it")
    places = _places(call)
    if said.before:
        document = json.dumps(snapshot.take(places)).encode("ascii")
        try:
            files.replace_file(Path(said.before), document)
        except (OSError, ValueError) as error:
            raise UsageError(f"--before: cannot write {said.before!r}: {files.why(error)}") from None
        call.report.extra["snapshot"] = said.before
        call.console.say(f"noted what {len(places)} family directories hold")
        return
    try:
        found = snapshot.compare(snapshot.read(Path(said.after)), places)
    except snapshot.SnapshotError as error:
        raise UsageError(f"--after: {error}") from None
    call.report.extra["audit"] = document_of(found)
    call.report.text = None if said.json else text_of(found, "the job")
    judge(found, "the job", said.fail_on_jit)


def _places(call: Call) -> list[FamilyDirectory]:
    if call.said.cache:
        root = call.cache().root
        if root is None:
            raise UsageError("--cache: audit --here looks at a directory: name the one that the cache is mounted at")
        if not root.is_dir():
            raise PreflightError(f"there is no cache at {root}")
        return list(claimable_directories(root))
    places = snapshot.in_environment(call.environ)
    if not places:
        raise UsageError(
            "which cache? No variable of a family (SGLANG_DG_CACHE_DIR, TRITON_CACHE_DIR, …) is set here: pass "
            "--cache DIR, or set what warm-cache env prints"
        )
    return places


def judge(found: Audit, who: str, fail_on_jit: bool) -> None:
    """Raises ColdError where --fail-on-jit was said and something was compiled, or may have been."""
    if fail_on_jit and (found.jit or found.truncated):
        what = f"compiled {_entries(found.jit)} in spite of the cache" if found.jit else found.truncated
        raise ColdError(f"{who} {what}" if found.jit else f"{who} cannot be judged: {what}")


def text_of(found: Audit, who: str) -> str:
    """For people: the sum of it, then one line a finding."""
    if found.truncated:
        return f"{who} cannot be judged: {found.truncated}"
    lines = []
    if found.jit:
        lines.append(
            f"{who} compiled {_entries(found.jit)} in spite of the cache, in about {found.seconds:.0f} s "
            "(between the first and the last write of their files)"
        )
    else:
        lines.append(f"{who} compiled nothing")
    lines[0] += f"; it hit {_entries(found.used)}" if found.used else ""
    for kind in KINDS:
        of_kind = [finding for finding in found.findings if finding.kind == kind]
        for finding in of_kind[:MOST_LISTED]:
            place = f"{finding.family}/{finding.key}/{finding.path}" if finding.family else finding.path
            more = f" ({finding.shape})" if finding.shape else ""
            why = f": {finding.detail}" if finding.detail else ""
            lines.append(f"  {_SAID[kind]}: {place}{more}{why}")
        if (more_of_kind := found.count(kind) - len(of_kind[:MOST_LISTED])) > 0:
            lines.append(f"  {_SAID[kind]}: {more_of_kind} more; --json lists {_listed(found, kind)}")
    shapes = sorted({finding.shape for finding in found.findings if finding.shape})
    if shapes:
        lines.append("  shapes: " + "; ".join(shapes))
    return "\n".join(lines)


def document_of(found: Audit) -> dict[str, Any]:
    """For machines."""
    return {
        "jit": found.jit,
        "seconds": round(found.seconds, 3),
        "used": found.used,
        "counts": {kind: found.count(kind) for kind in KINDS},
        "asked": [str(shape) for shape in found.asked],
        "truncated": found.truncated,
        "findings": [_row(finding) for finding in found.findings],
    }


def _row(finding: findings.Finding) -> Mapping[str, Any]:
    return {**vars(finding), "began": round(finding.began, 3), "ended": round(finding.ended, 3)}


def _listed(found: Audit, kind: str) -> str:
    told = sum(finding.kind == kind for finding in found.findings)
    return "them" if told == found.count(kind) else f"{told} of them"


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"
