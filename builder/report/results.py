"""Results of a run and of its tasks, and the JSON document of ``--json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar

from builder.errors import BuilderError, ProblemsError

JSON_SCHEMA = 1
#: States of tasks that are not warm, the first to be named first.
_WORST = ("failed", "partial", "skipped", "cold")


@dataclass(frozen=True)
class ProvenBy:
    """The build of sglang that proved a task, against the one that is here.

    age: seconds since then. sentence: "" where it is the same build. warning: what to expect of changed sources. rank:
    of the costliest family that this concerns, 0 for the costliest of all.
    """

    build: Literal["same", "other"]
    kernel_sources: Literal["same", "changed", "unknown"]
    age: float
    sentence: str = ""
    warning: str = ""
    rank: int = 0


@dataclass
class TaskResult:
    """The result of one task.

    state: warm, warmed, cold, failed, partial or skipped.
    seconds: run time; None if nothing ran. began: seconds since the epoch. gpus: indices of those that it had.
    loaded: the weights it was warmed with, if it has a model (``weights``, ``dummy weights, 4 layers``).
    reservation: a limit of its proof that is shown wherever the task is called warm.
    short_of_budget: it was not done because the run's budget did not suffice.
    compiled_anew: families with another key than the nearest marker's, the costliest first.
    """

    label: str
    model: str
    key: str
    state: str
    reason: str = ""
    seconds: float | None = None
    began: float | None = None
    gpus: Sequence[int] = ()
    entries: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    added_bytes: Mapping[str, int] = field(default_factory=dict)
    loaded: str = ""
    verified: bool = False
    proof: str | None = None
    since: str = ""
    reservation: str = ""
    log: str | None = None
    tail: Sequence[str] = ()
    short_of_budget: bool = False
    proven_by: ProvenBy | None = None
    compiled_anew: Sequence[str] = ()

    @property
    def note(self) -> str:
        """Return the text of the last column of the table."""
        parts = [self.reason]
        if self.state == "warm":
            by = self.proven_by.sentence if self.proven_by else ""
            parts.insert(0, by or (f"since {self.since}" if self.since else ""))
        if self.state == "warm":
            parts.append(self.reservation)
        if self.state in ("warm", "warmed") and self.loaded not in ("", "weights"):
            parts.append(f"with {self.loaded}")
        return ", ".join(part for part in parts if part)

    @property
    def proven(self) -> str | None:
        """Return the kind of proof that this task is warm; None if it is not warm."""
        return self.proof if self.state in ("warm", "warmed") else None


@dataclass
class GpuResult:
    """One GPU of the machine, as it was before the run; the fields are keys of the document.

    held_by: ids of the processes that used it.
    free_again_seconds: longest time that it was in use after a task; None: it never was free again, or no task ran.
    """

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    held_by: list[int]
    free_again_seconds: float | None = None


@dataclass
class Section:
    """Base of what a verb or a stage adds to the document: each field is a key at its top level."""

    def to_json(self) -> Mapping[str, object]:
        """Return the keys and their values, of JSON's types."""
        return asdict(self)


@dataclass
class Text(Section):
    """Text that is the whole result of a verb, below the verb's name."""

    verb: str
    text: str

    def to_json(self) -> Mapping[str, object]:
        return {self.verb: self.text}


S = TypeVar("S", bound=Section)


