"""Makes the marker of a warmed task, publishes it, and withdraws those that a run has refuted.

Only the agent writes markers, last, after all that they claim.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from builder.beneath import Tree
from builder.cache import build_proofs, marker_files, toolchain, usage
from builder.cache.coverage import coverage
from builder.cache.families import TABLE_VERSION
from builder.cache.marker_files import folder_name
from builder.cache.marker_format import PRETENDED, VERIFIED, Claim, Marker, Observed, Prebuild, Proof, encoded
from builder.cache.toolchain import Record
from builder.task import Task


def build(
    task: Task,
    *,
    record: Record,
    config_digest: str | None,
    claims: Iterable[str],
    entries: Mapping[str, Collection[str]],
    proof: Proof,
    second_pass_added: int | None,
    shapes: Iterable[str],
    observed: Observed,
    prebuild: Prebuild | None = None,
) -> Marker:
    """Return the marker of a warmed task.

    entries: by family, what the proof rests on; kept for the claimed families. ``verified`` needs entries in every
    claimed family; without, the marker has a lesser proof.
    """
    keys = toolchain.family_keys(record)
    claimed = {
        name: Claim(keys[name], toolchain.family_factors(record, name), tuple(sorted(set(entries.get(name, ())))))
        for name in sorted(set(claims))
    }
    if proof == VERIFIED and not (claimed and all(claim.entries for claim in claimed.values())):
        proof = "inventory" if claimed else "nothing-claimed"
    sglang = record["sglang"]
    return Marker(
        label=task.label,
        claims=claimed,
        coverage=coverage(task, record=record, config_digest=config_digest),
        proof=proof,
        toolchain=toolchain.digest(keys),
        table=TABLE_VERSION,
        second_pass_added=second_pass_added,
        shapes=tuple(shapes),
        written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        builds=(replace(build_proofs.build_of(sglang), proof=proof, time=int(time.time())),),
        sources=sglang["sources"],
        newest=record.get("newest", {}),
        prebuild=prebuild,
        observed=observed,
    )


def path_of(marker: Marker) -> str:
    """Return the path of a marker below the root."""
    # One that was made without a GPU never replaces one that a real GPU proved.
    kind = ".pretended" if marker.proof == PRETENDED else ""
    return f"markers/{folder_name(marker.label, marker.coverage)}/{toolchain.digest(marker.keys)}{kind}.json"


def publish(root: Path, marker: Marker) -> str:
    """Writes the marker last, after all that it claims; its path below `root`. Raises OSError and leaves nothing.

    Readers take no lock, and a machine may stop at any point. Step by step, and what a reader finds after each:

    1. ``.<digest>.json.<unique>.tmp`` beside the marker is created: no reader looks at names with a leading dot. Two
       writers have two of them.
    2. It is written and fsynced: still no reader. A kill leaves it behind, without effect.
    3. It is renamed onto ``<digest>.json``: a reader opens the old file or the new one, whole. The second of two
       writers wins; both were right.
    4. The directory is fsynced: only now does a crash of the machine keep the new name. Before, it may keep the old
       file, which is only older. Without step 2 it could keep the new name on an empty file.

    The builds of the marker that it replaces stay, after its own.
    """
    path = path_of(marker)
    with Tree(root) as tree:
        if (before := marker_files.read_in(tree, path)) is not None:
            known = marker.builds
            earlier = [each for each in before.builds if not any(build_proofs.is_same(each, own) for own in known)]
            marker = replace(marker, builds=(*known, *earlier))
        tree.write_atomically(path, encoded(marker))
    usage.stamp(root, path)
    return path


def withdraw(root: Path, task: Task, *, record: Record, config_digest: str | None) -> list[str]:
    """Remove the markers by which this task would count as warm; return their paths. Raises OSError.

    For a run that showed that it is not: markers are proofs, and the newer one decides. A run on a simulated GPU shows
    nothing of a real one, whose markers stay.
    """
    now, keys = coverage(task, record=record, config_digest=config_digest), toolchain.family_keys(record)
    name = folder_name(task.label, now)
    found = [*marker_files.folder(root, name), *marker_files.duplicates(root, name)]
    found += marker_files.neighbours(root, task.label)
    pretended = bool(record["observed"].get("pretended"))
    gone = []
    with Tree(root) as tree:
        for item in found:
            marker = item.marker
            if marker is None or marker.coverage != now or not marker.has_keys(keys) or item.path in gone:
                continue
            if not pretended or marker.proof == PRETENDED:
                with contextlib.suppress(FileNotFoundError):
                    tree.unlink(item.path)
                gone.append(item.path)
    return gone
