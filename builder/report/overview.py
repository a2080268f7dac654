"""What a cache root, its runs and test jobs come to: the data of `warm-cache report`, and its lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone

from builder.report.results import Section
from builder.text import counted, duration, size

#: Runs that are shown, the newest ones.
MOST_RUNS = 10


@dataclass(frozen=True)
class ProvenTask:
    """A task with a toolchain that it has a marker for. written: seconds since the epoch."""

    task: str
    toolchain: str
    proof: str
    written: float


@dataclass(frozen=True)
class PastTask:
    """A task of a run, or a prebuild: see `cache.history.HistoryLine`."""

    run: str
    stage: str
    label: str
    state: str
    reason: str
    began: float
    seconds: float
    host: str
    gpus: Sequence[int]
    added: Mapping[str, int]
    added_bytes: Mapping[str, int]

    @property
    def kernels(self) -> int:
        """Number of entries that it added."""
        return sum(self.added.values())


@dataclass(frozen=True)
class FamilySize:
    """Entries and bytes of one family, of all its keys."""

    family: str
    entries: int
    bytes: int


@dataclass(frozen=True)
class JobJit:
    """What a test job compiled of one family in spite of the cache. build: of sglang, "" where it is unknown."""

    job: str
    build: str
    family: str
    kernels: int
    seconds: float


@dataclass
class Overview(Section):
    """The document of ``report``. runs: the oldest task first. problems: what could not be read."""

    root: str = ""
    proven: list[ProvenTask] = field(default_factory=list)
    runs: list[PastTask] = field(default_factory=list)
    families: list[FamilySize] = field(default_factory=list)
    jobs: list[JobJit] = field(default_factory=list)
    audits: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> Mapping[str, object]:
        return {"report": asdict(self)}

    def latest(self) -> list[tuple[str, list[PastTask]]]:
        """Return the newest runs with their tasks, the newest run first."""
        by_run: dict[str, list[PastTask]] = {}
        for task in self.runs:
            by_run.setdefault(task.run, []).append(task)
        return sorted(by_run.items(), key=lambda item: item[1][-1].began, reverse=True)[:MOST_RUNS]


def by_family(jobs: Iterable[JobJit]) -> dict[tuple[str, str], tuple[int, float]]:
    """Return kernels and seconds that jobs compiled, by family and build."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for job in jobs:
        kernels, seconds = found.get((job.family, job.build), (0, 0.0))
        found[job.family, job.build] = kernels + job.kernels, seconds + job.seconds
    return found


def moment(seconds: float) -> str:
    """Return a time in UTC to the minute; ``unknown`` for a number that is none."""
    try:
        return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OSError, OverflowError, ValueError):
        return "unknown"


def run_rows(overview: Overview) -> list[list[str]]:
    """Return one row for each of the newest runs: when, tasks by state, kernels by stage, bytes, time."""
    rows = []
    for name, tasks in overview.latest():
        states: dict[str, int] = {}
        for task in tasks:
            if task.stage == "task":
                states[task.state] = states.get(task.state, 0) + 1
        began, ended = min(each.began for each in tasks), max(each.began + each.seconds for each in tasks)
        rows.append(
            [
                moment(began),
                name,
                ", ".join(f"{number} {state}" for state, number in states.items()) or "–",
                str(sum(each.kernels for each in tasks if each.stage == "prebuild")),
                str(sum(each.kernels for each in tasks if each.stage == "task")),
                size(sum(sum(each.added_bytes.values()) for each in tasks)),
                duration(ended - began),
            ]
        )
    return rows


RUN_COLUMNS = ("began (UTC)", "run", "tasks", "prebuilt", "on GPUs", "added", "took")


def jit_line(overview: Overview) -> str:
    """Return one sentence on what jobs compiled."""
    if not overview.audits:
        return "no audit of a job was read"
    kernels = sum(job.kernels for job in overview.jobs)
    if not kernels:
        return f"{counted(overview.audits, 'audit')}: no job compiled anything"
    seconds = sum(job.seconds for job in overview.jobs)
    return f"{counted(overview.audits, 'audit')}: jobs compiled {counted(kernels, 'kernel')} in about {seconds:.0f} s"
