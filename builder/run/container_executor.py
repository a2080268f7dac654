"""What one invocation shares: the serving image, the toolchain, the cache root, the lease. Each is resolved when
first asked for.

The fast path asks for little: an image id, a memo, the markers. So it starts no container, takes no lease and touches
no GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cache import toolchain
from builder.cache.marker_files import Marker
from builder.cache.toolchain import Record
from builder.engine import sweep as remains
from builder.engine.client import Engine, Image
from builder.engine.container import Deadlines, Outcome
from builder.engine.images import identity, warmup_image
from builder.engine.lease import Lease, Swept, debts, sweep
from builder.errors import CANNOT_RUN, BuilderError, EngineLostError, EngineRefusedError, PreflightError, Problem
from builder.host import gpu_locks, gpus, hooks
from builder.host.cancel import ANSWER
from builder.host.gpus import Look, Nvml
from builder.host.locks import Patience
from builder.run import container_job, preflight
from builder.run.cache_root import CacheRoot
from builder.run.container_job import NOTHING_ELSE, Asked, describe
from builder.run.context import Context
from builder.run.plan import Plan, ProbeEnv, make_plan, probe_env
from builder.task import Task

if TYPE_CHECKING:
    from builder.run.estimates import Estimate

#: What an init exits with when it finds no such program, or may not run it.
NO_PYTHON = (126, 127)

#: A probe reads metadata and asks two libraries: well under a second. The rest is a slow disk's share.
PROBE_TIMEOUT = 120.0


@dataclass(eq=False)
class ContainerExecutor:
    """Runs tasks in containers of one engine. Use as a context manager: every exit gives back what was taken."""

    context: Context
    engine: Engine
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _lease: Lease | None = None
    #: Containers that ran for this invocation, id → name; they are gone.
    ran: dict[str, str] = field(default_factory=dict)
    #: Whether a container of a dead builder was removed.
    swept: bool = False

    def __enter__(self) -> ContainerExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        with self.context.cancel.shield():  # a second signal must not come between the steps
            self._stack.close()

    # --- what is there -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def image(self) -> Image | None:
        """The serving image, pulled first where that was asked for; None when the engine does not have it."""
        ref = self.context.manifest.image.ref
        if self.context.options.pull:
            self.context.console.say(f"pulling {ref}")
            image: Image | None = self.engine.pull(ref, self.context.console.say)
        else:
            image = self.engine.image(ref)
        self.context.report.image_ref = ref
        self.context.report.image_id = image.id if image else None
        return image

    @property
    def serving(self) -> Image:
        """The serving image; its absence is a preflight problem, reported with all the others."""
        if self.image is None:
            self.ready()
            raise PreflightError(f"{self.context.manifest.image.ref} is not on this engine")
        return self.image

    @functools.cached_property
    def cache(self) -> CacheRoot:
        return CacheRoot(
            self.context.manifest,
            self.engine,
            image=self.serving.id,
            lease=lambda: self.lease,
            cancel=self.context.cancel,
        )

    @property
    def lease(self) -> Lease:
        """The hold on every container of this run; taken with the first one."""
        if self._lease is None:
            self._lease = self._stack.enter_context(Lease(self.context.options.state_dir, run_id=self.context.run_id))
        return self._lease

    @functools.cached_property
    def nvml(self) -> Nvml:
        """The driver's word about the GPUs of this machine, which are only the engine's if it runs here."""
        absent = None if self.engine.local else "the engine is on another machine, whose GPUs cannot be seen from here"
        nvml = Nvml(absent)
        self._stack.callback(nvml.close)
        return nvml

    def look(self) -> Look:
        """The GPUs that this manifest's containers get, now."""
        wanted = self.context.manifest.gpus
        return self.nvml.look(hurried=lambda: self.context.cancel.is_due(ANSWER)).chosen(wanted.devices, wanted.count)

    def container_names(self) -> Mapping[str, str]:
        """Id → name, of every container of this engine, and of those of this run."""
        with contextlib.suppress(EngineLostError):
            found = self.context.cancel.answer(lambda: self.engine.containers([]), "for its containers")
            return {one.id: one.name for one in found} | self.ran
        return self.ran

    def patience(self) -> Patience:
        """How long this run waits for other builders, from now on."""
        return Patience(
            self.context.manifest.run.lock_timeout, say=self.context.console.say, cancel=self.context.cancel
        )

    @functools.cached_property
    def warmup(self) -> Image:
        """The warm-up image, built on first use. Raises PreflightError where the serving image, or a setup command on
        it, cannot be built on.
        """
        try:
            return warmup_image(self.engine, self.serving, self.context.manifest.image.setup, self._build_line)
        except EngineRefusedError as error:
            problem = Problem("image", f"{error.message}.", "See [image] setup, and ONBUILD of the serving image.")
            raise PreflightError(CANNOT_RUN, [problem], notes=error.notes) from error

    def _build_line(self, line: str) -> None:
        if self.context.console.verbose:
            self.context.console.say(line)

    @functools.cache  # noqa: B019 - a session lives as long as the process
    def ready(self) -> None:
        """Preflight. Raises PreflightError with every problem of this machine."""
        problems = list(preflight.problems(self.context.manifest, self.engine))
        if problems:
            raise PreflightError(CANNOT_RUN, [*problems, *self.busy()])

    def busy(self) -> list[Problem]:
        """Who holds GPUs that this manifest wants, as far as that can be seen and does not change by itself."""
        wanted = self.context.manifest.gpus
        if not wanted.count or wanted.acquire or self.context.options.allow_busy:
            return []
        return list(preflight.busy(self.look(), self.container_names))

    def sweep(self) -> list[Swept]:
        """Removes what builders that were killed left on this engine, and does for this machine what they owed it."""
        keep = functools.partial(remains.drain, self.engine, directory=self.context.options.log_dir)
        found = sweep(self.engine, self.context.options.state_dir, settle=self._settle, drain=keep)
        for swept in found:
            self.context.console.say(str(swept))
            self.swept = self.swept or swept.removed
        return found

    def sweep_debts(self) -> None:
        """Sweeps if a builder owes this machine something; else it asks nobody, and costs a look into one directory."""
        if debts(self.context.options.state_dir):
            self.sweep()

    def _settle(self, directory: Path) -> bool:
        """Puts the machine back into service for a builder that was killed, unless another one has it now."""
        with gpu_locks.at_once(gpu_locks.SERVICE) as free:
            if not free:
                return False
            self.context.console.say("putting this machine back into service, for a builder that was killed:")
            failure = hooks.settle(directory, self.context.options.environ, self.say_hook)
        if failure is not None:
            self.context.report.warnings.append(f"release failed, and is tried again by the next run: {failure.text}")
        return failure is None

    def say_hook(self, line: str) -> None:
        """One line of an operator's command."""
        self.context.console.log("hook", line)

    def plan(self, tasks: Sequence[Task], expected: dict[str, Estimate] | None = None) -> Plan:
        """Judges these tasks against the cache as it is now. expected: is filled with how long each of them will take,
        by label, as far as the cache tells; that means to read every marker.
        """
        records = self.records(tasks)
        models = {task.model for task in tasks}
        # Whatever else lies in the cache is no matter of this image, and need not be copied.
        keys = {place for record in records.values() for place in toolchain.family_keys(record).items()}
        with self.cache.view(keys=keys) as root, self.cache.store_view(models) as store:
            plan = make_plan(tasks, records, root=root, store=store, strict=self.context.options.strict)
            if expected is not None:
                from builder.run import estimates

                expected.update(estimates.learn(root, plan.items))
        self.context.report.toolchain = plan.digest
        self.context.report.cache = self.cache.name
        return plan

    def records(self, tasks: Sequence[Task]) -> Mapping[ProbeEnv, Record]:
        """The toolchain record for every environment that tasks have: from the memo where it holds, from a probe
        elsewhere.
        """
        if not hasattr(self, "_records"):
            self._records: dict[ProbeEnv, Record] = {}
        host = gpus.host_gpus() if self.engine.local else None
        for env in sorted({probe_env(task) for task in tasks} - self._records.keys()):
            record = self._remembered(env, host)
            # Podman would not even say that it has no GPUs to give: the probe's container has to.
            doubted = self.context.options.creates and bool(self.context.manifest.gpus.count) and self.engine.podman
            self._records[env] = self.probe(env) if record is None or doubted else record
        return self._records

    def remembers(self, tasks: Sequence[Task]) -> bool:
        """Whether `records` would start no container for these tasks."""
        host = gpus.host_gpus() if self.engine.local else None
        return all(self._remembered(env, host) is not None for env in {probe_env(task) for task in tasks})

    def _remembered(self, env: ProbeEnv, host: gpus.HostGpus | None) -> Record | None:
        with self.cache.view(entries=False) as root:
            return toolchain.read_memo(
                root,
                self.identity,
                mount=self.context.manifest.cache.mount,
                gpus=host.model if host else None,
                driver=host.driver if host else None,
                env=dict(env),
            )

    def wrote(self, marker: Marker | None) -> bool:
        """Return whether a marker is of this run."""
        return marker is not None and marker.observed.run == self.context.run_id

    @property
    def identity(self) -> str:
        return identity(self.serving, self.context.manifest.image.setup)

    def probe(self, env: ProbeEnv) -> Record:
        """Asks a container what its kernels would depend on. It also lays out the cache root and writes the memo."""
        self.ready()
        if self.context.options.creates and self.cache.create():
            self.context.console.say(f"created {self.cache.name}")
        task = Task(label="probe", model="", recipe="command", env=dict(env), timeout=PROBE_TIMEOUT)
        outcome = self.run(
            "probe",
            task,
            Deadlines(task=PROBE_TIMEOUT, silence=PROBE_TIMEOUT, start=self.context.manifest.run.start, grace=2.0),
        )
        self.context.cancel.check()
        told: list[Any] = [event.get("record") for event in outcome.events if event.get("event") == "toolchain"]
        found = [known for known in told if toolchain.sound(known)]
        if not found:
            why = "; ".join(outcome.problems) or f"it {describe(outcome)}"
            if outcome.exit_code in NO_PYTHON or any("catatonit" in line for line in outcome.tail):
                problem = Problem(
                    "image", f"{self.context.manifest.image.ref} cannot run python3, which it needs: {why}."
                )
                raise PreflightError(CANNOT_RUN, [problem], notes=outcome.tail)
            raise BuilderError(
                f"the probe of {self.context.manifest.image.ref} told nothing: {why}", notes=outcome.tail
            )
        record: Record = found[-1]
        problems = list(preflight.seen_problems(self.context.manifest, record, podman=self.engine.podman))
        if problems:
            raise PreflightError(CANNOT_RUN, problems)
        return record

    # --- one container -----------------------------------------------------------------------------------------------

    def run(self, mode: str, task: Task, deadlines: Deadlines, asked: Asked = NOTHING_ELSE) -> Outcome:
        """One container of the warm-up image in this mode, to its end: `launch.run`."""
        return container_job.run(self, mode, task, deadlines, asked)
