"""What a run tells: live lines, the table at the end, and one JSON document for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from builder.errors import BuilderError, ProblemsError

JSON_SCHEMA = 1


@dataclass
class TaskResult:
    """What became of one task. seconds is None for a task that nothing was done for. loaded: the weights it was warmed
    with, where it has a model (``weights``, ``dummy weights, 4 layers``). reservation: what has to be said wherever it
    is called warm.
    """

    label: str
    model: str
    key: str
    state: str
    reason: str = ""
    seconds: float | None = None
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

    @property
    def note(self) -> str:
        """The last column of the table."""
        parts = [self.reason]
        if self.state == "warm":
            parts.insert(0, f"since {self.since}" if self.since else "")
        if self.state == "warm":
            parts.append(self.reservation)
        if self.state in ("warm", "warmed") and self.loaded not in ("", "weights"):
            parts.append(f"with {self.loaded}")
        return ", ".join(part for part in parts if part)

    @property
    def proven(self) -> str | None:
        """How it is known that this task is warm; None where it is not."""
        return self.proof if self.state in ("warm", "warmed") else None


@dataclass
class Report:
    """One run's result; complete at every moment, so that an interrupted run has its report too."""

    verb: str | None
    image_ref: str = ""
    image_id: str | None = None
    toolchain: str | None = None
    cache: str = ""
    tasks: list[TaskResult] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    #: What a verb prints on stdout, where its result is text.
    text: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def set_tasks(self, tasks: Sequence[TaskResult]) -> None:
        """Replace all results; add one warning for each reservation that tasks have."""
        self.tasks = list(tasks)
        for reservation in dict.fromkeys(task.reservation for task in self.tasks if task.reservation):
            labels = ", ".join(task.label for task in self.tasks if task.reservation == reservation)
            if (warning := f"{labels}: {reservation}") not in self.warnings:
                self.warnings.append(warning)

    def add_result(self, result: TaskResult) -> None:
        """Replace the planned result of this task."""
        self.tasks[[task.label for task in self.tasks].index(result.label)] = result

    def of(self, label: str) -> TaskResult:
        """The result of this task so far."""
        return next(task for task in self.tasks if task.label == label)

    def count(self, *states: str) -> int:
        """How many tasks are in one of these states."""
        return sum(task.state in states for task in self.tasks)

    def document(self, exit_code: int, error: BuilderError | None) -> str:
        """The one document that ``--json`` prints."""
        data: dict[str, Any] = {
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
                    "seconds": None if task.seconds is None else round(task.seconds, 3),
                    "entries": dict(task.entries),
                    "entries_added": sum(task.added.values()),
                    "added": {name: number for name, number in task.added.items() if number},
                    "added_bytes": dict(task.added_bytes),
                    "loaded": task.loaded or None,
                    "verified": task.verified and task.proven is not None,
                    "reservation": task.reservation or None,
                    "proof": task.proven,
                    "log": task.log,
                }
                for task in self.tasks
            ],
            "gpus": self.gpus,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            **self.extra,
        }
        if error is not None:
            data["error"] = {"message": error.message}
            if isinstance(error, ProblemsError):
                data["error"]["problems"] = [
                    {"place": problem.place, "text": problem.text, "remedy": problem.remedy}
                    for problem in error.problems
                ]
        # The same document for everybody but GitHub's runner, which takes this for a command wherever it stands.
        return json.dumps(data, indent=2).replace("##[", "##\\u005b")
