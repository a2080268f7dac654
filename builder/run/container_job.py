"""One container of the warm-up image: what it is told, what it is given, and which refusals are this machine's trouble.

Several may run at once, each from a thread of its own. What they share is complete before the first one starts
(`Shared`), and what they leave there is added in one step each.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from builder import __version__
from builder.cache.model_store import STORE_MOUNT as STORE
from builder.engine.client import ContainerSpec, Mount
from builder.engine.container import Deadlines, Outcome, Sinks, run_container
from builder.engine.images import PROGRAM_ROOT
from builder.errors import CANNOT_RUN, EngineRefusedError, PreflightError, UsageError
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.job import JOB_VARIABLE, Job, PrunePolicy
from builder.manifest.load import Manifest
from builder.run import preflight
from builder.task import Task

if TYPE_CHECKING:
    from builder.run.container_executor import ContainerExecutor

#: Linux takes no longer string in an environment (MAX_ARG_STRLEN, 32 pages), name and terminator included.
MAX_JOB = 131072 - len(JOB_VARIABLE) - 2

#: Modes whose containers get GPUs, models, secrets and a network.
COMPILES = ("run", "probe")
#: Modes that only look, some of them at what an untrusted job left: they cannot write to the root.
LOOKS = ("view-list", "view-audit", "status", "families", "survey")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What else one container may be asked for. devices: GPUs by index; None: all that the manifest has.

    cancel: who may end it, if not whoever ends the whole invocation. beside: other tasks of this run may compile at the
    same time. view: what the modes of views are told. mounts: besides the cache root.
    """

    devices: tuple[int, ...] | None = None
    cancel: Cancel | None = None
    display: Callable[[str, str], None] | None = None
    on_event: Callable[[Mapping[str, Any]], None] | None = None
    budget: Deadline | None = None
    repair: bool = False
    beside: bool = False
    prune: PrunePolicy | None = None
    view: Mapping[str, Any] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()


NOTHING_ELSE = Asked()


def run(executor: ContainerExecutor, mode: str, task: Task, deadlines: Deadlines, asked: Asked) -> Outcome:
    """One container in this mode, to its end. Raises PreflightError where no GPU can be had. Only what compiles or
    looks at the toolchain gets GPUs, models, secrets and a network.
    """
    context = executor.context
    job = _job(executor, mode, task, deadlines, asked)
    spec = _spec(executor, job, task, deadlines, asked)
    log = context.log_path(task.label) if mode == "run" else None
    try:
        with context.cancel.shield() if asked.cancel is None else contextlib.nullcontext():
            outcome = run_container(
                executor.engine,
                spec,
                job=job,
                lease=executor.lease,
                deadlines=deadlines,
                cancel=asked.cancel or context.cancel,
                sinks=Sinks(log_path=log, display=asked.display),
                on_event=asked.on_event,
                budget=asked.budget,
            )
    except EngineRefusedError as error:
        known = (
            preflight.no_driver(context.manifest, error),
            preflight.no_source(context.manifest, error),
        )
        problem = known[0] or known[1] or preflight.no_init(error)
        if problem is None:
            raise
        raise PreflightError(CANNOT_RUN, [problem]) from error
    context.report.warnings += [_whose(problem, spec, task, asked) for problem in outcome.problems]
    if outcome.container:
        executor.ran[outcome.container] = spec.name
    return outcome


def _whose(problem: str, spec: ContainerSpec, task: Task, asked: Asked) -> str:
    """A container's problem for people, who have several of them before their eyes."""
    return f"{task.label}: {problem}" if asked.beside and spec.name not in problem else problem


