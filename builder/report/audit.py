"""Findings of an audit, for people and machines: what a job compiled although the cache is warm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from builder.cache.findings import KINDS, Audit
from builder.errors import ColdError
from builder.events import Finding
from builder.report.results import Section

#: Findings that are listed for people; the document has more.
MOST_LISTED = 40
#: Title of each kind of finding in a list.
_TITLES = {
    "compiled": "compiled in spite of the cache",
    "rewritten": "compiled again, or written over",
    "damaged": "damaged",
    "deleted": "deleted",
    "foreign": "left there, and no entry",
}


def raise_if_compiled(found: Audit, job: str) -> None:
    """Raise ColdError if the job compiled something, or may have. job: its name in sentences, ``the job x``."""
    if found.jit:
        raise ColdError(f"{job} compiled {_entries(found.jit)} in spite of the cache")
    if found.truncated:
        raise ColdError(f"{job} cannot be judged: {found.truncated}")


def text_of(found: Audit, job: str) -> str:
    """Return a sum for people, then one line for each finding. job: its name in sentences."""
    lines = []
    if found.jit:
        lines.append(
            f"{job} compiled {_entries(found.jit)} in spite of the cache, in about {found.seconds:.0f} s "
            "(between the first and the last write of their files)"
        )
    elif found.truncated:
        lines.append(f"{job} cannot be judged: {found.truncated}")
    else:
        lines.append(f"{job} compiled nothing")
    lines[0] += f"; it hit {_entries(found.used)}" if found.used else ""
    for kind in KINDS:
        of_kind = [finding for finding in found.findings if finding.kind == kind]
        for finding in of_kind[:MOST_LISTED]:
            place = f"{finding.family}/{finding.key}/{finding.path}" if finding.family else finding.path
            more = f" ({finding.shape})" if finding.shape else ""
            why = f": {finding.detail}" if finding.detail else ""
            lines.append(f"  {_TITLES[kind]}: {place}{more}{why}")
        if (more_of_kind := found.count(kind) - len(of_kind[:MOST_LISTED])) > 0:
            lines.append(f"  {_TITLES[kind]}: {more_of_kind} more; --json lists {_listed(found, kind)}")
    if found.jit and found.truncated:
        lines.append(f"  there may be more: {found.truncated}")
    shapes = sorted({finding.shape for finding in found.findings if finding.shape})
    if shapes:
        lines.append("  shapes: " + "; ".join(shapes))
    return "\n".join(lines)


@dataclass(frozen=True)
class AuditResult:
    """An audit as it is in the JSON document: see `Audit`."""

    jit: int
    seconds: float
    used: int
    counts: Mapping[str, int]
    asked: list[str]
    truncated: str
    findings: list[Finding]


@dataclass
class AuditSection(Section):
    """The result of an audit."""

    audit: AuditResult

    @classmethod
    def of(cls, found: Audit) -> AuditSection:
        """Return the section for an audit, with times in milliseconds."""
        findings = [replace(each, began=round(each.began, 3), ended=round(each.ended, 3)) for each in found.findings]
        return cls(
            AuditResult(
                jit=found.jit,
                seconds=round(found.seconds, 3),
                used=found.used,
                counts={kind: found.count(kind) for kind in KINDS},
                asked=[str(shape) for shape in found.asked],
                truncated=found.truncated,
                findings=findings,
            )
        )


def _listed(found: Audit, kind: str) -> str:
    listed = sum(finding.kind == kind for finding in found.findings)
    return "them" if listed == found.count(kind) else f"{listed} of them"


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"
