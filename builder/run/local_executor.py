"""Runs tasks in the environment of this process (`--here`): a test job inside its own container.

No engine, and nothing but the standard library: a job needs only a copy of this package's folder, and starts it with
the same Python as its tests. The cache root is where the job has it mounted. Tasks are compared as the job would find
them with the variables that ``env --here`` prints; every other switch that the job has set counts as its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from builder import files, processes
from builder.cache import environment, layout, model_store, toolchain
from builder.cache.environment import IMAGE_VARIABLE, Described, ImageIdentity, Standing
from builder.cache.markers import Judgement
from builder.cache.toolchain import Record
from builder.errors import CANNOT_RUN, PreflightError, Problem
from builder.host.locks import open_lock
from builder.report.results import Section
from builder.run import local_job
from builder.run.context import Context
from builder.run.executor import Allocation, Execution, Reservation, Watcher
from builder.run.plan import Item, Plan, ProbeEnv, make_plan, probe_env
from builder.run.schedule import Capacity
from builder.task import PRETEND_VARIABLE, Gpu, Task
from builder.text import counted

if TYPE_CHECKING:
    from builder.events import Event
    from builder.job import PrebuildRequest

#: Where the cache is mounted, if neither a manifest nor --cache names the place.
MOUNT = Path("/jit")


@dataclass
class ImageKnown(Section):
    """How the image of this environment is known."""

    image_known: str


class LocalExecutor:
    """Nothing is probed before it is needed. named_image: the image's id, where one was named."""

    def __init__(self, context: Context, root: Path, named_image: str | None = None) -> None:
        self.context, self.root = context, root
        self.environ = context.options.environ
        self._names = named_image, self.environ.get(IMAGE_VARIABLE)
        self._image: ImageIdentity | None = None
        self._records: dict[ProbeEnv, Record] = {}
        #: The GPU to simulate, where kernels are prebuilt on a machine without any.
        self.simulate: Gpu | None = None
        report = context.report
        report.image_ref, report.cache = "this environment", str(root)
        if (other := self._other_python()) is not None:
            report.warnings.append(
                f"python3 on PATH is {other}, and this runs with {sys.executable}: results hold for the latter"
            )

    # --- this environment --------------------------------------------------------------------------------------------

    @property
    def image(self) -> ImageIdentity:
        """The image that this environment was made of, as far as that can be known."""
        self.records(())
        assert self._image is not None
        return self._image

    @property
    def record(self) -> Record:
        """The toolchain record of the first task's environment."""
        tasks = self.context.manifest.tasks
        return self.records(tasks)[probe_env(tasks[0]) if tasks else ()]

    def families(self) -> list[Standing]:
        """Return how each family compares with the directories of the root."""
        return environment.compare(self.described(), self.record)

    def unknown(self, tasks: Sequence[Task]) -> Sequence[Task]:
        return ()  # no engine is asked for anything here

    def records(self, tasks: Sequence[Task]) -> Mapping[ProbeEnv, Record]:
        """Return records of this environment, probed once for each environment that tasks have."""
        wanted = {probe_env(task) for task in (tasks or self.context.manifest.tasks)} or {()}
        for env in sorted(wanted - self._records.keys()):
            own = {name: value for name, value in env if name != PRETEND_VARIABLE}  # only the GPUs here count
            record = local_job.probe(self.environ, self.root, own, self.simulate)
            if self._image is None:
                named = environment.named_image(self.root, record, *self._names)
                self._image = named or environment.recognised(self.root, record)
            self._records[env] = toolchain.of_task(environment.of_image(record, self._image), own)
        report = self.context.report
        assert self._image is not None
        report.image_id = self._image.id
        report.add(ImageKnown(self._image.how))
        report.toolchain = toolchain.digest(toolchain.family_keys(next(iter(self._records.values()))))
        return self._records

    def forget_records(self) -> None:
        """Probe again at the next use: on the GPU that is simulated from now on."""
        self._records.clear()

    def _other_python(self) -> str | None:
        """Return the python3 that tests would start, if it is of another environment than this one."""
        found = shutil.which("python3", path=self.environ.get("PATH"))
        if found is None or os.path.realpath(Path(found).parent) == os.path.realpath(Path(sys.executable).parent):
            return None
        return found

    # --- reading the cache -------------------------------------------------------------------------------------------

    @property
    def root_name(self) -> str:
        return str(self.root)

    def direct_root(self) -> Path | None:
        return self.root

    def missing_root(self) -> str:
        root = self.root
        if not root.is_dir():
            return f"{root} is no directory" if os.path.lexists(root) else f"there is no directory {root} here"
        if stranger := layout.foreign(root):
            return f"{root} is no cache root ({stranger} is in it)"
        if files.listing(str(root)) is None:
            return f"{root} cannot be read"
        return "" if (root / "layout.json").is_file() else f"{root} is empty"

    def plan(self, tasks: Sequence[Task]) -> Plan:
        plan = make_plan(
            tasks,
            self.records(tasks),
            root=self.root,
            store=model_store.home(self.environ),
            wanted=replace(self.context.options.wanted, inside=True),
            run=self.context.run_id,
        )
        return Plan(tuple(self._in_this_environment(item) for item in plan.items))

    def _in_this_environment(self, item: Item) -> Item:
        """Return the item as this environment can run it."""
        here, problem = len(self.record["gpus"]), item.config_problem
        if problem is None and item.task.gpus > here and not self.context.options.prebuild_only:
            problem = f"it needs {counted(item.task.gpus, 'GPU')}, and {here or 'none'} can be seen here"
        return replace(item, config_problem=problem, judgement=self._usable(item.judgement))

    def _usable(self, judgement: Judgement) -> Judgement:
        """Return a judgement that is cold where a job here compiles a claimed family in a private directory."""
        if judgement.state == "cold" or judgement.marker is None:
            return judgement
        claims = judgement.marker.claims
        whys = [(name, why) for name, claim in claims.items() if (why := layout.closed(self.root / name / claim.key))]
        if not whys:
            return judgement
        detail = "; ".join(f"{name} is compiled anew, because {why}" for name, why in whys)
        return replace(judgement, state="cold", kind="unwritable", detail=detail)

    @contextlib.contextmanager
    def snapshot(self, tasks: Sequence[Task]) -> Iterator[tuple[Path, Plan]]:
        yield self.root, self.plan(tasks)

    def described(self) -> Sequence[Described]:
        return list(environment.described(self.root))

    # --- around a run ------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """There are no containers."""

    def sweep_pending(self) -> None:
        """This machine is not taken out of service."""

    def prepare(self) -> None:
        """Lay out the root. Raises PreflightError where this process could not write markers there.

        Containers of test jobs get the markers read-only: their jobs may add kernels, and no markers.
        """
        if os.path.lexists(self.root) and not self.root.is_dir():
            problem = Problem("cache", f"{self.root} is a file, or a link to nothing.", "Name a directory.")
            raise PreflightError(CANNOT_RUN, [problem])
        if not self.root.is_dir() and not self.context.options.create:
            problem = Problem("cache", f"there is no directory {self.root} here.", "To make one, pass --create.")
            raise PreflightError(CANNOT_RUN, [problem])
        try:
            layout.prepare(self.root)
        except layout.LayoutError as error:
            raise PreflightError(f"{CANNOT_RUN}: {error}") from None
        needed = ("deep_gemm",) if self.context.options.prebuild_only else ("markers", "images")
        closed = [name for name in needed if (self.root / name).exists() and not os.access(self.root / name, os.W_OK)]
        if closed:
            raise PreflightError(
                f"{CANNOT_RUN}: {' and '.join(closed)} in {self.root} cannot be written here. A container "
                "that may vouch for kernels gets the whole root writable, not what warm-cache env prints"
            )

    @contextlib.contextmanager
    def run_lock(self) -> Iterator[None]:
        descriptor = open_lock(layout.run_lock(self.root), root=self.root)
        try:
            self.context.lock_wait().acquire(
                descriptor, holder_action=f"works on {self.root}", busy=f"{self.root} is in use"
            )
            yield
        finally:
            os.close(descriptor)

    @property
    def shares_machine(self) -> bool:
        return True

    def gpus_in_use(self) -> str:
        """The GPUs of a container are its job's; other jobs on this machine cannot be seen from here."""
        return ""

    def run_prebuild(
        self,
        mode: Literal["plan", "prebuild"],
        env: Mapping[str, str],
        request: PrebuildRequest,
        seconds: float,
        on_event: Callable[[Event], None],
    ) -> str:
        image = local_job.serving_image(self.image)
        return local_job.run_prebuild(self.context, self.root, image, mode, env, request, seconds, on_event)

    @contextlib.contextmanager
    def reserve_gpus(self, items: Sequence[Item]) -> Iterator[Reservation]:
        """Reserve nothing: the GPUs of a container are its job's."""
        yield _NoReservation()

    # --- tasks -------------------------------------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        """Return the GPUs that are here: other GPUs of this machine belong to other jobs."""
        manifest = self.context.manifest
        here = min(manifest.gpus.count, len(self.record["gpus"]))
        return Capacity(tuple(range(here)), manifest.run.parallel)

    def heading(self) -> str:
        return "in this environment"

    def start(self) -> None:
        processes.become_subreaper()

    def execute(self, item: Item, allocation: Allocation, watcher: Watcher) -> Execution:
        image = local_job.serving_image(self.image)
        return local_job.run_task(self.context, self.root, image, item, allocation, watcher)


class _NoReservation:
    """GPUs of which the end of a task is all that is waited for."""

    def free_after(self, label: str, devices: tuple[int, ...] | None = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
