"""Findings of an audit, for people and machines: what a job compiled although the cache is warm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from builder.cache.findings import JIT, KINDS, Audit
from builder.errors import ColdError
from builder.events import Finding
from builder.report.overview import JobJit
from builder.report.results import Section
from builder.text import printable, shortened

#: Findings that are listed for people; the document has more.
MOST_LISTED = 40
#: No time of a finding is later (the year 2286).
_LATEST = 1e10
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
class JobSection(Section):
    """The test job that an audit is of, as far as GitHub's runner says: its commit, name and run."""

    job: Mapping[str, str]

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> JobSection:
        """Return the section. environ: of the job."""
        names = {"build": "GITHUB_SHA", "name": "GITHUB_JOB", "run": "GITHUB_RUN_ID"}
        return cls({key: shortened(printable(environ.get(name, "")), 200) for key, name in names.items()})


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


def jit_of(document: object, job: str) -> list[JobJit]:
    """Return what a job compiled, by family, from the document of an audit. Raises ValueError for any other document.

    The document comes from a runner: numbers are bounded, and texts are made printable.
    """
    body = document.get("audit") if isinstance(document, dict) else None
    findings = body.get("findings") if isinstance(body, dict) else None
    if not isinstance(document, dict) or not isinstance(body, dict) or not isinstance(findings, list):
        raise ValueError("it holds no audit")
    about = document.get("job")
    build = about.get("build") if isinstance(about, dict) else None
    build = shortened(printable(build), 40) if isinstance(build, str) else ""
    by_family: dict[str, list[Finding]] = {}
    for each in findings:
        if not isinstance(each, dict) or each.get("kind") not in JIT:
            continue
        texts = [str(each.get(name, "")) for name in ("family", "key", "path")]
        times = [_time(each.get(name)) for name in ("began", "ended")]
        finding = Finding(texts[0], texts[1], "compiled", texts[2], began=times[0], ended=max(times))
        by_family.setdefault(shortened(printable(texts[0]), 40), []).append(finding)
    return [
        JobJit(job, build, family, len(found), round(Audit(found).seconds, 3)) for family, found in by_family.items()
    ]


def _time(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 < value < _LATEST else 0.0


def _listed(found: Audit, kind: str) -> str:
    listed = sum(finding.kind == kind for finding in found.findings)
    return "them" if listed == found.count(kind) else f"{listed} of them"


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"
