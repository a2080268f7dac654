"""Markers: the record that a task is warm for the keys of the families it claims.

``markers/<label>-<coverage digest>/<digest of the claimed keys>.json``. A marker is a claim about the disk, checked
against the disk each time it is read: it holds only while the entries that it lists are there and valid. Anything may
lie where a marker should be (half a file, another schema, a directory, a FIFO); that is a reason to be cold, never an
error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from builder import files
from builder.cache import inventory, toolchain, usage
from builder.cache.coverage import (
    RECIPE_VERSIONS,
    brief,
    config_digest,
    coverage,
    coverage_digest,
    describe,
    differences,
    needs_config,
    normalise_argv,
)
from builder.cache.entries import MISSING
from builder.cache.families import FAMILY, TABLE_VERSION, directory
from builder.cache.marker_files import SCHEMA, Found, claimed_keys, folder, folder_name, neighbours, read, twins
from builder.cache.toolchain import Record
from builder.task import Task
from builder.text import printable

__all__ = [
    "PRETENDED",
    "RECIPE_VERSIONS",
    "SCHEMA",
    "VERIFIED",
    "Judgement",
    "build",
    "claimed_keys",
    "config_digest",
    "coverage",
    "coverage_digest",
    "judge",
    "needs_config",
    "normalise_argv",
    "publish",
    "read",
    "reservation",
]

#: The proof of a second pass in a new process that added nothing. Others: steady, inventory, nothing-claimed.
VERIFIED = "verified"
#: The same, on a GPU that was not there: never as good as verified.
PRETENDED = "pretended"

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Judgement:
    """Whether a task is warm.

    reason: "" when warm, else one of ``no-marker``, ``compile: <family> <factor> was A is B``,
    ``coverage: <factor> was A is B``, ``entries: N missing, M invalid (first: …)``, ``marker-unreadable: …``,
    ``unverified``. marker, path (below the root): the marker that was judged, or the nearest one. differences:
    (factor, was, is) against it, in full.
    """

    state: Literal["warm", "cold"]
    reason: str
    marker: dict[str, Any] | None = None
    path: str | None = None
    differences: list[Row] = field(default_factory=list)


def judge(root: Path, task: Task, *, record: Record, config_digest: str | None, strict: bool = False) -> Judgement:
    """Compares the task with the markers below `root` and their entries with the disk. Reads only, never raises for
    what it finds. strict: only a marker with the proof ``verified`` counts."""
    now = coverage(task, record=record, config_digest=config_digest)
    keys = toolchain.family_keys(record)
    found = [_vouching(item, task) for item in folder(root, folder_name(task.label, now))]
    good = [(item, item.marker) for item in found if item.marker is not None]
    same = [(item, marker) for item, marker in good if marker["coverage"] == now]
    # What a real GPU proved goes before what was made without one since.
    same.sort(key=lambda pair: pair[1]["proof"] == PRETENDED)
    cold = [_against_disk(root, item, marker, record, strict) for item, marker in same if _has_keys(marker, keys)]
    for judgement in cold:
        if judgement.state == "warm":
            usage.note(root, str(judgement.path))
            return judgement
    for item in twins(root, folder_name(task.label, now)):
        # The same work under another label: a label is only what people call it.
        marker = _vouching(item, task).marker
        if marker is not None and marker["coverage"] == now and _has_keys(marker, keys):
            judgement = _against_disk(root, item, marker, record, strict)
            if judgement.state == "warm":
                return judgement
    if cold:
        return cold[0]
    for item in found:
        if item.marker is None and (not good or Path(item.path).stem == _expected(task, keys)):
            return Judgement("cold", f"marker-unreadable: {item.path}: {item.problem}", path=item.path)
    if same:
        return _against_toolchain(*same[0], record, keys)
    nearest = [(item, item.marker) for item in neighbours(root, task.label) if item.marker is not None]
    for item, marker in sorted(nearest, key=lambda pair: pair[0].written, reverse=True):
        if rows := differences(marker["coverage"], now):
            return Judgement(
                "cold", _reason("coverage: ", rows), marker, item.path, _toolchain_row(marker, keys) + rows
            )
    return Judgement("cold", "no-marker")


def build(
    task: Task,
    *,
    record: Record,
    config_digest: str | None,
    claims: Iterable[str],
    entries: Mapping[str, Collection[str]],
    proof: str,
    second_pass_added: int | None,
    shapes: Iterable[str],
    observed: Mapping[str, Any],
) -> dict[str, Any]:
    """The marker of a warmed task. entries: by family, what the proof rests on; kept for the claimed families.

    ``verified`` needs entries in every claimed family; without, the proof is written down as the lesser one it is.
    """
    keys = toolchain.family_keys(record)
    claimed = sorted(set(claims))
    listed = {family: sorted(set(entries.get(family, ()))) for family in claimed}
    if proof == VERIFIED and not (claimed and all(listed.values())):
        proof = "inventory" if claimed else "nothing-claimed"
    return {
        "schema": SCHEMA,
        "label": task.label,
        "table": TABLE_VERSION,
        "claims": claimed,
        "keys": {family: keys[family] for family in claimed},
        "factors": {family: toolchain.family_factors(record, family) for family in claimed},
        "toolchain": toolchain.digest(keys),
        "coverage": coverage(task, record=record, config_digest=config_digest),
        "entries": listed,
        "proof": proof,
        "second_pass_added": second_pass_added,
        "shapes": list(shapes),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "observed": dict(observed),
    }


def reservation(marker: Mapping[str, Any]) -> str:
    """What has to be said wherever the marker is believed; "" for one that a real GPU made."""
    if marker.get("proof") != PRETENDED:
        return ""
    observed = marker.get("observed")
    gpu = observed.get("pretended") if isinstance(observed, dict) else None
    which = f"pretended {printable(gpu)[:40]}" if isinstance(gpu, str) else "a pretended one"
    return f"compiled without a GPU ({which}): experimental, not proven on hardware"


def publish(root: Path, marker: Mapping[str, Any]) -> str:
    """Writes the marker last, after all that it claims; its path below `root`. Raises OSError and leaves nothing.

    Readers take no lock, and a machine may stop at any point. Step by step, and what a reader finds after each:

    1. ``.<digest>.json.<unique>.tmp`` beside the marker is created: no reader looks at names with a leading dot. Two
       writers have two of them.
    2. It is written and fsynced: still nobody reads it. A kill leaves it behind, without effect.
    3. It is renamed onto ``<digest>.json``: a reader opens the old file or the new one, whole. The second of two
       writers wins; both were right.
    4. The directory is fsynced: only now does a crash of the machine keep the new name. Before, it may keep the old
       file, which is only older. Without step 2 it could keep the new name on an empty file.
    """
    # One made without a GPU lies beside what a real one proved, and never in its place.
    kind = ".pretended" if marker["proof"] == PRETENDED else ""
    name = f"{toolchain.digest(marker['keys'])}{kind}.json"
    path = f"markers/{folder_name(str(marker['label']), marker['coverage'])}/{name}"
    files.write_atomically(root / path, json.dumps(marker, indent=1).encode("ascii") + b"\n")
    usage.stamp(root, path)
    return path


# Judging


def _has_keys(marker: Mapping[str, Any], keys: Mapping[str, str]) -> bool:
    """Whether the families that it claims are those of now."""
    return all(keys[family] == marker["keys"][family] for family in marker["claims"])


def _required(task: Task) -> tuple[str, ...] | None:
    """The families that a marker of this task claims at least; None where only its run can tell."""
    if task.families is not None:
        return task.families
    return ("deep_gemm",) if task.recipe in ("compile-deep-gemm", "shapes") else None


def _vouching(item: Found, task: Task) -> Found:
    """The marker, unless it vouches for less than the task requires or for a family without an entry: no run writes
    such a one, and what it lists could be all there while nothing is compiled."""
    marker = item.marker
    if marker is None:
        return item
    for family in dict.fromkeys((*(_required(task) or ()), *marker["claims"])):
        if family not in marker["claims"]:
            problem = f"it claims nothing for {printable(family)}"
        elif not marker["entries"][family]:
            problem = f"it claims no entry for {family}"
        else:
            continue
        return replace(item, marker=None, problem=problem)
    return item


def _against_disk(root: Path, item: Found, marker: dict[str, Any], record: Record, strict: bool) -> Judgement:
    mount = record["factors"].get("mount")
    missing, invalid, total, first = 0, 0, 0, ""
    for family in marker["claims"]:
        place = Path(directory(str(root), family, marker["keys"][family]))
        for name in marker["entries"][family]:
            total += 1
            problem = inventory.check(FAMILY[family], place, name, mount=mount)
            if problem is None:
                continue
            gone = problem == MISSING
            missing, invalid = missing + gone, invalid + (not gone)
            first = first or f"{family}/{printable(name)[:200]}" + ("" if gone else f": {problem}")
    if missing or invalid:
        text = f"{missing} missing, {invalid} invalid"
        rows = [("entries", str(total), f"{total - missing - invalid} valid, {text}")]
        return Judgement("cold", f"entries: {text} (first: {first})", marker, item.path, rows)
    proven = marker["proof"] == VERIFIED and bool(marker["claims"]) and all(marker["entries"].values())
    if strict and not proven:
        return Judgement("cold", "unverified", marker, item.path, [("proof", describe(marker["proof"]), VERIFIED)])
    return Judgement("warm", "", marker, item.path)


def _against_toolchain(item: Found, marker: dict[str, Any], record: Record, keys: Mapping[str, str]) -> Judgement:
    rows: list[Row] = []
    for family in marker["claims"]:
        if keys[family] == marker["keys"][family]:
            continue
        was = marker["factors"].get(family, {})
        changed = differences(was, toolchain.family_factors(record, family))
        if not changed:  # equal factors under another key: the table itself changed
            changed = [("table", describe(marker.get("table")), describe(TABLE_VERSION))]
        rows += [(f"{family} {factor}", before, after) for factor, before, after in changed]
    return Judgement("cold", _reason("compile: ", rows), marker, item.path, _toolchain_row(marker, keys) + rows)


def _toolchain_row(marker: Mapping[str, Any], keys: Mapping[str, str]) -> list[Row]:
    was, now = describe(marker.get("toolchain")), toolchain.digest(keys)
    return [] if was == now else [("toolchain", was, now)]


def _reason(kind: str, rows: list[Row]) -> str:
    factor, was, now = rows[0]
    before, after = brief(was, now)
    return f"{kind}{factor[:100]} was {before} is {after}"


def _expected(task: Task, keys: Mapping[str, str]) -> str | None:
    """The name of the marker that the task would write, where that can be told before it has run."""
    claims = _required(task)
    if claims is None or any(family not in keys for family in claims):
        return None
    return toolchain.digest({family: keys[family] for family in claims})
