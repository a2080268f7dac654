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

#: Seconds that the file system of the logs has to make their directory.
_PLACE_ANSWERS = 5.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line and the environment add to the manifest."""

    log_dir: Path  # absolute; made when the first log is written
    log_dir_fallback: Path | None = None  # used where log_dir is the default one and cannot be made
    state_dir: Path  # absolute; leases, and releases that are still to be run
    environ: Mapping[str, str]
    pull: bool = False  # pull the image first
    force: bool = False  # run warm tasks too
    wanted: ProofWanted = ANY_PROOF  # which proof makes a task warm
    allow_busy: bool = False  # start even if other processes use a GPU
    prebuild_only: bool = False  # end before the first task, and use no GPU
    probes: bool = True  # an image may be built and started to find out its toolchain
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

        return LockWait(
            self.manifest.run.lock_timeout,
            say=self.console.say,
            cancel=self.cancel,
            waited=self.report.add_lock_wait,
        )

    def log_path(self, label: str) -> Path:
        """Return the path of a task's log. Raises UsageError where its directory cannot be made."""
        return self.log_directory() / f"{label}.log"

    def log_directory(self) -> Path:
        """Make and return the directory for logs. Raises UsageError where it cannot be made.

        A place that does not answer is given up after a moment. The default place has a second one, in the temporary
        directory, for a HOME that cannot be written.
        """
        from builder.engine.lease import private_directory
        from builder.errors import PreflightError, UsageError
        from builder.host import outside

        first, second = self.options.log_dir, self.options.log_dir_fallback
        try:
            outside.call(
                lambda: first.mkdir(mode=0o700, parents=True, exist_ok=True),
                str(first),
                _PLACE_ANSWERS,
                give_up=lambda: self.cancel.is_set,
            )
        except outside.StuckError:
            return first  # each log says the same, as a warning
        except OSError as error:
            why = f"logs cannot be written to {first}: {error.strerror}; set --log-dir"
        else:
            return first
        if second is None:
            raise UsageError(why)
        try:
            private_directory(second.parents[2])  # no other user's, although anyone may write there
            second.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (PreflightError, OSError):
            raise UsageError(why) from None
        return second
