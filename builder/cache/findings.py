"""What a job did to the cache that it was given: findings, the shapes that it asked for, and what it probably cost.

Two ways lead to findings: `audit` reads the upper layer of a view, `snapshot` compares two inventories of one place.
Everything here comes from files that an untrusted job may have written, times included: it is an estimate of what an
honest job did, printable whatever it holds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from builder.cache.families import Family
from builder.files import listing, matches
from builder.task import Shape
from builder.text import printable, shortened

#: What can have become of something: an entry that was not there and is valid now; one that is valid and holds other
#: bytes than before; one that was valid and no longer is; one that is gone; whatever else was left there.
KINDS = ("compiled", "rewritten", "damaged", "deleted", "foreign")
#: The kinds that mean that something was compiled in spite of the cache.
JIT = ("compiled", "rewritten")

#: sglang's lock around the warm-up of one DeepGEMM shape, below the family's directory (sglang 0.5.20 and later).
_LOCK = re.compile(r"([A-Z][A-Z0-9_]{0,80})_n(\d{1,12})_k(\d{1,12})_g(\d{1,12})\.lock", re.ASCII)
_LONGEST = 240
_SERVER = 'A task with the job\'s server covers them:\n# [[task]], model = "…", recipe = "serve", argv = ["…"]'


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that a job changed. path: from the family's directory, or from the root where no family is known.

    bytes: of the entry as it is now. began, ended: seconds since the epoch, the first and the last write of its files,
    0.0 where nothing tells. shape: of DeepGEMM, where the times of sglang's locks tell.
    """

    family: str
    key: str
    kind: str
    path: str
    detail: str = ""
    bytes: int = 0
    began: float = 0.0
    ended: float = 0.0
    shape: str = ""


@dataclass
class Audit:
    """findings: all of them. used: entries that the job hit, by their stamps. asked: shapes whose lock it took.
    truncated: why there may be more than is listed, or "". counts, took: how many of each kind, and seconds, where
    `findings` are only the foremost.
    """

    findings: list[Finding] = field(default_factory=list)
    used: int = 0
    asked: list[Shape] = field(default_factory=list)
    truncated: str = ""
    counts: Mapping[str, int] | None = None
    took: float | None = None

    def count(self, *kinds: str) -> int:
        if self.counts is not None:
            return sum(self.counts.get(kind, 0) for kind in kinds)
        return sum(finding.kind in kinds for finding in self.findings)

    @property
    def jit(self) -> int:
        """How many entries were compiled in spite of the cache."""
        return self.count(*JIT)

    @property
    def seconds(self) -> float:
        """The time in which somebody was compiling: from the first to the last write of each entry (of each directory,
        where entries are single files), what overlaps counted once. Start-up of compilers and what came to nothing are
        not in it.
        """
        if self.took is not None:
            return self.took
        spans: dict[tuple[str, str, str], tuple[float, float]] = {}
        for finding in self.findings:
            if finding.kind in JIT and finding.began:
                place = (finding.family, finding.key, finding.path.rpartition("/")[0] or finding.path)
                if finding.began < finding.ended:
                    place = (finding.family, finding.key, finding.path)
                first, last = spans.get(place, (finding.began, finding.ended))
                spans[place] = (min(first, finding.began), max(last, finding.ended))
        total, until = 0.0, 0.0
        for first, last in sorted(spans.values()):
            total += max(0.0, last - max(first, until))
            until = max(until, last)
        return total


def foremost(found: Sequence[Finding], most: int) -> list[Finding]:
    """So many of them, of every kind and family in turn: a job that leaves thousands of one kind hides no other."""
    ranks: dict[tuple[str, str], int] = {}
    ranked = []
    for finding in found:
        group = finding.kind, finding.family
        ranks[group] = rank = ranks.get(group, 0) + 1
        ranked.append((rank, KINDS.index(finding.kind), finding))
    told = [finding for _, _, finding in sorted(ranked, key=lambda one: one[:2])[:most]]
    return sorted(told, key=lambda finding: KINDS.index(finding.kind))


def short(name: str) -> str:
    """Return the name of a job's file on one short line."""
    return shortened(printable(name), _LONGEST)


def shape_of_lock(name: str) -> Shape | None:
    """The shape that this lock's name, below a DeepGEMM directory, is about."""
    found = _LOCK.fullmatch(name.removeprefix("locks/")) if name.startswith("locks/") else None
    return Shape(found[1], int(found[2]), int(found[3]), int(found[4])) if found else None


def with_shapes(findings: Iterable[Finding], locks: Sequence[tuple[float, Shape]]) -> list[Finding]:
    """DeepGEMM entries with the shape whose lock was taken last before their first write. locks: (taken, shape)."""
    ordered = sorted(locks)
    told = []
    for finding in findings:
        before = [shape for taken, shape in ordered if taken <= finding.began]
        if finding.family == "deep_gemm" and finding.kind in JIT and before:
            told.append(replace(finding, shape=str(before[-1])))
        else:
            told.append(finding)
    return told


def span(family: Family, path: Path, *, earliest: float, latest: float) -> tuple[int, float, float]:
    """Bytes, and first and last write, of an entry's files; both times within these, because anybody can set them.
    Stamps, which a hit touches, do not count.
    """
    size, times = 0, []
    for item in _files(path):
        try:
            status = item.stat(follow_symlinks=False) if isinstance(item, os.DirEntry) else item.lstat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            size += status.st_size
            if item.name != ".committed" and not matches(item.name, family.transient):
                times.append(min(max(status.st_mtime, earliest), latest))
    return size, min(times, default=0.0), max(times, default=0.0)


def _files(path: Path) -> Sequence[os.DirEntry[str] | Path]:
    try:
        folder = stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return []
    return (listing(str(path)) or []) if folder else [path]


# The manifest lines that would cover it


def proposal(audit: Audit, name: str) -> str:
    """TOML to append to a manifest, so that the next warm-up makes what this job had to. Lines, never entries: nothing
    that an untrusted job made is taken over.

    A shape is proposed where it is known which ones were compiled; where that is known of some entries only, every
    shape that the job asked for. For what no shape describes a comment says what is missing.
    """
    found = [finding for finding in audit.findings if finding.kind in JIT]
    gemm = [finding for finding in found if finding.family == "deep_gemm"]
    told = {finding.shape for finding in gemm}
    shapes = sorted(told) if "" not in told else sorted({*map(str, audit.asked), *told} - {""})
    lines: list[str] = []
    if shapes and gemm:
        lines += [
            f"# {len(gemm)} DeepGEMM kernels that {name} compiled in spite of the cache",
            "[[task]]",
            f'model = "views/{name}"',
            'recipe = "shapes"',
            "shapes = [",
            *(f'    "{shape}",' for shape in shapes),
            "]",
        ]
    elif gemm:
        lines.append(f"# {len(gemm)} DeepGEMM kernels that {name} compiled: no lock tells their shapes. {_SERVER}")
    for family in sorted({finding.family for finding in found} - {"deep_gemm"}):
        number = sum(finding.family == family for finding in found)
        lines.append(f"# {number} {family} entries that {name} compiled: no shape describes them. {_SERVER}")
    return "\n".join(lines)
