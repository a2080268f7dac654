"""Metrics in the text format of Prometheus' textfile collector: one table of all, and the file that verbs write.

Several verbs may write to one file: each replaces its own metrics and leaves those of others. The file is replaced by
one rename. Values that a run did not measure (time of the last success, contents of a volume that was not read) are
copied from the file before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from builder.files import UnreadableError, read_bytes, replace_file

PREFIX = "warm_cache_"
Verb = Literal["refresh", "check", "pull", "report"]


@dataclass(frozen=True)
class Metric:
    """One row of the table. by: the verbs that write it. kept: stays as it was where a run does not measure it."""

    name: str
    help: str
    by: tuple[Verb, ...]
    type: Literal["gauge", "counter"] = "gauge"
    kept: bool = False
    labels: tuple[str, ...] = ()  # besides the common ones


_REFRESH: tuple[Verb, ...] = ("refresh",)
_CHECK: tuple[Verb, ...] = ("check",)
_PULL: tuple[Verb, ...] = ("pull",)
_REPORT: tuple[Verb, ...] = ("report",)
SUCCESS, BEHIND = "refresh_last_success_timestamp_seconds", "image_behind_since_timestamp_seconds"
PULL_SUCCESS, PULL_BEHIND = "pull_last_success_timestamp_seconds", "pull_behind_since_timestamp_seconds"
REFUSALS = "pull_signature_refusals_total"
#: All metrics, in the order of the file.
TABLE: tuple[Metric, ...] = (
    Metric(
        "build_info", "Version of the program; always 1.", ("refresh", "check", "pull", "report"), labels=("version",)
    ),
    Metric("refresh_last_run_timestamp_seconds", "When the last refresh ended, with any status.", _REFRESH),
    Metric(SUCCESS, "When a refresh last ended with status 0.", _REFRESH, kept=True),
    Metric("refresh_duration_seconds", "How long the last refresh took.", _REFRESH),
    Metric("refresh_exit_code", "Exit status of the last refresh: 0 is warm, 17 is deferred.", _REFRESH),
    Metric("refresh_tasks", "Tasks of the manifest by state.", _REFRESH, labels=("state",)),
    Metric("refresh_task_state", "State of each task; always 1.", _REFRESH, labels=("task", "state")),
    Metric("refresh_task_seconds", "How long each task ran that was cold.", _REFRESH, labels=("task",)),
    Metric("refresh_gpu_seconds", "GPU-seconds of the tasks of the last refresh: seconds times GPUs.", _REFRESH),
    Metric("refresh_lock_wait_seconds", "How long the last refresh waited for locks of other builders.", _REFRESH),
    Metric("refresh_idle_wait_seconds", "How long the last refresh waited for idle GPUs.", _REFRESH),
    Metric(
        "refresh_prebuild_missed_kernels",
        "Kernels that tasks compiled on GPUs although a prebuild ran before them.",
        _REFRESH,
        kept=True,
    ),
    Metric("refresh_pruned_bytes", "Bytes that the last refresh removed from the cache.", _REFRESH),
    Metric(
        "refresh_prune_blocked_seconds",
        "For how long jobs have kept removals waiting: holds, and files that they touch.",
        _REFRESH,
    ),
    Metric(
        "image_info",
        "The serving image of the last refresh; always 1.",
        _REFRESH,
        labels=("ref", "id", "toolchain"),
    ),
    Metric(BEHIND, "Since when the registry has had another serving image; 0: it has this one.", _REFRESH, kept=True),
    Metric(
        "entries",
        "Compile results by family and toolchain; what toolchains share is counted for each of them.",
        _REFRESH,
        kept=True,
        labels=("family", "key", "toolchain"),
    ),
    Metric(
        "entries_size_bytes",
        "Bytes allotted to a family's directory; what toolchains share is counted for each of them.",
        _REFRESH,
        kept=True,
        labels=("family", "key", "toolchain"),
    ),
    Metric("size_bytes", "Bytes allotted to the whole cache, each file once.", _REFRESH, kept=True),
    Metric("limit_bytes", "Most bytes that prune leaves ([cache] max_size); absent without a limit.", _REFRESH),
    Metric("quarantined_entries", "Bad entries and leftovers that wait in quarantine.", _REFRESH, kept=True),
    Metric("filesystem_free_bytes", "Free space of the file system of the cache.", _REFRESH, kept=True),
    Metric("filesystem_size_bytes", "Size of the file system of the cache.", _REFRESH, kept=True),
    Metric("check_last_run_timestamp_seconds", "When the last check ended, with any status.", _CHECK),
    Metric("check_exit_code", "Exit status of the last check: 0 is warm, 10 is cold.", _CHECK),
    Metric("check_tasks", "Tasks of the manifest by state.", _CHECK, labels=("state",)),
    Metric("check_tasks_by_build", "Warm tasks by the build that proved them.", _CHECK, labels=("build",)),
    Metric("check_proof_age_seconds", "Age of the proof of each warm task.", _CHECK, labels=("task",)),
    Metric("pull_last_run_timestamp_seconds", "When the last pull ended, with any status.", _PULL),
    Metric(PULL_SUCCESS, "When a pull last restored all that fits, or found it there.", _PULL, kept=True),
    Metric("pull_exit_code", "Exit status of the last pull, as it is without --fail-open.", _PULL),
    Metric("pull_duration_seconds", "How long the last pull took.", _PULL),
    Metric("pull_fetched_bytes", "Bytes that the last pull fetched.", _PULL),
    Metric("pull_restored_families", "Families that the last pull restored.", _PULL),
    Metric(
        "pull_unfit_families",
        "Families of the image that do not fit here, by the first factor that differs.",
        _PULL,
        labels=("factor",),
    ),
    Metric(
        "pull_image_info", "The cache image of the last pull; always 1.", _PULL, labels=("reference", "digest", "tag")
    ),
    Metric(
        PULL_BEHIND, "Since when the registry has had a cache image that was not restored; 0: none.", _PULL, kept=True
    ),
    Metric(REFUSALS, "Images refused for their signature, its stream or its time.", _PULL, "counter", kept=True),
    Metric("jobs_last_read_timestamp_seconds", "When audits of jobs were last added up.", _REPORT),
    Metric("jobs_audits", "Audits of jobs that were added up.", _REPORT),
    Metric(
        "jobs_compiled_kernels",
        "Kernels that jobs compiled in spite of the cache, in all audits that were read.",
        _REPORT,
        labels=("family", "build"),
    ),
    Metric(
        "jobs_compiled_seconds",
        "About how long jobs compiled in spite of the cache, in all audits that were read.",
        _REPORT,
        labels=("family", "build"),
    ),
)
STATES = ("warm", "warmed", "cold", "failed", "partial", "skipped")
#: Metrics of the contents of the cache, as opposed to what a run did.
CONTENTS = (
    *("entries", "entries_size_bytes", "size_bytes"),
    *("quarantined_entries", "filesystem_free_bytes", "filesystem_size_bytes"),
)

_LIMIT = 4 << 20
_NAME = re.compile(rf"{PREFIX}(\w+)\{{")


@dataclass
class Samples:
    """name → samples of one verb, each with its labels. common: labels that all of them have."""

    verb: Verb
    common: Mapping[str, str]
    found: dict[str, list[tuple[Mapping[str, str], float]]] = field(default_factory=dict)
    #: Lines of the file before, by name.
    kept: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, value: float, **labels: str) -> None:
        self.found.setdefault(name, []).append((labels, value))

    def keep(self, before: str) -> None:
        """Keep what others wrote to the file before, and this verb's samples of the same series where they stay."""
        mine = {metric.name: metric.kept for metric in TABLE if self.verb in metric.by}
        names = {metric.name for metric in TABLE}
        pairs = self._pairs(self.common)
        for line in before.splitlines():
            match = _NAME.match(line)
            if match is None or match[1] not in names:
                continue
            series = line.startswith((f"{match[0]}{pairs},", f"{match[0]}{pairs}}}"))
            if match[1] not in mine or (series and mine[match[1]]):
                self.kept.setdefault(match[1], []).append(line)

    def before(self, name: str) -> float:
        """Return the kept value of a metric without labels of its own; 0 where there is none."""
        try:
            return float(self.kept[name][0].rpartition(" ")[2])
        except (KeyError, ValueError):
            return 0.0

    def text(self) -> str:
        lines = []
        for metric in TABLE:
            name = metric.name
            body = [self._line(name, labels, value) for labels, value in self.found.get(name, ())]
            body = body or self.kept.get(name, [])
            if body:
                lines += [f"# HELP {PREFIX}{name} {metric.help}", f"# TYPE {PREFIX}{name} {metric.type}", *body]
        return "\n".join(lines) + "\n"

    def _line(self, name: str, labels: Mapping[str, str], value: float) -> str:
        return f"{PREFIX}{name}{{{self._pairs({**self.common, **labels})}}} {shown(value)}"

    @staticmethod
    def _pairs(labels: Mapping[str, str]) -> str:
        return ",".join(f'{label}="{escaped(text)}"' for label, text in labels.items())


def escaped(text: str) -> str:
    """Escape a label's value; surrogates are replaced."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def shown(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.3f}"


def before(path: Path) -> str:
    """Return the text of the file as it was written last; "" if it cannot be read."""
    try:
        return read_bytes(str(path), _LIMIT).decode("utf-8", "replace")
    except UnreadableError:
        return ""


def write(path: Path, samples: Samples) -> None:
    """Write the file. Raises OSError, also for a missing directory: a misspelt path must not create one."""
    replace_file(path, samples.text().encode())


def names(metrics: Iterable[Metric] = TABLE) -> frozenset[str]:
    """Return the full names, as they are in the file."""
    return frozenset(f"{PREFIX}{metric.name}" for metric in metrics)
