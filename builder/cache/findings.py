"""What a job did to its cache: findings, the shapes that it used, and the time that compiling probably took.

`overlay_audit` reads findings from the upper layer of a view, `snapshot` from two inventories of one directory. An
untrusted job may have written every file and every time they are read from: they are an estimate of what an honest job
did, and printable in any case.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from builder.beneath import Tree
from builder.cache.families import Family
from builder.events import Finding
from builder.files import matches
from builder.task import Shape
from builder.text import printable, shortened

#: compiled: a new valid entry. rewritten: a valid entry with other bytes than before. damaged: an entry that was valid.
#: deleted: an entry that no longer exists. foreign: any other file that the job left.
KINDS = ("compiled", "rewritten", "damaged", "deleted", "foreign")
#: The kinds that show a compilation which the cache did not avoid.
JIT = ("compiled", "rewritten")

#: sglang's lock around the warm-up of one DeepGEMM shape, below the family's directory (sglang 0.5.20 and later).
_LOCK = re.compile(r"([A-Z][A-Z0-9_]{0,80})_n(\d{1,12})_k(\d{1,12})_g(\d{1,12})\.lock", re.ASCII)
_LONGEST = 240
#: Files of one entry whose times are read.
_MOST_FILES = 4096
_SERVER = 'A task with the job\'s server covers them:\n# [[task]], model = "…", recipe = "serve", argv = ["…"]'


@dataclass
class Audit:
    """All that is known of one job.

    used: number of entries that the job hit, by their stamps. asked: shapes by the locks that it took. truncated:
    why there may be more than is listed, or "". counts, took: number per kind, and seconds, where `findings` are
    only a part.
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
        """Number of entries that were compiled although there was a cache."""
        return self.count(*JIT)

    @property
    def seconds(self) -> float:
        """Seconds of compiling: from the first to the last write of each entry, overlaps counted once.

        Of single files, per directory. Start-up of compilers and failed compilations are not included.
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
    """Return at most so many findings, of every kind and family in turn, so that no kind hides another."""
    ranks: dict[tuple[str, str], int] = {}
    ranked = []
    for finding in found:
        group = finding.kind, finding.family
        ranks[group] = rank = ranks.get(group, 0) + 1
        ranked.append((rank, KINDS.index(finding.kind), finding))
    chosen = [finding for _, _, finding in sorted(ranked, key=lambda one: one[:2])[:most]]
    return sorted(chosen, key=lambda finding: KINDS.index(finding.kind))


def short(name: str) -> str:
    """Return the name of a job's file on one short line."""
    return shortened(printable(name), _LONGEST)


def shape_of_lock(name: str) -> Shape | None:
    """Return the shape in the name of a lock below a DeepGEMM directory; None for another name."""
    found = _LOCK.fullmatch(name.removeprefix("locks/")) if name.startswith("locks/") else None
    return Shape(found[1], int(found[2]), int(found[3]), int(found[4])) if found else None


def with_shapes(findings: Iterable[Finding], locks: Sequence[tuple[float, Shape]]) -> list[Finding]:
    """Return the findings, DeepGEMM's with the shape of the last lock before their first write.

    locks: (time at which it was taken, shape).
    """
    ordered = sorted(locks)
    chosen = []
    for finding in findings:
        before = [shape for taken, shape in ordered if taken <= finding.began]
        if finding.family == "deep_gemm" and finding.kind in JIT and before:
            chosen.append(replace(finding, shape=str(before[-1])))
        else:
            chosen.append(finding)
    return chosen


def span(family: Family, tree: Tree, name: str, *, earliest: float, latest: float) -> tuple[int, float, float]:
    """Return bytes, first and last write of an entry's files; stamps, which a hit touches, do not count.

    earliest, latest: limits of both times, because every user can set them.
    """
    size, times = 0, []
    names = [item.name for item in tree.some(name, _MOST_FILES) or ()] if tree.is_dir(name) else [name]
    for file in names:
        try:
            status = tree.lstat(file)
        except (OSError, ValueError):
            continue
        last = file.rpartition("/")[2]
        if stat.S_ISREG(status.st_mode):
            size += status.st_size
            if last != ".committed" and not matches(last, family.transient):
                times.append(min(max(status.st_mtime, earliest), latest))
    return size, min(times, default=0.0), max(times, default=0.0)


# The manifest lines that would cover it


def proposal(audit: Audit, name: str) -> str:
    """Return TOML to append to a manifest, so that the next warm-up compiles what this job had to.

    Never entries: nothing that an untrusted job made is used. Shapes are proposed where it is known which ones were
    compiled; where that is known of some entries only, every shape that the job used. Comments name what is missing.
    """
    found = [finding for finding in audit.findings if finding.kind in JIT]
    gemm = [finding for finding in found if finding.family == "deep_gemm"]
    chosen = {finding.shape for finding in gemm}
    shapes = sorted(chosen) if "" not in chosen else sorted({*map(str, audit.asked), *chosen} - {""})
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
