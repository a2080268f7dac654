"""Compares tasks with markers: warm, or cold for a named reason. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from builder.cache import marker_format, markers, reasons, toolchain, variables
from builder.cache.build_proofs import ProofWanted
from builder.cache.coverage import coverage, coverage_digest, needs_config
from builder.cache.model_store import config_digest
from builder.cache.toolchain import Record
from builder.report.results import ProvenBy, TaskResult
from builder.task import Task
from builder.text import printable

ProbeEnv = tuple[tuple[str, str], ...]


def probe_env(task: Task) -> ProbeEnv:
    """Return the variables of a task that change its record: what a probe finds, and factors of families."""
    return tuple(
        sorted(
            (name, value)
            for name, value in task.env.items()
            if name in toolchain.PROBE_ENV or variables.factor_of(name) is not None
        )
    )


@dataclass(frozen=True)
class Item:
    """One task and its judgement by the cache."""

    task: Task
    record: Record
    config_digest: str | None
    config_problem: str | None
    judgement: markers.Judgement
    prebuilt: Mapping[str, str] = field(default_factory=dict)  # keys, by family, of a complete prebuild before it

    @property
    def warm(self) -> bool:
        return self.judgement.state == "warm"

    @property
    def key(self) -> str:
        """The digest that names the task's marker directory."""
        return coverage_digest(coverage(self.task, record=self.record, config_digest=self.config_digest))


@dataclass(frozen=True)
class Plan:
    """All tasks of one run, in manifest order."""

    items: tuple[Item, ...]

    @property
    def cold(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if not item.warm)

    def results(self) -> list[TaskResult]:
        """Return each task's result as long as nothing is done for it."""
        return [before(item) for item in self.items]

    @property
    def digest(self) -> str:
        """The toolchain, for people; the first task's where an unusual environment gives several."""
        return toolchain.digest(toolchain.family_keys(self.items[0].record)) if self.items else ""


def make_plan(
    tasks: Sequence[Task],
    records: Mapping[ProbeEnv, Record],
    *,
    root: Path,
    store: Path | None,
    wanted: ProofWanted | None = None,
    run: str | None = None,
) -> Plan:
    """Judge every task by the cache root (or a copy of its index) at ``root``; `run`'s markers have priority."""
    return Plan(tuple(_item(task, records[probe_env(task)], root, store, wanted, run) for task in tasks))


def _item(
    task: Task, record: Record, root: Path, store: Path | None, wanted: ProofWanted | None, run: str | None
) -> Item:
    digest, problem = None, None
    if needs_config(task):
        if store is None and not task.model.startswith("/"):
            problem = "no model store: set [models] store"
        else:
            digest, problem = config_digest(store or Path("/nonexistent"), task.model, task.revision)
    judgement = markers.judge(root, task, record=record, config_digest=digest, wanted=wanted, run=run)
    return Item(task, record, digest, problem, judgement)


def result_of(item: Item, state: str, reason: str = "") -> TaskResult:
    result = TaskResult(item.task.label, item.task.model, item.key, state, reason, proven_by=_proven_by(item))
    if state == "cold":
        result.compiled_anew = item.judgement.anew
    return result


def _proven_by(item: Item) -> ProvenBy | None:
    """Return which build of sglang proved a task; None where nothing of its marker holds."""
    proof = item.judgement.proof
    if proof is None:
        return None
    return ProvenBy(
        build="same" if proof.same else "other",
        kernel_sources=proof.kernel_sources,
        age=proof.age,
        sentence=proof.sentence,
        warning=proof.warning,
        rank=min(map(reasons.rank, proof.changed.families), default=0) if proof.changed else 0,
    )


def before(item: Item) -> TaskResult:
    """Return a task's result before anything is done for it, from its marker."""
    marker = item.judgement.marker
    if not item.warm or marker is None:
        return result_of(item, "cold", item.judgement.reason)
    return replace(
        result_of(item, "warm"),
        entries={family: len(claim.entries) for family, claim in marker.claims.items()},
        proof=marker.proof,
        verified=marker.proof == marker_format.VERIFIED,
        since=marker.written[:10],
        loaded=printable(marker.observed.loaded or "")[:60],
        reservation=markers.reservation(marker),
    )
