"""Runs one container of the warm-up image: its job, its mounts and devices, and refusals that are this machine's fault.

Several may run at the same time, each from its own thread. What they share is resolved before the first one starts
(`Executor.start`); each adds its warnings, and its name to those that ran, in one step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from builder import __version__
from builder.cache import toolchain
from builder.cache.model_store import STORE_MOUNT as STORE
from builder.cache.toolchain import Record
from builder.engine.api import COMPILING_PIDS, MEMORY, SCRATCH, ContainerSpec, Mount
from builder.engine.container import ContainerOutcome, Deadlines, Sinks, run_container
from builder.engine.images import PROGRAM_ROOT
from builder.engine.log_pump import EventCallback
from builder.errors import CANNOT_RUN, EngineLostError, EngineRefusedError, PreflightError, Problem
from builder.events import PrebuildProblem, ToolchainProbed
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.job import JOB_VARIABLE, Job, Mode, PrebuildRequest, PrunePolicy, RunOrigin, ViewRequest
from builder.manifest.load import Manifest
from builder.run import preflight
from builder.run.executor import Allocation, Execution, Watcher
from builder.run.plan import Item, ProbeEnv
from builder.task import PRETEND_VARIABLE, Task

if TYPE_CHECKING:
    from builder.run.container_executor import ContainerExecutor

#: Exit statuses of a container's init that finds no such program, or may not run it.
NO_PYTHON = (126, 127)
#: Bytes of temporary files of a launch recorder's container.
RECORDER_SCRATCH = 512 << 20
#: Modes whose containers see GPUs. Of these only ``run`` gets models, secrets and a network.
SEES_GPUS = ("run", "probe")
#: Where NVIDIA's runtime is the engine's default, an image's own variable would ask for all GPUs.
NO_GPUS = {"NVIDIA_VISIBLE_DEVICES": "void"}
#: Modes that only read, some of them what an untrusted job left: they get the root read-only.
READS = ("pack", "view-list", "view-audit", "status", "families", "survey")


@dataclass(frozen=True, kw_only=True)
class ContainerRequest:
    """What one container gets besides its task."""

    devices: tuple[int, ...] | None = None  # GPUs by index; None: all of the manifest's
    cancel: Cancel | None = None  # ends it; None: the invocation's
    display: Callable[[str, str], None] | None = None  # gets each line of its log: stream, line
    on_event: EventCallback | None = None
    budget: Deadline | None = None
    concurrent: bool = False  # other tasks of this run may compile at the same time
    repair: bool = False  # mode verify: quarantine bad entries
    prune: PrunePolicy | None = None  # mode prune
    view: ViewRequest = field(default_factory=ViewRequest)  # modes of views
    prebuild: PrebuildRequest | None = None  # modes plan and prebuild
    prebuilt: Mapping[str, str] = field(default_factory=dict)  # mode run: keys of a complete prebuild
    record: str = ""  # mode record: path of the launch recorder's request in the container
    mounts: tuple[Mount, ...] = ()  # besides the cache root
    transfer: str = ""  # modes pack and restore: directory of the container's own for what goes in and out
    before_start: Callable[[str], None] | None = None  # gets the container's id when its files can be written
    after_exit: Callable[[str], None] | None = None  # gets it when the program has ended by itself


NOTHING_ELSE = ContainerRequest()
#: The least weight that an engine takes.
LEAST_SHARES = 2


def run_task(executor: ContainerExecutor, item: Item, allocation: Allocation, watcher: Watcher) -> Execution:
    """Run one task's container to its end."""
    task = item.task
    run_spec = executor.context.manifest.run
    limits = Deadlines(task=task.timeout, silence=task.silence, start=run_spec.start, grace=run_spec.grace)
    request = ContainerRequest(
        devices=allocation.visible_gpus,
        cancel=allocation.cancel,
        display=watcher.on_line,
        on_event=watcher.on_event,
        budget=executor.context.budget,
        concurrent=allocation.concurrent,
        prebuilt=item.prebuilt,
    )
    outcome = run(executor, "run", task, limits, request)
    return Execution(
        ended=outcome.ended,
        verdict=outcome.verdict,
        succeeded=outcome.exit_code == 0,
        how=f"the container {describe(outcome)}",
        oom=outcome.oom,
        seconds=outcome.seconds,
        log=outcome.log_path,
        tail=outcome.tail,
    )


