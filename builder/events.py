"""The protocol on the container's stdout: JSON lines behind a prefix that carries the run's nonce.

A line is an event only if it begins with ``@warmup <nonce> `` and the rest is a JSON object of one of the classes here:
``event`` has its wire name, the other keys are its fields. Any other line is log, a malformed event included.

Times are seconds since the epoch, durations seconds, sizes bytes. Paths are below the root, or the family's directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from builder.typed_json import from_object

#: Exit status of the program by the state of its verdict; modes without a verdict end with one of the first two.
WARMED, FAILED, PARTIAL, SKIPPED = 0, 20, 21, 22

_KINDS: dict[str, type[Event]] = {}


@dataclass(frozen=True)
class Event:
    """Base of all events. wire_name: the value of the key ``event``, the class's name in lower case: ``bad_entry``."""

    wire_name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        cls.wire_name = re.sub(r"\B[A-Z]", r"_\g<0>", cls.__name__).lower()
        _KINDS[cls.wire_name] = cls


# --- every mode ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase(Event):
    """What the program does from now on, in a few words for people."""

    phase: str


@dataclass(frozen=True)
class End(Event):
    """The last line. Bytes that the program wrote to each stream, this line not included."""

    stdout: int
    stderr: int


@dataclass(frozen=True)
class Locked(Event):
    """Modes ``lock``, ``views`` and ``hold``: the lock at `path` is held from now on."""

    path: str


# --- probing and warming ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolchainProbed(Event):
    """The toolchain record of this environment (`cache.toolchain`)."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Started(Event):
    """The environment is probed; the task starts."""

    pid: int
    lease: Literal["flock", "stdin", "none"]  # what ends the program when the builder dies
    family_keys: Mapping[str, str]
    toolchain: str  # digest


@dataclass(frozen=True)
class Progress(Event):
    """How far the current phase is."""

    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class EntryCounts(Event):
    """Entries by family, counted and not validated."""

    families: Mapping[str, int]
    added: Mapping[str, int]  # since the pass began


@dataclass(frozen=True)
class Quarantined(Event):
    """A leftover or an invalid entry was moved to quarantine."""

    family: str
    key: str
    path: str
    why: str


@dataclass(frozen=True)
class Verdict(Event):
    """The outcome of a task."""

    state: Literal["warmed", "failed", "partial", "skipped", "stopped"] = "failed"
    reason: str = ""
    entries: Mapping[str, int] = field(default_factory=dict)  # valid ones, of the families that the task claims
    added: Mapping[str, int] = field(default_factory=dict)  # entries, of any family
    added_bytes: Mapping[str, int] = field(default_factory=dict)
    loaded: str | None = None  # the weights; None: the recipe loads none
    proof: str | None = None
    second_pass_added: int | None = None  # entries
    shapes: tuple[str, ...] = ()  # of the first pass
    marker: str | None = None  # path below the root
    unusable: bool = False  # the cache root is, for every task
    seconds: float = 0.0


# --- sweep, verify, prune --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removed(Event):
    """Something was deleted from the quarantine; with no family and key, an unused view or generation."""

    family: str
    key: str
    path: str


@dataclass(frozen=True)
class Kept(Event):
    """Something would be deleted, and may not be."""

    family: str
    key: str
    path: str
    why: str


@dataclass(frozen=True)
class BadEntry(Event):
    """Mode ``verify``: an entry is not valid, and was not moved."""

    family: str
    key: str
    entry: str
    problem: str


@dataclass(frozen=True)
class Checked(Event):
    """Mode ``verify``: a family directory is done."""

    family: str
    key: str
    entries: int


@dataclass(frozen=True)
class Pruned(Event):
    """Mode ``prune``: one step was done, or refused."""

    kind: str  # marker, memo, family or entries
    path: str
    family: str
    key: str
    bytes: int
    why: str
    stays: str = ""  # why nothing was removed


@dataclass(frozen=True)
class Planned(Pruned):
    """Mode ``prune``, dry run: one step that would be done, or refused."""


@dataclass(frozen=True)
class Freed(Event):
    """Mode ``prune``, once: the sum."""

    before: int  # bytes of the root
    after: int  # bytes of the root when every step is done
    freed: int  # bytes that were deleted
    left: tuple[str, ...] = ()  # what keeps the root above its limit, one sentence each
    images: tuple[str, ...] = ()  # identities that no marker or memo names any more
    kept_images: tuple[str, ...] = ()  # identities that are still named
    blocked: float = 0.0  # seconds for which the removal that waits longest was kept waiting by jobs


@dataclass(frozen=True)
class FamilyContents(Event):
    """Mode ``status``: one family directory."""

    family: str
    key: str
    entries: int
    invalid: int
    bytes: int


@dataclass(frozen=True)
class MarkerUsed(Event):
    """Mode ``status``: when a marker was last used."""

    path: str
    time: float


@dataclass(frozen=True)
class FamilyDescribed(Event):
    """Mode ``families``: one family directory, with the factors that its key stands for, where they are known."""

    family: str
    key: str
    written: float = 0.0
    factors: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class MetricSample(Event):
    """Mode ``survey``: one number about the root."""

    metric: str
    value: float
    labels: Mapping[str, str]


# --- views -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FamilyOmitted(Event):
    """Mode ``view-create``: a family directory is not in the view's generation."""

    family: str
    key: str
    why: str


