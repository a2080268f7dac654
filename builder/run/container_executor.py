"""Runs tasks in containers of one engine. Everything is looked up when it is first needed.

A warm check needs little: an image id, a memo and the markers. It starts nothing and touches no GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from builder.cache import environment, memos, toolchain
from builder.cache.environment import Described
from builder.cache.toolchain import Record
from builder.engine.api import Image
from builder.engine.client import Engine
from builder.engine.images import content, identity, names, warmup_image
from builder.engine.lease import Lease
from builder.errors import CANNOT_RUN, ColdError, EngineLostError, EngineRefusedError, PreflightError, Problem
from builder.host import gpus, temporary
from builder.host.cancel import ANSWER_WITHIN
from builder.host.gpus import GpuSnapshot, Nvml
from builder.run import cache_root, preflight
from builder.run.cache_root import CacheRoot
from builder.run.context import Context
from builder.run.executor import PROBE_TIMEOUT, Allocation, Execution, Reservation, Watcher
from builder.run.plan import Item, Plan, ProbeEnv, make_plan, probe_env
from builder.task import ServingImage, Task

if TYPE_CHECKING:
    from builder.engine.sweep import Swept
    from builder.events import Event
    from builder.job import PrebuildRequest
    from builder.run.schedule import Capacity


@dataclass(eq=False)
class ContainerExecutor:
    """Use as a context manager: every exit gives back what was taken."""

    context: Context
    engine: Engine
    #: Containers that ran for this invocation and were removed, id → name.
    ran: dict[str, str] = field(default_factory=dict)
    #: Whether a container of a dead builder was removed.
    swept: bool = False
    #: Whether the serving image was looked up: before that, nothing is known about the cache either.
    has_image: bool = False
    _prepared: bool = False
    _lease: Lease | None = None
    _records: dict[ProbeEnv, Record] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> ContainerExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        with self.context.cancel.shield():  # a second signal must not come between the steps
            self._stack.close()

    # --- images ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def image(self) -> Image | None:
        """The serving image, pulled first if the options ask for it; None when the engine does not have it."""
        ref, report = self.context.manifest.image.ref, self.context.report
        if self.context.options.pull:
            self.context.console.say(f"pulling {ref}")
            image: Image | None = self.engine.pull(ref, self.context.console.say)
        else:
            image = self.engine.image(ref)
        report.image_ref, report.image_id = ref, image.id if image else None
        self.has_image = True
        return image

    @property
    def serving(self) -> Image:
        """The serving image. Raises PreflightError without it, with all other problems of this machine."""
        if self.image is None:
            self.prepare()
            raise PreflightError(f"{self.context.manifest.image.ref} is not on this engine")
        return self.image

    @property
    def identity(self) -> str:
        """The id of the serving image with the manifest's setup commands, for families that belong to one image."""
        return identity(self.serving.id, self.context.manifest.image.setup)

    @property
    def serving_names(self) -> ServingImage:
        """Every name of the serving image with its setup commands, as jobs and memos have them."""
        serving, setup = self.serving, self.context.manifest.image.setup
        return ServingImage(self.identity, serving.labels, content(serving, setup), names(serving, setup))

    @functools.cached_property
    def warmup(self) -> Image:
        """The warm-up image, built on first use. Raises PreflightError where it cannot be built.

        Whatever is started is started from it. Raises ColdError where nothing may be: a memo can be removed meanwhile.
        """
        if not self.context.options.probes:
            raise ColdError("the cache does not know this image any more, and --no-probe builds and starts nothing")
        try:
            return warmup_image(self.engine, self.serving, self.context.manifest.image.setup, self.show_build)
        except EngineRefusedError as error:
            problem = Problem("image", f"{error.message}.", "See [image] setup, and ONBUILD of the serving image.")
            raise PreflightError(CANNOT_RUN, [problem], notes=error.notes) from error

    def show_build(self, line: str) -> None:
        """Show a line of an image's build, if the user wants them."""
        if self.context.console.verbose:
            self.context.console.say(line)

    # --- reading the cache -------------------------------------------------------------------------------------------

    @functools.cached_property
    def cache(self) -> CacheRoot:
        """The cache root, as this process and the engine can read it."""
        return CacheRoot(
            self.context.manifest,
            self.engine,
            image=self.serving.id,
            lease=lambda: self.lease,
            cancel=self.context.cancel,
            on_skip=self.context.report.warnings.append,
        )

    @property
    def root_name(self) -> str:
        return self.cache.name

    def direct_root(self) -> Path | None:
        return self.cache.direct()

    def missing_root(self) -> str:
        root = self.context.manifest.cache.root
        if root is not None and self.engine.local and root.exists() and not root.is_dir():
            self.prepare()
        return "" if self.cache.exists() else f"{self.cache.name} does not exist"

    def require_root(self) -> None:
        """Raise PreflightError where the root does not exist and may not be made: its name may be misspelt."""
        options, manifest = self.context.options, self.context.manifest
        if options.create or cache_root.exists(manifest, self.engine):
            return
        missing = preflight.missing_root(manifest, creates=options.creates)
        if not options.creates:
            raise PreflightError(missing.text.removesuffix("."))
        others = preflight.problems(manifest, self.engine)
        raise PreflightError(CANNOT_RUN, [*(each for each in others if each.location != missing.location), missing])

    def create_root(self) -> None:
        """Make the directory of the root where it is missing and may be made."""
        if self.context.options.create and self.cache.create():
            self.context.console.say(f"created {self.cache.name}")

    def require_shared_root(self) -> None:
        """Raise PreflightError where containers would write to another directory than the one that is read here."""
        if not self.cache.is_shared():
            raise PreflightError(CANNOT_RUN, [preflight.other_root(self.context.manifest)])

    def plan(self, tasks: Sequence[Task]) -> Plan:
        with self.snapshot(tasks) as (_, plan):
            return plan

    @contextlib.contextmanager
    def snapshot(self, tasks: Sequence[Task]) -> Iterator[tuple[Path, Plan]]:
        records = self.records(tasks)
        models = {task.model for task in tasks}
        # Directories of other toolchains need not be copied.
        keys = {pair for record in records.values() for pair in toolchain.family_keys(record).items()}
        with self.cache.view(keys=keys) as root, self.cache.store_view(models) as store:
            # A copy is not where jobs have it.
            wanted = replace(self.context.options.wanted, mounted=root == self.context.manifest.cache.root)
            run = self.context.run_id
            plan = make_plan(tasks, records, root=root, store=store, wanted=wanted, run=run)
            self.context.report.toolchain = plan.digest
            self.context.report.cache = self.cache.name
            yield root, plan

    def records(self, tasks: Sequence[Task]) -> Mapping[ProbeEnv, Record]:
        """Return records from the memo where it holds, else from a probe's container.

        Raises PreflightError where the GPUs of this machine are not those that the manifest wants.
        """
        host = gpus.host_gpus() if self.engine.local else None
        if problems := list(preflight.gpu_problems(self.context.manifest, host)):
            raise PreflightError(CANNOT_RUN, problems)
        for env in sorted({probe_env(task) for task in tasks} - self._records.keys()):
            record = self._remembered(env, host)
            # Podman does not report that it has no GPUs to give: only a container shows it.
            doubted = self.context.options.creates and bool(self.context.manifest.gpus.count) and self.engine.podman
            found = self.probe(env) if record is None or doubted else record
            self._records[env] = toolchain.of_task(found, dict(env))
        return self._records

    def unknown(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return the tasks for which a probe would be needed, where none is allowed."""
        if self.context.options.probes:
            return ()
        host = gpus.host_gpus() if self.engine.local else None
        missing = {env for env in {probe_env(task) for task in tasks} if self._remembered(env, host) is None}
        return [task for task in tasks if probe_env(task) in missing]

    def remembers(self, tasks: Sequence[Task]) -> bool:
        """Return whether `records` would start no container for these tasks."""
        host = gpus.host_gpus() if self.engine.local else None
        if any(preflight.gpu_problems(self.context.manifest, host)):
            return False
        return all(self._remembered(env, host) is not None for env in {probe_env(task) for task in tasks})

    def _remembered(self, env: ProbeEnv, host: gpus.HostGpus | None) -> Record | None:
        manifest = self.context.manifest
        with self.cache.view(entries=False) as root:
            record = memos.read_memo(
                root,
                self.serving_names,
                mount=manifest.cache.mount,
                gpus=host.model if host else None,
                driver=host.driver if host else None,
                isa=toolchain.isa() if self.engine.local else None,
                env=dict(env),
            )
        # A probe that was refused for its GPUs has left a memo: only another probe can show that they are right now.
        return None if record is None or any(preflight.gpu_problems(manifest, None, record)) else record

    def described(self) -> Sequence[Described]:
        """Return the family directories; where the root cannot be read from here, a container reads it."""
        root = self.cache.direct()
        if root is not None:
            return list(environment.described(root))
        if not self.context.options.probes:
            return ()
        from builder.events import FamilyDescribed
        from builder.run import maintenance

        found: list[Event] = []
        maintenance.run(self, "families", found.append)
        return [Described(**vars(maintenance.printed(event))) for event in found if isinstance(event, FamilyDescribed)]

    # --- around a run ------------------------------------------------------------------------------------------------

    @property
    def lease(self) -> Lease:
        """The lease of every container of this run; taken with the first one."""
        if self._lease is None:
            options = self.context.options
            lease = Lease(options.state_dir, run_id=self.context.run_id, engine=self.engine.identity)
            self._lease = self._stack.enter_context(lease)
        return self._lease

    def prepare(self) -> None:
        if self._prepared:
            return
        with preflight.engine_wanted(self.context.manifest, self.engine.url):
            self.engine.connect()
        problems = list(preflight.problems(self.context.manifest, self.engine))
        if problems:
            raise PreflightError(CANNOT_RUN, [*problems, *self.busy()])
        self._prepared = True

    def busy(self) -> list[Problem]:
        """Return a problem for each process on GPUs that the manifest needs and that no acquire command would end."""
        wanted = self.context.manifest.gpus
        if not wanted.count or wanted.acquire or self.context.options.allow_busy:
            return []
        return list(preflight.busy(self.gpu_snapshot(), self.container_names))

    def sweep(self) -> list[Swept]:
        from builder.engine.sweep import save_log, sweep
        from builder.run import gpu_reservation

        temporary.remove_orphans()
        options = self.context.options
        found = sweep(
            self.engine,
            options.state_dir,
            run_release=functools.partial(gpu_reservation.run_pending_release, self.context),
            save=functools.partial(save_log, self.engine, directory=options.log_dir),
        )
        for swept in found:
            self.context.console.say(str(swept))
            self.swept = self.swept or swept.removed
        return found

    def sweep_pending(self) -> None:
        from builder.engine.sweep import has_pending_releases

        if has_pending_releases(self.context.options.state_dir):
            self.sweep()

    @contextlib.contextmanager
    def run_lock(self) -> Iterator[None]:
        from builder.run import cache_locks

        # Where a container holds the lock, it has laid out the root that the engine has.
        with cache_locks.held(self):
            self.require_shared_root()
            yield

    def reserve_gpus(self, items: Sequence[Item]) -> contextlib.AbstractContextManager[Reservation]:
        from builder.run import gpu_reservation

        return gpu_reservation.reserved(self, items)

    @property
    def shares_machine(self) -> bool:
        return self.engine.local

    def gpus_in_use(self) -> str:
        if not self.context.manifest.gpus.count:
            return ""
        if not self.engine.local:
            return "the engine is on another machine, whose GPUs cannot be seen from here"
        snapshot = self.gpu_snapshot()
        if snapshot.absent:
            return f"whether its GPUs are idle is not known ({snapshot.absent})"
        found = list(preflight.busy(snapshot, self.container_names))
        return found[0].text.rstrip(".") if found else ""

    def run_prebuild(
        self,
        mode: Literal["plan", "prebuild"],
        env: Mapping[str, str],
        request: PrebuildRequest,
        seconds: float,
        on_event: Callable[[Event], None],
    ) -> str:
        from builder.run import container_job

        return container_job.run_prebuild(self, mode, env, request, seconds, on_event)

    @functools.cached_property
    def nvml(self) -> Nvml:
        """The driver of this machine; absent where the engine runs elsewhere."""
        absent = None if self.engine.local else "the engine is on another machine, whose GPUs cannot be seen from here"
        nvml = Nvml(absent)
        self._stack.callback(nvml.close)
        return nvml

    def gpu_snapshot(self) -> GpuSnapshot:
        """Return the state of the GPUs that this manifest's containers get."""
        wanted = self.context.manifest.gpus
        return self.nvml.snapshot(hurried=lambda: self.context.cancel.is_due(ANSWER_WITHIN)).chosen(
            wanted.devices, wanted.count
        )

    def container_names(self) -> Mapping[str, str]:
        """Return id → name of every container of this engine, and of those that ran for this invocation."""
        with contextlib.suppress(EngineLostError):
            found = self.context.cancel.call_with_deadline(lambda: self.engine.containers([]), "list its containers")
            return {one.id: one.name for one in found} | self.ran
        return self.ran

    # --- tasks -------------------------------------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        from builder.run.schedule import Capacity

        gpus = self.context.manifest.gpus
        devices = tuple(range(gpus.count)) if gpus.devices is None else gpus.devices
        return Capacity(devices, self.context.manifest.run.parallel)

    def heading(self) -> str:
        gpus = self.context.manifest.gpus
        devices = f"{gpus.count} GPUs" if gpus.count else "no GPUs"
        if gpus.pretend:
            devices = f"no GPU, pretending {gpus.pretend} (experimental: not proven on hardware)"
        return f"{self.serving.ref} ({self.serving.id[:19]}…)  {devices}"

    def start(self) -> None:
        _ = self.lease, self.warmup

    def execute(self, item: Item, allocation: Allocation, watcher: Watcher) -> Execution:
        from builder.run import container_job

        execution = container_job.run_task(self, item, allocation, watcher)
        if execution.succeeded and not (self.engine.local and gpus.host_gpus()):
            # Only the container could see the GPUs; a memo of another machine may have stood for this one until now.
            env = probe_env(item.task)
            if (found := self._remembered(env, None)) is not None:
                self._records[env] = toolchain.of_task(found, dict(env))
        return execution

    def probe(self, env: ProbeEnv) -> Record:
        """Return the toolchain record that a container finds. It also lays out the cache root and writes the memo."""
        from builder.run import container_job

        self.prepare()
        self.create_root()
        outcome = container_job.run_probe(self, env, PROBE_TIMEOUT)
        self.context.cancel.check()
        record = container_job.probed_record(outcome, self.context.manifest.image.ref)
        problems = list(preflight.gpu_problems(self.context.manifest, None, record, podman=self.engine.podman))
        if problems:
            raise PreflightError(CANNOT_RUN, problems)
        return record