def run_probe(executor: ContainerExecutor, env: ProbeEnv, timeout: float) -> ContainerOutcome:
    """Run a container that reports the toolchain of this environment. timeout: seconds."""
    task = Task(label="probe", model="", recipe="command", env=dict(env), timeout=timeout)
    start = executor.context.manifest.run.start
    return run(executor, "probe", task, Deadlines(task=timeout, silence=timeout, start=start, grace=2.0))


def probed_record(outcome: ContainerOutcome, ref: str) -> Record:
    """Return the record that a probe of this image reported. Raises PreflightError where it reported none."""
    records = [event.record for event in outcome.events if isinstance(event, ToolchainProbed)]
    if found := [record for record in records if toolchain.sound(record)]:
        return found[-1]
    why = "; ".join(outcome.problems) or f"it {describe(outcome)}"
    if outcome.exit_code in NO_PYTHON or any("catatonit" in line for line in outcome.tail):
        problem = Problem("image", f"{ref} cannot run python3, which it needs: {why}.")
    else:
        # Whatever it is, it is of this image: nothing else took part, and no task can run without a probe.
        problem = Problem("image", f"the probe of {ref} reported nothing: {why}.", "Its last lines say more.")
    raise PreflightError(CANNOT_RUN, [problem], notes=outcome.tail)


def run_prebuild(
    executor: ContainerExecutor,
    mode: Literal["plan", "prebuild"],
    env: Mapping[str, str],
    request: PrebuildRequest,
    seconds: float,
    on_event: EventCallback,
) -> str:
    """Run a container of the prebuild. Returns why it did not end well, or ""."""
    run_spec = executor.context.manifest.run
    limits = Deadlines(task=seconds, silence=seconds, start=run_spec.start, grace=run_spec.grace)
    outcome = run(
        executor,
        mode,
        Task(label=mode, model="", recipe="command", env=dict(env), timeout=seconds),
        limits,
        ContainerRequest(prebuild=request, on_event=on_event, budget=executor.context.budget),
    )
    if outcome.ended == "lost":
        raise EngineLostError(f"the engine was lost while the container of mode {mode} ran")
    if outcome.ended != "exited":
        return f"{mode}: it was ended for its {outcome.ended} after {outcome.seconds:.0f} s"
    if outcome.exit_code:
        known = any(isinstance(event, PrebuildProblem) and event.kind == "all" for event in outcome.events)
        return "" if known else f"{mode}: the container {describe(outcome)}"
    return ""


def run(
    executor: ContainerExecutor,
    mode: Mode,
    task: Task,
    deadlines: Deadlines,
    request: ContainerRequest = ContainerRequest(),
) -> ContainerOutcome:
    """Run one container in this mode to its end. Raises PreflightError where no GPU can be had.

    Only what compiles, or probes the toolchain, gets GPUs; only what compiles gets models, secrets and a network.
    """
    context = executor.context
    job = _job(executor, mode, task, deadlines, request)
    spec = _spec(executor, job, task, deadlines, request)
    log = context.log_path(task.label) if mode == "run" else None
    try:
        with context.cancel.shield() if request.cancel is None else contextlib.nullcontext():
            outcome = run_container(
                executor.engine,
                spec,
                job=job,
                lease=executor.lease,
                deadlines=deadlines,
                cancel=request.cancel or context.cancel,
                sinks=Sinks(log_path=log, display=request.display),
                on_event=request.on_event,
                budget=request.budget,
                before_start=request.before_start,
                after_exit=request.after_exit,
            )
    except EngineRefusedError as error:
        known = (
            preflight.no_driver(context.manifest, error),
            preflight.no_source(context.manifest, error),
        )
        problem = known[0] or known[1] or preflight.no_init(error) or preflight.unfit_image(context.manifest, error)
        if problem is None:
            raise
        raise PreflightError(CANNOT_RUN, [problem]) from error
    which = f"{task.label}: " if request.concurrent else ""
    context.report.warnings += [f"{which}{problem}" for problem in outcome.problems]
    if outcome.container:
        executor.ran[outcome.container] = spec.name
    return outcome