@dataclass(frozen=True)
class ViewState(Event):
    """Modes ``view-create``, ``view-list`` and ``view-audit``: one view.

    Without a readable record only its name and size are known.
    """

    view: str
    generation: str = ""  # that it is based on
    created: float = 0.0
    engine: str = ""  # id of the engine that has its volume
    bytes: int = 0  # of the files that the job wrote
    files: int = 0
    idle: float = 0.0  # seconds since the last write


@dataclass(frozen=True)
class GenerationState(Event):
    """Mode ``view-list``: one generation."""

    id: str
    asked: float  # when a view was last made of it
    bytes: int
    files: int
    views: tuple[str, ...]  # names of the views that are based on it


@dataclass(frozen=True, order=True)
class Finding(Event):
    """Mode ``view-audit``: one change by a job; see `cache.findings`.

    path: from the family's directory, or from the root where no family is known.
    """

    family: str
    key: str
    kind: str  # one of cache.findings.KINDS
    path: str
    detail: str = ""
    bytes: int = 0  # of the entry as it is now
    began: float = 0.0  # first and last write of its files; 0.0 where unknown
    ended: float = 0.0
    shape: str = ""  # of DeepGEMM, where the times of sglang's locks show it


@dataclass(frozen=True)
class Audited(Event):
    """Mode ``view-audit``, once: the sum of all findings, of which only the foremost are events."""

    used: int  # entries that were hit
    asked: tuple[tuple[str, int, int, int], ...]  # shapes with a lock that was taken: kernel, N, K, groups
    counts: Mapping[str, int]  # findings by kind
    seconds: float  # in which something was compiled
    truncated: str = ""  # why there may be more


# --- prebuilding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelsPlanned(Event):
    """Mode ``plan``: the entries that a shape needs: M, names. tasks: labels of models that ask for the shape."""

    shape: str
    m_values: tuple[int, ...]
    chunked_prefill_size: int
    kernels: tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True)
class ModelWalked(Event):
    """Mode ``plan``: the shapes that a task asks for. source: ``sglang`` (its own code) or ``table`` (ours)."""

    task: str
    source: Literal["sglang", "table"]
    shapes: tuple[str, ...]
    note: str = ""  # why sglang's own code did not tell
    modules: tuple[str, ...] = ()  # of sglang's own JIT (`prebuild_forks.Request`)


@dataclass(frozen=True)
class PrebuildProblem(Event):
    """Modes ``plan`` and ``prebuild``: something that was not done. what: a shape, a task, or names of entries."""

    what: tuple[str, ...]
    kind: Literal["shape", "task", "entries", "modules", "all"]
    why: str


@dataclass(frozen=True)
class KernelsPrebuilt(Event):
    """Mode ``prebuild``, once, at the end: names of entries by what became of them."""

    key: str  # of deep_gemm
    made: int
    present: int  # before
    missing: tuple[str, ...]
    bytes: int  # of what was made
    workers: int  # at the same time, at most
    worker_bytes: int  # of the largest worker with its compiler; 0: none was measured
    cpu_seconds: float
    import_seconds: float
    paused: float  # seconds, under pressure


@dataclass(frozen=True)
class ModulesPrebuilt(Event):
    """Mode ``prebuild``: modules of sglang's own JIT that a later process finds, which may compile nothing."""

    found: int


@dataclass(frozen=True)
class LaunchRecorded(Event):
    """Mode ``record``: one record of a test file, as `recording.from_mapping` reads it. file: below the checkout."""

    file: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class ImageResult(Event):
    """Modes ``pack``, ``restore``: a `packing.Packed` or `restore.RestoreResult`, or why there is none."""

    result: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    busy: bool = False  # another process has what is needed


# --- the codec -------------------------------------------------------------------------------------------------------


def prefix(nonce: str) -> bytes:
    """Return what an event line begins with."""
    return f"@warmup {nonce} ".encode("ascii")


def encode(nonce: str, event: Event) -> bytes:
    """Return the event's line, newline included."""
    data = {"event": event.wire_name, **{each.name: getattr(event, each.name) for each in fields(event)}}
    return prefix(nonce) + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes, nonce: str) -> Event | None:
    """Return the event in this line (with or without its newline), or None if the line is log. Never raises."""
    start = prefix(nonce)
    if not line.startswith(start):
        return None
    try:
        data = json.loads(line[len(start) :])
        return from_object(_KINDS[data.pop("event")], data, "event")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