@dataclass
class Report:
    """The result of a run; complete at every moment, so that an interrupted run has a report too."""

    verb: str | None
    image_ref: str = ""
    image_id: str | None = None
    toolchain: str | None = None
    cache: str = ""
    tasks: list[TaskResult] = field(default_factory=list)
    gpus: list[GpuResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lock_wait: float = 0.0  # seconds, for locks of other builders
    #: Text that the verb prints on stdout.
    text: str | None = None
    #: `text` is arguments of ``docker run``.
    docker_arguments: bool = False
    #: By class: there is one of each.
    _sections: dict[type[Section], Section] = field(default_factory=dict)

    def add_lock_wait(self, seconds: float) -> None:
        """Count a wait for a lock of another builder."""
        self.lock_wait += seconds

    def add(self, section: Section) -> None:
        """Add a section to the document, or replace the one of this class."""
        self._sections[type(section)] = section

    def section(self, kind: type[S]) -> S | None:
        """Return the section of this class."""
        found = self._sections.get(kind)
        return found if isinstance(found, kind) else None

    @property
    def changed_sources(self) -> str:
        """What to expect of changed kernel sources, for all warm tasks, the costliest first; "" for nothing."""
        proofs = [(task.proven_by, task.label) for task in self.tasks if task.proven_by and task.state == "warm"]
        found: dict[str, list[str]] = {}
        for proof, label in sorted(proofs, key=lambda pair: pair[0].rank):
            if proof.warning:
                found.setdefault(proof.warning, []).append(label)
        return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in found.items())

    def set_tasks(self, tasks: Sequence[TaskResult]) -> None:
        """Replace all results; add one warning for each reservation, and each change of sources, that tasks have."""
        self.tasks = list(tasks)
        found: dict[str, list[str]] = {}
        for task in self.tasks:
            changed = task.proven_by.warning if task.proven_by and task.state == "warm" else ""
            for text in filter(None, (task.reservation, changed)):
                found.setdefault(text, []).append(task.label)
        for text, labels in found.items():
            if (warning := f"{', '.join(labels)}: {text}") not in self.warnings:
                self.warnings.append(warning)

    def add_result(self, result: TaskResult) -> None:
        """Replace the planned result of this task."""
        self.tasks[[task.label for task in self.tasks].index(result.label)] = result

    def of(self, label: str) -> TaskResult:
        """Return the current result of this task."""
        return next(task for task in self.tasks if task.label == label)

    def worst(self, rank: Callable[[str], int]) -> TaskResult | None:
        """Return the task whose reason comes first: failed before cold, then what costs most to compile anew.

        rank: of a family, 0 for the costliest. None where no task failed or is cold.
        """

        def order(task: TaskResult) -> tuple[int, int]:
            return _WORST.index(task.state), min(map(rank, task.compiled_anew), default=1000)

        return min((task for task in self.tasks if task.state in _WORST), key=order, default=None)

    def count(self, *states: str) -> int:
        """Return how many tasks are in one of these states."""
        return sum(task.state in states for task in self.tasks)

    def document(self, exit_code: int, error: BuilderError | None) -> str:
        """Return the JSON document of ``--json``."""
        data: dict[str, object] = {
            "schema": JSON_SCHEMA,
            "verb": self.verb,
            "exit": exit_code,
            "image": {"ref": self.image_ref, "id": self.image_id},
            "toolchain": self.toolchain,
            "cache": self.cache,
            "tasks": [
                {
                    "model": task.model,
                    "label": task.label,
                    "key": task.key,
                    "state": task.state,
                    "reason": task.reason,
                    "compiled_anew": list(task.compiled_anew),
                    "seconds": None if task.seconds is None else round(task.seconds, 3),
                    "entries": dict(task.entries),
                    "entries_added": sum(task.added.values()),
                    "added": {name: number for name, number in task.added.items() if number},
                    "added_bytes": dict(task.added_bytes),
                    "loaded": task.loaded or None,
                    "verified": task.verified and task.proven is not None,
                    "reservation": task.reservation or None,
                    "proof": task.proven,
                    "build": task.proven_by and task.proven_by.build,
                    "kernel_sources": task.proven_by and task.proven_by.kernel_sources,
                    "proof_age": task.proven_by and round(task.proven_by.age),
                    "log": task.log,
                }
                for task in self.tasks
            ],
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
        }
        for section in self._sections.values():
            data |= section.to_json()
        if error is not None:
            found = error.problems if isinstance(error, ProblemsError) else None
            problems = [{"place": each.location, "text": each.text, "remedy": each.remedy} for each in found or ()]
            data["error"] = {"message": error.message, **({} if found is None else {"problems": problems})}
        # GitHub's runner takes ##[ for a command anywhere in a line; escaped, the document means the same.
        return json.dumps(data, indent=2).replace("##[", "##\\u005b")