def _job(executor: ContainerExecutor, mode: Mode, task: Task, deadlines: Deadlines, request: ContainerRequest) -> Job:
    context = executor.context
    manifest, lease = context.manifest, executor.lease
    secrets = manifest.container.secrets if mode == "run" else ()
    return Job(
        mode=mode,
        nonce=lease.nonce,
        mount=manifest.cache.mount,
        image=executor.serving_names,
        task=task,
        lease=lease.target,
        lifetime=deadlines.task + deadlines.grace + manifest.run.start,
        grace=deadlines.grace,
        log_limit=manifest.container.log_limit,
        gpus=_indices(manifest, request.devices) if mode == "run" else (),
        workdir=executor.serving.workdir or "/",
        secrets=tuple(name for name in secrets if context.options.environ.get(name)),
        job_max=manifest.cache.job_max,
        repair=request.repair,
        concurrent=request.concurrent,
        prune=request.prune,
        view=request.view,
        record=request.record,
        transfer=request.transfer,
        prebuild=request.prebuild,
        prebuilt=request.prebuilt,
        observed=RunOrigin(socket.gethostname(), __version__, executor.serving.ref, context.run_id),
    )


def _spec(
    executor: ContainerExecutor, job: Job, task: Task, deadlines: Deadlines, request: ContainerRequest
) -> ContainerSpec:
    context = executor.context
    manifest = context.manifest
    if job.mode == "record":
        return _recorder(executor, job, task, request)
    if job.prebuild is not None:
        return _prebuilder(executor, job, job.prebuild)
    spec = ContainerSpec(
        image=executor.warmup.id,
        name=f"warm-cache-{context.run_id}-{job.mode}-{task.label}"[:120],
        entrypoint=["python3", "-m", "builder.agent"],
        command=[],
        env=_environment(executor, job),
        mounts=(*_root(executor, job.mode), *request.mounts),
        gpus=_devices(manifest, request.devices) if job.mode in SEES_GPUS else 0,
        shm_size=manifest.container.shm_size,
        network="none",
        workdir=PROGRAM_ROOT,
        stop_timeout=int(deadlines.grace) + 1,
    )
    if job.mode not in SEES_GPUS:
        spec = replace(spec, env={**spec.env, **NO_GPUS})
    if job.mode != "run":
        # NVIDIA's hook for CDI devices fails where the root file system is read-only (kserve/kserve#5711).
        return replace(spec, read_only=not (spec.gpus or job.transfer), tmpfs=SCRATCH, memory=MEMORY)
    return replace(
        spec, mounts=(*spec.mounts, *_store(manifest)), network=manifest.container.network, pids=COMPILING_PIDS
    )


