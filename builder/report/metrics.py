"""Metrics of a refresh, in the text format of Prometheus' textfile collector.

The file is replaced by one rename. Values that this run did not measure (time of the last success, contents of a volume
that was not read) are copied from the file before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builder.files import UnreadableError, read_bytes, replace_file

PREFIX = "warm_cache_"
#: name → help, in the order of the file. All are gauges.
GAUGES: Mapping[str, str] = {
    "refresh_last_run_timestamp_seconds": "When the last refresh ended, with any status.",
    "refresh_last_success_timestamp_seconds": "When a refresh last ended with status 0.",
    "refresh_duration_seconds": "How long the last refresh took.",
    "refresh_exit_code": "Exit status of the last refresh: 0 is warm, 17 is deferred.",
    "refresh_tasks": "Tasks of the manifest by state.",
    "refresh_pruned_bytes": "Bytes that the last refresh removed from the cache.",
    "refresh_prune_blocked_seconds": "For how long jobs have kept removals waiting: holds, and files that they touch.",
    "pull_last_run_timestamp_seconds": "When the last pull ended, with any status.",
    "pull_last_success_timestamp_seconds": "When a pull last restored a cache image, or found it there.",
    "pull_duration_seconds": "How long the last pull took.",
    "pull_exit_code": "Exit status of the last pull, as it is without --fail-open.",
    "image_info": "The serving image of the last refresh; always 1.",
    "entries": "Compile results by family and toolchain; what toolchains share is counted for each of them.",
    "entries_size_bytes": "Bytes allotted to a family's directory; what toolchains share is counted for each of them.",
    "size_bytes": "Bytes allotted to the whole cache, each file once.",
    "filesystem_free_bytes": "Free space of the file system of the cache.",
}
STATES = ("warm", "warmed", "cold", "failed", "partial", "skipped")
SUCCESS, PULL_SUCCESS = "refresh_last_success_timestamp_seconds", "pull_last_success_timestamp_seconds"
#: Gauges of the contents of the cache, as opposed to what a run did.
CONTENTS = ("entries", "entries_size_bytes", "size_bytes", "filesystem_free_bytes")

_LIMIT = 4 << 20


@dataclass
class Samples:
    """name → samples, each with its labels. common: labels that all of them have."""

    common: Mapping[str, str]
    found: dict[str, list[tuple[Mapping[str, str], float]]] = field(default_factory=dict)
    #: Lines of the file before, by name.
    kept: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, value: float, **labels: str) -> None:
        self.found.setdefault(name, []).append((labels, value))

    def keep(self, before: str, names: Iterable[str]) -> None:
        """Keep the samples of the file before with the same common labels, for names that this run does not add."""
        for name in names:
            head = f"{PREFIX}{name}{{{self._pairs(self.common)}"
            self.kept[name] = [line for line in before.splitlines() if line.startswith((f"{head},", f"{head}}}"))]

    def text(self) -> str:
        lines = []
        for name, help_text in GAUGES.items():
            samples = self.found.get(name)
            body = [self._line(name, labels, value) for labels, value in samples or ()]
            body = body or self.kept.get(name, [])
            if body:
                lines += [f"# HELP {PREFIX}{name} {help_text}", f"# TYPE {PREFIX}{name} gauge", *body]
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
    """Return the text of the file as the last refresh wrote it; "" if it cannot be read."""
    try:
        return read_bytes(str(path), _LIMIT).decode("utf-8", "replace")
    except UnreadableError:
        return ""


def write(path: Path, samples: Samples) -> None:
    """Write the file. Raises OSError, also for a missing directory: a misspelt path must not create one."""
    replace_file(path, samples.text().encode())
