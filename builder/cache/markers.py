"""Markers: the record that a task is warm for the keys of the families it claims.

A marker is a claim about the disk, checked against the disk each time it is read: it holds only while the entries that
it lists are there and valid. Any file may lie where a marker should be (half a file, another schema, a directory, a
FIFO); that is a reason to be cold, never an error.

The judgement is here. What a marker holds is in `marker_format`, where it is in `marker_files`, and how one is made and
published in `marker_writing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from builder.beneath import Tree
from builder.cache import build_proofs, inventory, leaves, loadable, marker_files, reasons, toolchain, usage
from builder.cache.build_proofs import BuildProof, ProofWanted
from builder.cache.coverage import brief, coverage, describe, differences
from builder.cache.entries import ProblemKind
from builder.cache.families import COMPILERS, FAMILY, TABLE_VERSION
from builder.cache.marker_files import MarkerFile, folder_name
from builder.cache.marker_format import PRETENDED, VERIFIED, Marker
from builder.cache.toolchain import Record
from builder.task import Task
from builder.text import age, printable

Row = tuple[str, str, str]


#: Why a task is cold; "" for a warm one. After the colon of each: its meaning, and the detail in parentheses.
#: no-marker: none of the task's label is there to compare with, and none of the same work holds.
#: compile: the key of a claimed family is another one (``<family> is compiled anew (<factor> A → B) and N more``).
#: coverage: the marker is for other arguments, model, sglang and so on (``<factor> was A is B``).
#: entries: entries that the marker lists are missing or invalid (``N missing, M invalid (first: …)``).
#: marker-unreadable: the file where the marker should be holds none (its path and the problem).
#: mount: nothing of a claimed family can be used where the root is mounted (why).
#: stale: ninja would build an entry again, because sources are newer, or sglang, which looks at newer ones (which).
#: unverified: the marker would do, but `strict` requires the proof ``verified``.
#: build: the marker would do, but only another build of sglang proved it, and this one's own proof is wanted.
#: age: the marker would do, but its proof is older than is wanted.
#: unwritable: with --here, a job cannot use a claimed family's directory, because programs write there (which, why).
Kind = Literal[
    "",
    "no-marker",
    "compile",
    "coverage",
    "entries",
    "marker-unreadable",
    "mount",
    "stale",
    "unverified",
    "build",
    "age",
    "unwritable",
]


@dataclass(frozen=True)
class Judgement:
    """Whether a task is warm.

    marker, path (below the root): the marker that was judged, or the nearest one. differences: (factor, was, is)
    against it, in full. proof: of a warm task, and of one that is cold for its build or age alone. anew: families that
    would be compiled anew, the costliest first.
    """

    state: Literal["warm", "cold"]
    kind: Kind = ""
    detail: str = ""
    marker: Marker | None = None
    path: str | None = None
    differences: list[Row] = field(default_factory=list)
    proof: BuildProof | None = None
    anew: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why the task is cold: kind and detail in one line; "" when it is warm."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def judge(
    root: Path,
    task: Task,
    *,
    record: Record,
    config_digest: str | None,
    strict: bool = False,
    wanted: ProofWanted | None = None,
    run: str | None = None,
) -> Judgement:
    """Compare the task with the markers below `root` and their entries with the disk.

    The first rule that applies decides:

    1. A marker of the task's coverage and present keys, under any label, whose entries are all valid: warm. A label is
       only a name for the work. Markers that `run` wrote are tried first, then those of real GPUs before those of
       simulated ones, those of the task's own label before others, and newer ones before older ones.
       Where nothing else is warm, those of folders of another name: of schema 1, and, for a checkout without tags,
       of an unknown release, those of every release, those of the same kernel sources first.
    2. Such a marker of the task's own label, the first in this order: ``entries`` if some are missing or invalid,
       ``unverified``, ``build`` or ``age`` if all are valid but another proof is wanted.
    3. An unreadable file where the task's marker should be: ``marker-unreadable``.
    4. A marker of the same label and coverage with other keys: ``compile``.
    5. A marker of the same label with another coverage: ``compile`` where keys differ as well, else ``coverage``.
    6. ``no-marker``.

    Reads only, never raises for what it finds. wanted: which proof counts; strict: short for one that is strict.
    run: id of a run; None: no run has priority.
    """
    wanted = wanted or ProofWanted(strict)
    now = coverage(task, record=record, config_digest=config_digest)
    keys = toolchain.family_keys(record)
    name = folder_name(task.label, now)
    found = [_sufficient(item, task) for item in marker_files.folder(root, name)]
    others = [_sufficient(item, task) for item in marker_files.duplicates(root, name)]
    candidates = [
        (item, item.marker)
        for item in (*found, *others)
        if item.marker is not None and item.marker.coverage == now and item.marker.has_keys(keys)
    ]

    def priority(candidate: tuple[MarkerFile, Marker]) -> tuple[bool, bool, bool, float]:
        item, marker = candidate
        # A forced run on a simulated GPU leaves the marker of a real one in place. Its result depends on its own
        # marker, and with the other one here it would seem to have written none.
        other_run = run is None or marker.observed.run != run
        return other_run, marker.proof == PRETENDED, item.folder != name, -item.written

    candidates.sort(key=priority)
    judged = []
    for item, marker in candidates:
        judgement = _against_disk(root, item, marker, record, wanted)
        if judgement.state == "warm":
            usage.note(root, item.path)
            return judgement
        if item.folder == name:
            judged.append(judgement)
    neighbours = marker_files.neighbours(root, task.label)
    for item, marker in _elsewhere(neighbours, task, now, record):
        if marker.has_keys(keys):
            judgement = _against_disk(root, item, marker, record, wanted)
            if judgement.state == "warm":
                usage.note(root, item.path)
                return judgement
            judged.append(judgement)
        elif item.folder != name:
            found.append(item)
    if judged:
        return judged[0]
    good = [(item, item.marker) for item in found if item.marker is not None]
    for item in found:
        if item.marker is None and (not good or Path(item.path).stem == _expected(task, keys)):
            return Judgement("cold", "marker-unreadable", f"{item.path}: {item.problem}", path=item.path)
    same = [(item, marker) for item, marker in good if marker.coverage == now]
    if same:
        # As above, a marker of a real GPU is the one to compare with.
        return _against_toolchain(*min(same, key=lambda pair: pair[1].proof == PRETENDED), record, keys)
    nearest = [(item, item.marker) for item in neighbours if item.marker is not None]
    for item, marker in sorted(nearest, key=lambda pair: pair[0].written, reverse=True):
        if rows := differences(marker.coverage, now):
            return _against_toolchain(item, marker, record, keys, rows)
    return Judgement("cold", "no-marker")


def _elsewhere(
    found: Iterable[MarkerFile], task: Task, now: Mapping[str, object], record: Record
) -> list[tuple[MarkerFile, Marker]]:
    """Return the markers with this coverage in folders of another name, the best first."""
    of_any = [_sufficient(item, task) for item in found if item.marker is not None]
    known = [(item, item.marker) for item in of_any if item.marker is not None]
    # A marker of an unknown release proves nothing for a known one.
    unknown, here = now["sglang"] is None and record["sglang"]["version"], record["sglang"]["sources"]
    pairs = [
        (item, marker)
        for item, marker in known
        if (marker.schema == 1 or unknown)
        and {**marker.coverage, "sglang": None if unknown else marker.coverage.get("sglang")} == now
    ]
    return sorted(pairs, key=lambda pair: (here is None or pair[1].sources != here, -pair[0].written))


def reservation(marker: Marker) -> str:
    """Return the warning to show wherever this marker counts; "" for one that a real GPU made."""
    if marker.proof != PRETENDED:
        return ""
    gpu = marker.observed.pretended
    which = "a pretended one" if gpu is None else f"pretended {printable(gpu)[:40]}"
    return f"compiled without a GPU ({which}): experimental, not proven on hardware"


# Judging


def _sufficient(item: MarkerFile, task: Task) -> MarkerFile:
    """Return the marker, unless it claims less than the task requires, or a family without an entry.

    No run writes such a marker, and all that it lists could be there while nothing is compiled.
    """
    marker = item.marker
    if marker is None:
        return item
    for family in dict.fromkeys((*(task.claimed or ()), *marker.claims)):
        if family not in marker.claims:
            problem = f"it claims nothing for {printable(family)}"
        elif not marker.claims[family].entries:
            problem = f"it claims no entry for {family}"
        else:
            continue
        return replace(item, marker=None, problem=problem)
    return item


def _against_disk(root: Path, item: MarkerFile, marker: Marker, record: Record, wanted: ProofWanted) -> Judgement:
    mount = record["factors"].get("mount")
    missing, invalid, total, first = 0, 0, 0, ""
    unusable, stale = "", ""
    # Where the proof was made with the very same files, ninja itself has found that nothing is to be done.
    # Earlier versions recorded no times of headers.
    newer = {
        name: time
        for name, time in record.get("newest", {}).items()
        if marker.newest.get(name) != time and (name in marker.newest or name not in COMPILERS)
    }
    for family, claim in marker.claims.items():
        place = Tree(root, f"{family}/{claim.key}")
        if wanted.mounted:
            unusable = unusable or loadable.mount_problem(FAMILY[family], f"{root}/{family}/{claim.key}")
        stale = stale or loadable.stale(
            FAMILY[family], place, claim.entries, newer, mounted=wanted.mounted, inside=wanted.inside
        )
        stale = stale or leaves.unseen(FAMILY[family], place, claim.entries)
        for name in claim.entries:
            total += 1
            problem = inventory.check(FAMILY[family], place, name, mount=mount)
            if problem is None:
                continue
            gone = problem.kind is ProblemKind.MISSING
            missing, invalid = missing + gone, invalid + (not gone)
            first = first or f"{family}/{printable(name)[:200]}" + ("" if gone else f": {problem}")
    if missing or invalid:
        text = f"{missing} missing, {invalid} invalid"
        rows = [("entries", str(total), f"{total - missing - invalid} valid, {text}")]
        return Judgement("cold", "entries", f"{text} (first: {first})", marker, item.path, rows)
    if unusable or stale:
        rows = [("mount" if unusable else "sources", "", unusable or stale)]
        return Judgement("cold", "mount" if unusable else "stale", unusable or stale, marker, item.path, rows)
    whole = bool(marker.claims) and all(claim.entries for claim in marker.claims.values())
    proofs = build_proofs.of_marker(marker, record["sglang"], written=item.written)
    counts = [proof for proof in proofs if not wanted.strict or (proof.build.proof == VERIFIED and whole)]
    if not counts:
        return Judgement("cold", "unverified", "", marker, item.path, [("proof", describe(marker.proof), VERIFIED)])
    own = [proof for proof in counts if proof.same or wanted.build == "any"]
    if not own:
        rows = [("build", describe(counts[0].build.name), describe(counts[0].this.name))]
        return Judgement("cold", "build", counts[0].sentence, marker, item.path, rows, counts[0])
    young = [proof for proof in own if wanted.max_age is None or proof.age <= wanted.max_age]
    if not young:
        newest = min(own, key=lambda proof: proof.age)
        detail = f"proven {age(newest.age)} ago, on {newest.date}, and wanted {age(wanted.max_age or 0)} ago at most"
        return Judgement("cold", "age", detail, marker, item.path, [("proof", newest.date, "")], newest)
    return Judgement("warm", marker=marker, path=item.path, proof=young[0])


def _against_toolchain(
    item: MarkerFile, marker: Marker, record: Record, keys: Mapping[str, str], others: Sequence[Row] = ()
) -> Judgement:
    """Return why a marker of other keys, or of another coverage, does not do. others: the rows of the coverage.

    What is compiled anew costs more than what is only asked for anew, and comes first.
    """
    changed: dict[str, list[Row]] = {}
    for family in reasons.by_cost(marker.claims):
        claim = marker.claims[family]
        if keys[family] == claim.key:
            continue
        rows = differences(claim.factors, toolchain.family_factors(record, family))
        # Equal factors under another key: the table itself changed.
        changed[family] = rows or [("table", describe(marker.table), describe(TABLE_VERSION))]
    every = [(f"{family} {name}", was, now) for family, rows in changed.items() for name, was, now in rows]
    told = [reasons.anew(changed, len(marker.claims) - len(changed))] if changed else []
    if others:
        told.append(difference(others[0]) + (f" and {len(others) - 1} more" if len(others) > 1 else ""))
    every = [*_toolchain_row(marker, keys), *every, *others]
    kind: Kind = "compile" if changed else "coverage"
    return Judgement("cold", kind, "; ".join(told), marker, item.path, every, anew=tuple(changed))


def _toolchain_row(marker: Marker, keys: Mapping[str, str]) -> list[Row]:
    was, now = describe(marker.toolchain), toolchain.digest(keys)
    return [] if was == now else [("toolchain", was, now)]


def difference(row: Row) -> str:
    """Return one difference as the detail of a judgement: ``<factor> was A is B``, shortened."""
    factor, was, now = row
    before, after = brief(was, now)
    return f"{factor[:100]} was {before} is {after}"


def _expected(task: Task, keys: Mapping[str, str]) -> str | None:
    """Return the name of the marker that the task would write; None where only its run shows it."""
    claims = task.claimed
    if claims is None or any(family not in keys for family in claims):
        return None
    return toolchain.digest({family: keys[family] for family in claims})