def _recorder(executor: ContainerExecutor, job: Job, task: Task, request: ContainerRequest) -> ContainerSpec:
    """Return a container that runs code of a checkout: no cache, no models, no GPU, no secrets and no network."""
    return ContainerSpec(
        image=executor.warmup.id,
        name=f"warm-cache-{executor.context.run_id}-{job.mode}",
        entrypoint=["python3", "-m", "builder.agent"],
        env={JOB_VARIABLE: job.to_json(), "PYTHONSAFEPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        labels=executor.lease.labels(task.label, job.lifetime),
        mounts=request.mounts,
        network="none",
        ulimits={},
        tmpfs={"/tmp": f"size={RECORDER_SCRATCH},mode=1777"},  # noqa: S108 - the container's own
        workdir=PROGRAM_ROOT,
        stop_timeout=int(job.grace) + 1,
        memory=MEMORY,
        read_only=True,
        capabilities=(),
    )


def _prebuilder(executor: ContainerExecutor, job: Job, prebuild: PrebuildRequest) -> ContainerSpec:
    """Return a container without GPUs, secrets and network; a plan pass, whose entries are no kernels, gets no cache.

    What it writes outside the cache is in memory, and counts among the memory that it may take.
    """
    plans = job.mode == "plan"
    return ContainerSpec(
        image=executor.warmup.id,
        name=f"warm-cache-{executor.context.run_id}-{job.mode}",
        entrypoint=["python3", "-m", "builder.agent"],
        env={**_environment(executor, job), **NO_GPUS},
        mounts=_store(executor.context.manifest) if plans else _root(executor, job.mode),
        shm_size=executor.context.manifest.container.shm_size,
        network="none",
        tmpfs={"/tmp": "exec,mode=1777"},  # noqa: S108 - the container's own
        workdir=PROGRAM_ROOT,
        stop_timeout=int(job.grace) + 1,
        memory=prebuild.memory if prebuild.gentle else None,
        cpus=",".join(map(str, prebuild.cpus)),
        cpu_shares=LEAST_SHARES if prebuild.gentle else None,
        pids=COMPILING_PIDS,
    )


def _root(executor: ContainerExecutor, mode: Mode) -> tuple[Mount, ...]:
    """Return the mounts of the cache root; none where a verb that only reads must not make a root."""
    if not (executor.context.options.creates or executor.cache.exists()):
        return ()
    mount = executor.cache.mount()
    if mode == "probe":
        # Where the folder of memos is missing or cannot be seen from here, the first task writes the memo.
        return replace(mount, read_only=True), *_memos(executor)
    return (replace(mount, read_only=mode in READS),)


def _memos(executor: ContainerExecutor) -> tuple[Mount, ...]:
    """Return the mount of the root's folder of memos alone; none where this process cannot see that it is a folder."""
    cache, engine = executor.context.manifest.cache, executor.engine
    if not engine.local:
        return ()
    path = str(cache.root or "")
    if not path:
        volume = engine.volume(str(cache.volume))
        path = volume.mountpoint if volume and volume.driver == "local" and not volume.options else ""
    folder = f"{path}/images"
    try:
        # The engine would follow a link, to anywhere on its host.
        is_folder = bool(path) and stat.S_ISDIR(os.lstat(folder).st_mode)
    except OSError:
        return ()
    return (Mount(source=folder, target=f"{cache.mount}/images"),) if is_folder else ()


def _environment(executor: ContainerExecutor, job: Job) -> dict[str, str]:
    """Return the container's environment. Secrets never enter the job, a label or a log."""
    context = executor.context
    models = context.manifest.models
    # Python finds the program by the working directory; an image may have set PYTHONSAFEPATH against that.
    # A GPU is simulated for tasks that ask for it, whatever the image says; the program removes the empty variable.
    env = {**job.variable(), "PYTHONSAFEPATH": "", PRETEND_VARIABLE: ""}
    if models.store:
        env["HF_HOME"] = STORE
        env["HF_HUB_OFFLINE"] = "0" if models.writable else "1"
    return env | {name: context.options.environ[name] for name in job.secrets}


def _store(manifest: Manifest) -> tuple[Mount, ...]:
    models = manifest.models
    return (Mount(source=str(models.store), target=STORE, read_only=not models.writable),) if models.store else ()


def _indices(manifest: Manifest, devices: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the indices of GPUs that a container gets."""
    chosen = manifest.gpus.devices if devices is None else devices
    return tuple(range(manifest.gpus.count)) if chosen is None else tuple(chosen)


def _devices(manifest: Manifest, devices: tuple[int, ...] | None) -> int | tuple[str, ...]:
    """Return the GPUs to request from the engine: indices where some are named, else their number."""
    chosen = manifest.gpus.devices if devices is None else devices
    return tuple(str(index) for index in chosen) if chosen is not None else manifest.gpus.count


def describe(outcome: ContainerOutcome) -> str:
    """Return how a container ended, for people. Follows ``the container``."""
    if outcome.oom:
        return "ran out of memory inside the container"
    if outcome.exit_code is None:
        return "never reported an exit status"
    if outcome.exit_code > 128:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(outcome.exit_code - 128).name} (status {outcome.exit_code})"
    return f"ended with status {outcome.exit_code}"
