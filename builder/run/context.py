"""What every step of one invocation works with, fixed before the first step: values, and where results go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cache.build_proofs import ANY_PROOF, ProofWanted

if TYPE_CHECKING:
    from builder.host.cancel import Cancel
    from builder.host.deadlines import Deadline
    from builder.host.locks import LockWait
    from builder.manifest.load import Manifest
    from builder.report.console import Console
    from builder.report.results import Report


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line and the environment add to the manifest."""

    log_dir: Path  # absolute; made when the first log is written
    state_dir: Path  # absolute; leases, and releases that are still to be run
    environ: Mapping[str, str]
    pull: bool = False  # pull the image first
    force: bool = False  # run warm tasks too
    wanted: ProofWanted = ANY_PROOF  # which proof makes a task warm
    allow_busy: bool = False  # start even if other processes use a GPU
    prebuild_only: bool = False  # end before the first task, and use no GPU
    creates: bool = False  # the verb writes a cache root
    create: bool = False  # it may make one that does not exist


@dataclass(frozen=True, kw_only=True)
class Context:
    """One invocation. Only what `console` and `report` hold changes, and they may be used from any thread."""

    manifest: Manifest
    options: Options
    console: Console
    report: Report
    cancel: Cancel
    budget: Deadline  # began when the invocation did
    run_id: str  # in names of containers, and in the markers that this run writes

    def lock_wait(self) -> LockWait:
        """Return how long this run waits for other builders, from now on."""
        from builder.host.locks import LockWait

        return LockWait(self.manifest.run.lock_timeout, say=self.console.say, cancel=self.cancel)

    def log_path(self, label: str) -> Path:
        """Return the path of a task's log, in a directory that exists. Raises UsageError where it cannot be made."""
        from builder.errors import UsageError

        directory = self.options.log_dir
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"logs cannot be written to {directory}: {error.strerror}; set --log-dir") from error
        return directory / f"{label}.log"