def _job(executor: ContainerExecutor, mode: str, task: Task, deadlines: Deadlines, asked: Asked) -> Job:
    context = executor.context
    manifest, lease = context.manifest, executor.lease
    secrets = manifest.container.secrets if mode in COMPILES else ()
    return Job(
        mode=mode,
        nonce=lease.nonce,
        mount=manifest.cache.mount,
        image={"id": executor.identity, "digests": list(executor.serving.digests), "labels": executor.serving.labels},
        task=task,
        lease=lease.target,
        lifetime=deadlines.task + deadlines.grace + manifest.run.start,
        grace=deadlines.grace,
        log_limit=manifest.container.log_limit,
        workdir=executor.serving.workdir or "/",
        secrets=tuple(name for name in secrets if context.options.environ.get(name)),
        job_max=manifest.cache.job_max,
        repair=asked.repair,
        beside=asked.beside,
        prune=asked.prune,
        view=asked.view,
        observed={
            "host": socket.gethostname(),
            "builder": __version__,
            "image": executor.serving.ref,
            "run": context.run_id,
        },
    )


def _spec(executor: ContainerExecutor, job: Job, task: Task, deadlines: Deadlines, asked: Asked) -> ContainerSpec:
    context = executor.context
    manifest, compiles = context.manifest, job.mode in COMPILES
    return ContainerSpec(
        image=executor.warmup.id,
        name=f"warm-cache-{context.run_id}-{job.mode}-{task.label}"[:120],
        entrypoint=["python3", "-m", "builder.agent"],
        command=[],
        env=_environment(executor, job),
        labels=executor.lease.labels(task.label, job.lifetime),
        mounts=(*_root(executor, job.mode in LOOKS), *(_store(manifest) if compiles else ()), *asked.mounts),
        gpus=_devices(manifest, asked.devices) if compiles else 0,
        shm_size=manifest.container.shm_size,
        network=manifest.container.network if compiles else "none",
        workdir=PROGRAM_ROOT,
        stop_timeout=int(deadlines.grace) + 1,
    )


def _root(executor: ContainerExecutor, read_only: bool) -> tuple[Mount, ...]:
    """The cache root; nothing where a verb that only reads must not make one, and then its place is in the
    container.
    """
    there = executor.context.options.creates or executor.cache.exists()
    return (replace(executor.cache.mount(), read_only=read_only),) if there else ()


def _environment(executor: ContainerExecutor, job: Job) -> dict[str, str]:
    """Secrets are handed on by name and never enter the job, a label or a log."""
    context = executor.context
    document, models = job.to_json(), context.manifest.models
    if len(document.encode()) > MAX_JOB:
        label = job.task.label if job.task else job.mode
        raise UsageError(
            f"{label}: its argv, env and shapes make a job of {len(document.encode())} bytes, and the kernel's "
            f"limit for one variable is {MAX_JOB}. Put long values into a file in the image."
        )
    # The program is found by its working directory, which an image may have told Python not to trust.
    env = {JOB_VARIABLE: document, "PYTHONSAFEPATH": ""}
    if models.store:
        env["HF_HOME"] = STORE
        env["HF_HUB_OFFLINE"] = "0" if models.writable else "1"
    return env | {name: context.options.environ[name] for name in job.secrets}


def _store(manifest: Manifest) -> tuple[Mount, ...]:
    models = manifest.models
    return (Mount(source=str(models.store), target=STORE, read_only=not models.writable),) if models.store else ()


def _devices(manifest: Manifest, devices: tuple[int, ...] | None) -> int | tuple[str, ...]:
    """What to ask the engine for: these GPUs where some are named, else a number of them."""
    chosen = manifest.gpus.devices if devices is None else devices
    return tuple(str(index) for index in chosen) if chosen is not None else manifest.gpus.count


def describe(outcome: Outcome) -> str:
    """How a container ended, in words that name its status and never return it raw."""
    if outcome.oom:
        return "ran out of memory inside the container"
    if outcome.exit_code is None:
        return "never reported an exit status"
    if outcome.exit_code > 128:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(outcome.exit_code - 128).name} (status {outcome.exit_code})"
    return f"ended with status {outcome.exit_code}"
