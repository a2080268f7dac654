"""The protocol on the container's stdout: JSON lines behind a prefix that carries the run's nonce.

A line counts as an event only if it begins with ``@warmup <nonce> `` and the rest parses as a JSON object with a known
``event``. Anything else, a broken event included, is log.

Events and their fields:

- start: pid, lease ("flock" or "stdin"), family_keys {family: key}, toolchain (digest)
- phase: phase (a short word or two for people)
- progress: done, total, unit
- entries: families {family: valid entries}, added {family: new since the start}
- locked: path (modes ``lock``, ``views`` and ``hold``: that lock is held from now on)
- toolchain: record (what `toolchain.probe` found)
- swept: family, key, path, why (one per leftover or invalid entry moved aside)
- removed: family, key, path (mode ``sweep``: gone for good, after it has lain aside for longer than a job may last;
  without family and key: views and generations that nobody has)
- kept: family, key, path, why (mode ``sweep``: would go, and may not)
- checked: family, key, entries (mode ``verify``: how many were looked at; one per family directory)
- bad: family, key, entry, problem (mode ``verify``: an entry that is not valid, and was not moved)
- pruned: kind (marker, memo, family, entries), path, family, key, bytes, why, stays ("" for what went, or would: mode
  ``prune``); planned: the same, of a dry run
- freed: before, after (bytes of the root, now and as planned), freed (bytes that were deleted), left [text], images,
  kept_images [ids] (mode ``prune``, once)
- holding: family, key, entries, invalid, bytes (mode ``status``, one per family directory)
- used: path, time (mode ``status``, one per marker: when it was last of use, in seconds since the epoch)
- described: family, key, written, factors (mode ``families``, one per family directory)
- sample: metric, value, labels {name: value} (mode ``survey``)
- omitted: family, key, why (mode ``view-create``: a family directory that the generation does not have)
- view: view, generation, created, engine (mode ``view-create``); and bytes, files, idle (mode ``view-list``)
- generation: id, asked, bytes, files, views [name] (mode ``view-list``)
- finding: the fields of `findings.Finding` (mode ``view-audit``: one thing that the job changed)
- audited: used, asked [shape], counts {kind: n}, seconds, truncated (mode ``view-audit``: all of it together)
- recorded: file (below the checkout), record and its fields as `recording.encode` has them (mode ``record``)
- verdict: state (warmed, failed, partial, skipped, stopped), reason, entries {family: n} of the families it claims,
  added {family: n} and added_bytes {family: bytes} of any family, loaded (the weights, or null), proof,
  second_pass_added, shapes [str], marker (path below the root, or null), unusable (the root is, for every task alike),
  seconds
- end: stdout, stderr: bytes this program wrote to each, this line not included. Always the last line.
"""

from __future__ import annotations

import json
from typing import Any

#: Exit status of the program by what its verdict says; modes without a verdict end with one of the first two.
WARMED, FAILED, PARTIAL, SKIPPED = 0, 20, 21, 22

NAMES = frozenset(
    {"start", "phase", "progress", "entries", "locked", "toolchain", "swept", "removed", "kept", "checked", "bad"}
    | {"pruned", "planned", "freed", "holding", "used", "described", "sample", "omitted", "view", "generation"}
    | {"finding", "audited", "recorded", "verdict", "end"}
)


def prefix(nonce: str) -> bytes:
    """What an event line begins with."""
    return f"@warmup {nonce} ".encode("ascii")


def encode(nonce: str, event: str, **fields: Any) -> bytes:
    """One event line, newline included."""
    return prefix(nonce) + json.dumps({"event": event, **fields}, separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes, nonce: str) -> dict[str, Any] | None:
    """The event in this line (with or without its newline), or None when it is log. Never raises."""
    start = prefix(nonce)
    if not line.startswith(start):
        return None
    try:
        event = json.loads(line[len(start) :])
    except (ValueError, RecursionError):
        return None
    name = event.get("event") if isinstance(event, dict) else None
    return event if isinstance(name, str) and name in NAMES else None
