"""Where tasks run: in containers of an engine, or in the environment that this process is in (`--here`).

`warm`, and the verbs that compare tasks with the cache (check, explain, env), are written once, over this interface.
`container_executor.ContainerExecutor` and `local_executor.LocalExecutor` implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from builder.cache.environment import Described
    from builder.cache.toolchain import Record
    from builder.events import Event, Verdict
    from builder.host.cancel import Cancel
    from builder.job import PrebuildRequest
    from builder.report.progress import TaskProgress
    from builder.run.context import Context
    from builder.run.plan import Item, Plan, ProbeEnv
    from builder.run.schedule import Capacity
    from builder.task import Task

#: Seconds for a probe, which reads metadata and asks two libraries in less than one: the rest is for a slow disk.
PROBE_TIMEOUT = 120.0

#: Why a task's program was ended; ``exited``: it ended by itself. start: no output in time;
#: lost: the engine stopped answering.
Ended = Literal["exited", "start", "timeout", "silence", "budget", "cancelled", "lost"]


@dataclass(frozen=True)
class Allocation:
    """Where and how one task runs."""

    title: str
    visible_gpus: tuple[int, ...] | None  # indices shown to the task; None: all of the manifest's
    reserved_gpus: tuple[int, ...] | None  # locked for this task alone; None: all of the manifest's
    concurrent: bool  # other tasks may run at the same time
    progress: TaskProgress  # for the live lines
    cancel: Cancel  # ends it


@dataclass(frozen=True)
class Watcher:
    """Receives what a task's program writes, while it runs. Called from other threads; must not wait."""

    on_line: Callable[[str, str], None]  # stream (``out``, ``err``), line
    on_event: Callable[[Event], None]


@dataclass(frozen=True)
class Execution:
    """How the program of one task ended, in a container or here. `outcome` makes a result of it."""

    ended: Ended
    verdict: Verdict | None  # None: the program ended before it had one
    succeeded: bool  # exit status 0
    how: str  # for people: ``the container ended with status 1``
    oom: bool  # the kernel killed something for memory
    seconds: float
    log: Path | None
    tail: Sequence[str]  # the last lines of the log


class Reservation(Protocol):
    """The GPUs of a run, held against other builders."""

    def free_after(self, label: str, devices: tuple[int, ...] | None = None) -> AbstractContextManager[None]:
        """Wait, after this context, until the GPUs (None: all of the run's) are as free as before it.

        Raises GpusHeldError when they are not within ``[gpus] release_timeout``.
        """


class Executor(Protocol):
    """One cache root, and a way to run the agent on it. Nothing is looked up before it is needed."""

    @property
    def context(self) -> Context:
        """The invocation."""

    # --- reading the cache -------------------------------------------------------------------------------------------

    @property
    def root_name(self) -> str:
        """The cache root for people: the directory, or ``volume NAME``."""

    def direct_root(self) -> Path | None:
        """Return the root's directory where this process can read all of it, else None."""

    def missing_root(self) -> str:
        """Return why there is no cache root to read, or "". Makes none. Raises PreflightError for a stranger's."""

    def records(self, tasks: Sequence[Task]) -> Mapping[ProbeEnv, Record]:
        """Return the toolchain record for each environment that these tasks have."""

    def unknown(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return the tasks that cannot be judged, because a container would have to look and none may be started."""

    def plan(self, tasks: Sequence[Task]) -> Plan:
        """Judge these tasks against the cache as it is now. The report gets the toolchain and the cache's name."""

    def snapshot(self, tasks: Sequence[Task]) -> AbstractContextManager[tuple[Path, Plan]]:
        """Yield `plan` with the directory it was made from, the root or a copy of its index, until the context ends."""

    def described(self) -> Sequence[Described]:
        """Return the family directories of the root, with the factors they were made for."""

    # --- around a run ------------------------------------------------------------------------------------------------

    def sweep(self) -> object:
        """Remove containers of killed builders, and run releases that they left pending."""

    def sweep_pending(self) -> None:
        """Sweep if a killed builder left a release pending; otherwise ask nothing."""

    def prepare(self) -> None:
        """Raise PreflightError with every problem of this machine that keeps tasks from running."""

    def run_lock(self) -> AbstractContextManager[None]:
        """Hold the root's run lock. Raises BusyError when another builder keeps it for ``[run] lock_timeout``."""

    @property
    def shares_machine(self) -> bool:
        """Whether tasks run on this machine, so that its processors and memory are theirs."""

    def gpus_in_use(self) -> str:
        """Return what else uses the GPUs of the manifest, or that it cannot be known; "" where they are idle."""

    def run_prebuild(
        self,
        mode: Literal["plan", "prebuild"],
        env: Mapping[str, str],
        request: PrebuildRequest,
        seconds: float,
        on_event: Callable[[Event], None],
    ) -> str:
        """Run the agent in a mode of the prebuild, without GPUs, and ``plan`` without the cache root.

        Returns why it did not end well, or "". env: of the tasks. seconds: that it may take.
        """

    def reserve_gpus(self, items: Sequence[Item]) -> AbstractContextManager[Reservation]:
        """Hold this machine and its GPUs for these items. Raises PreflightError and BusyError."""

    # --- tasks -------------------------------------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        """Return the GPUs, and the slots for tasks without GPUs, that tasks may use at the same time."""

    def heading(self) -> str:
        """Return where tasks run, for the first line of a run."""

    def start(self) -> None:
        """Resolve what several tasks share, in the main thread and before the first `execute`."""

    def execute(self, item: Item, allocation: Allocation, watcher: Watcher) -> Execution:
        """Run one task's program to its end, whatever that is. Raises what kept it from starting."""
