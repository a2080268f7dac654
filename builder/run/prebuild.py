"""The first stage of a run: DeepGEMM's kernels compiled on CPU cores, before any task uses a GPU.

A plan pass in a container without the cache root names the kernels of every cold task; a second container compiles
those that the cache lacks, each once, whichever tasks ask for it. The GPU is simulated from this host's probe record.
No marker is written: the tasks run as ever, hit what is there and prove it. So a failure is a warning, and costs time
only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from builder import events
from builder.cache import marker_files, toolchain
from builder.errors import BuilderError, Problem, TasksError, UsageError
from builder.job import PlannedShape, PrebuildRequest
from builder.report.results import Section
from builder.run import prebuild_jobs, proofs
from builder.run.executor import Executor
from builder.run.plan import Item, ProbeEnv
from builder.sglang_args import chunked_prefill_size
from builder.task import GPUS, PRETEND_VARIABLE, RECIPES, Gpu, Shape, Task
from builder.text import counted, printable, size, span

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from builder.manifest.load import Manifest

#: Seconds for a plan pass: one import, and a second for each shape.
PLAN_TIMEOUT = 900.0
#: Seconds for compiling, unless the run's budget ends before.
COMPILE_TIMEOUT = 3600.0
#: Problems that are shown; the report has all of them.
_SHOWN = 5

#: State of the stage. off: not enabled, or not needed; unfit: not possible here, or not now.
State = Literal["off", "unfit", "nothing", "done", "incomplete", "failed"]


@dataclass
class Stage:
    """What became of the stage. Numbers are of entries of deep_gemm.

    tasks: label → where its shapes are from. unverified: tasks without a list of shapes, with the reason; what they ask
    for is compiled on GPUs. missing: names that were planned and are not there.
    """

    state: State
    reason: str = ""
    seconds: float = 0.0
    named: int = 0
    present: int = 0
    made: int = 0
    made_bytes: int = 0
    workers: int = 0
    worker_bytes: int = 0
    cpu_seconds: float = 0.0
    import_seconds: float = 0.0
    paused: float = 0.0
    keys: list[str] = field(default_factory=list)
    tasks: dict[str, str] = field(default_factory=dict)
    unverified: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: Modules of sglang's own JIT that a later process found, and why others were not: tasks build them.
    modules: int = 0
    modules_missing: list[str] = field(default_factory=list)
    #: Kernels that tasks compiled although the stage ran; None before they did.
    gpu_kernels: int | None = None


@dataclass
class PrebuildSection(Section):
    """The stage in the report."""

    prebuild: Stage


@dataclass(frozen=True)
class Known:
    """Facts from markers of earlier runs, by model. missed: shapes of which a prebuild did not name every kernel."""

    shapes: Mapping[str, Sequence[Shape]] = field(default_factory=dict)
    missed: Mapping[str, Sequence[Shape]] = field(default_factory=dict)


def known_shapes(root: Path, items: Iterable[Item]) -> Known:
    """Return facts from markers about the models of these tasks. root: the cache's index."""
    items = tuple(items)
    models = {item.task.model for item in items if _asks(item) and _is_walked(item.task)}
    models |= {item.task.model for item in items if "markers" in item.task.shapes_from}
    asking = {item.task.model for item in items if _asks(item)}
    return Known(marker_files.shapes_of(root, models), marker_files.missed_of(root, asking))


def run(executor: Executor, items: Sequence[Item], known: Known) -> Stage:
    """Run the stage for these items, as far as it is enabled and possible, and put it into the report.

    Raises Interrupted; with ``--prebuild-only``, where something is missing,
    TasksError.
    """
    began, only = time.monotonic(), _only(executor)
    stage = _wanted(executor, items, only)
    if stage is None:
        stage = Stage("nothing")
        try:
            _Prebuild(executor, known, items, stage).run()
        except BuilderError as error:
            executor.context.cancel.check()
            stage.state, stage.reason = "failed", error.message
    stage.seconds = round(time.monotonic() - began, 1)
    executor.context.report.add(PrebuildSection(stage))
    _report(executor, stage)
    if only and stage.state not in ("done", "nothing"):
        raise TasksError(f"the prebuild is not complete: {stage.reason or f'{len(stage.missing)} kernels are missing'}")
    return stage


def with_keys(stage: Stage, items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items, those with the keys of the stage for which it named and made every kernel."""
    if stage.state != "done":
        return tuple(items)
    return tuple(
        replace(item, prebuilt={"deep_gemm": key})
        if _asks(item) and (key := toolchain.family_key(item.record, "deep_gemm")) in stage.keys
        else item
        for item in items
    )


def finish(executor: Executor, stage: Stage) -> None:
    """Add to the report what tasks compiled after the stage."""
    if stage.state in ("off", "unfit"):
        return
    tasks = executor.context.report.tasks
    stage.gpu_kernels = sum(task.added.get("deep_gemm", 0) for task in tasks)
    executor.context.report.add(PrebuildSection(stage))
    executor.context.console.say(
        f"kernels of DeepGEMM: {stage.made} made on CPU cores before, {stage.gpu_kernels} by tasks on GPUs"
    )


def simulated_name(manifest: Manifest) -> str:
    """Return the GPU to simulate for this manifest where there is none. Raises UsageError where it names none."""
    wanted = manifest.gpus.pretend or manifest.gpus.name or ""
    known = [name for name in GPUS if wanted and (wanted in GPUS[name].name or name in wanted)]
    if not known:
        text = f"{printable(repr(wanted))} is no GPU that can be simulated" if wanted else "it names no GPU"
        remedy = f"set name, or pretend, to one of {', '.join(GPUS)}."
        raise UsageError("which GPU?", [Problem(f"{manifest.path} [gpus]", f"{text}:", remedy)])
    return known[0]


def on_simulated_gpu(manifest: Manifest) -> Manifest:
    """Return the manifest for a machine without GPUs: the same tasks, for the same family keys."""
    name = simulated_name(manifest)
    tasks = tuple(replace(task, env={**task.env, PRETEND_VARIABLE: name}) for task in manifest.tasks)
    gpus = replace(manifest.gpus, count=0, devices=None, pretend=name)
    return replace(manifest, gpus=gpus, tasks=tasks)


# --- whether ---------------------------------------------------------------------------------------------------------


def _wanted(executor: Executor, items: Sequence[Item], only: bool) -> Stage | None:
    """Return why the stage does not run; None if it does."""
    spec = executor.context.manifest.prebuild
    if only:
        return None
    if spec.enabled is False:
        return Stage("off", "[prebuild] enabled is false")
    if not any(_asks(item) for item in items):
        return Stage("off", "no cold task asks for kernels of DeepGEMM")
    if spec.enabled == "proven":
        names = {str(gpu.get("name")) for item in items for gpu in item.record["gpus"]}
        unproven = sorted(name for name in names if proofs.find(name) is None)
        if not names or unproven:
            what = ", ".join(unproven) or "a machine without GPUs"
            return Stage("off", f"not proven on {printable(what)}; see [prebuild] enabled")
    if spec.when == "idle" and (use := executor.gpus_in_use()):
        return Stage("unfit", f'{use}, and [prebuild] when is "idle"')
    return None


def _unprepared(items: Iterable[Item]) -> list[str]:
    """Return tasks that would ask for kernels of DeepGEMM if their model were here."""
    return [
        f"{item.task.label}: shapes unverified: {item.config_problem}"
        for item in items
        if item.config_problem and _asks(replace(item, config_problem=None))
    ]


def _only(executor: Executor) -> bool:
    return executor.context.options.prebuild_only


def _asks(item: Item) -> bool:
    """Return whether a task may ask for kernels of DeepGEMM."""
    task = item.task
    if item.config_problem or not (task.recipe == "shapes" or RECIPES[task.recipe].server):
        return False
    return task.families is None or "deep_gemm" in task.families


# --- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Tasks with one environment, in which sglang is imported once."""

    env: Mapping[str, str]
    gpu: Gpu
    key: str
    items: tuple[Item, ...]


class _Prebuild:
    """One stage: plans of all groups, then their kernels."""

    def __init__(self, executor: Executor, known: Known, items: Sequence[Item], stage: Stage) -> None:
        self._executor, self._known, self._stage = executor, known, stage
        self._modules: dict[str, tuple[_Group, dict[str, None]]] = {}  # of sglang's own JIT, by the key of its family
        stage.unverified += _unprepared(items)
        self._context = executor.context
        self._groups = list(_groups((item for item in items if _asks(item)), self._context.manifest))
        busy = executor.gpus_in_use() != ""
        self._limits = prebuild_jobs.limits(self._context.manifest.prebuild, busy, executor.shares_machine)

    def run(self) -> None:
        """Plan for each environment, then compile for each key: what makes other kernels is a part of the key."""
        self._executor.start()
        seen: dict[str, set[str]] = {}
        new: dict[str, tuple[_Group, list[PlannedShape]]] = {}
        for group in self._groups:
            named = seen.setdefault(group.key, set())
            for shape in self._plan(group):
                rest = prebuild_jobs.without(shape, named)
                named |= {name for _, names in rest.kernels for name in names}
                new.setdefault(group.key, (group, []))[1].extend([rest] if rest.kernels else [])
        for group, shapes in new.values():
            for batch in prebuild_jobs.batches(shapes):
                self._compile(group, batch)
        for key, (group, modules) in self._modules.items():
            request = replace(self._limits, gpu=group.gpu, key=group.key, modules=tuple(modules), jit_key=key)
            self._do("prebuild", group, request, COMPILE_TIMEOUT, self._note)
        self._stage.named = sum(map(len, seen.values()))
        if not self._stage.named and not self._stage.problems:
            return
        complete = not self._stage.missing and not self._stage.problems
        self._stage.state = "done" if complete else "incomplete"
        if self._stage.problems:
            self._stage.reason = self._stage.problems[0]

    def _plan(self, group: _Group) -> list[PlannedShape]:
        shapes = list(dict.fromkeys(shape for item in group.items for shape in self._shapes(item.task)))
        models = [item.task for item in group.items if _is_walked(item.task)]
        if not shapes and not models:
            return []
        request = replace(self._limits, gpu=group.gpu, shapes=tuple(shapes), models=tuple(models))
        found: list[PlannedShape] = []

        def on_event(event: events.Event) -> None:
            if isinstance(event, events.KernelsPlanned):
                shape = Shape.parse(event.shape)
                found.append(PlannedShape(shape, event.m_values, event.chunked_prefill_size, event.kernels))
            elif isinstance(event, events.ModelWalked):
                jit_key = toolchain.family_key(group.items[0].record, "sglang_jit")
                for module in event.modules:
                    self._modules.setdefault(jit_key, (group, {}))[1][module] = None
                note = f"{event.source} ({event.note})" if event.note else event.source
                self._stage.tasks[event.task] = f"{counted(len(event.shapes), 'shape')} of {note}"
            else:
                self._note(event)

        self._do("plan", group, request, PLAN_TIMEOUT, on_event)
        return found

    def _shapes(self, task: Task) -> Iterator[PlannedShape]:
        """Yield the shapes that are known on the host: the task's own, and those of earlier runs."""
        listed = dict.fromkeys([*task.shapes, *self._known.shapes.get(task.model, ())])
        argued = chunked_prefill_size(task.argv, -1)
        size = argued if argued > 0 else None
        for shape in listed:
            yield PlannedShape(shape, task.m_values, size)
        for shape in self._known.missed.get(task.model, ()):
            yield PlannedShape(shape, (), size, every=True)
        if listed:
            self._stage.tasks[task.label] = f"{counted(len(listed), 'shape')} of the manifest or of markers"

    def _compile(self, group: _Group, shapes: Sequence[PlannedShape]) -> None:
        request = replace(self._limits, gpu=group.gpu, shapes=tuple(shapes), key=group.key)
        self._do("prebuild", group, request, COMPILE_TIMEOUT, self._note)

    def _do(
        self,
        mode: Literal["plan", "prebuild"],
        group: _Group,
        request: PrebuildRequest,
        seconds: float,
        on_event: Callable[[events.Event], None],
    ) -> None:
        budget = self._context.budget.left()
        if budget <= 0:
            self._stage.problems.append("the run's budget ended")
            return
        why = self._executor.run_prebuild(mode, group.env, request, min(seconds, budget), on_event)
        self._context.cancel.check()
        if why and why not in self._stage.problems:
            self._stage.problems.append(why)

    def _note(self, event: events.Event) -> None:
        stage = self._stage
        if isinstance(event, events.PrebuildProblem) and event.kind == "task":
            stage.unverified.append(printable(f"{', '.join(event.what)}: {event.why}"))
        elif isinstance(event, events.PrebuildProblem) and event.kind == "modules":
            stage.modules_missing.append(printable(f"{', '.join(event.what)}: {event.why}".lstrip(": ")))
        elif isinstance(event, events.ModulesPrebuilt):
            stage.modules += event.found
        elif isinstance(event, events.PrebuildProblem):
            what = ", ".join(event.what[:2]) + (f" and {len(event.what) - 2} more" if len(event.what) > 2 else "")
            stage.problems.append(printable(f"{what}: {event.why}" if what else event.why))
        elif isinstance(event, events.KernelsPrebuilt):
            stage.made += event.made
            stage.present += event.present
            stage.made_bytes += event.bytes
            stage.missing += event.missing
            stage.workers = max(stage.workers, event.workers)
            stage.worker_bytes = max(stage.worker_bytes, event.worker_bytes)
            stage.cpu_seconds = round(stage.cpu_seconds + event.cpu_seconds, 1)
            stage.import_seconds = round(stage.import_seconds + event.import_seconds, 1)
            stage.paused = round(stage.paused + event.paused, 1)
            stage.keys = sorted({*stage.keys, event.key})
        elif isinstance(event, events.Phase):
            self._context.console.say(f"  {printable(event.phase)}")


def _is_walked(task: Task) -> bool:
    """Return whether sglang's own model code has to find the task's shapes."""
    return RECIPES[task.recipe].server or "config" in task.shapes_from


def _groups(items: Iterable[Item], manifest: Manifest) -> Iterator[_Group]:
    """Yield the tasks of each environment together. Where the probe found no GPU, the manifest names one."""
    found: dict[tuple[ProbeEnv, str], list[Item]] = {}
    for item in items:
        key = toolchain.family_key(item.record, "deep_gemm")
        found.setdefault((tuple(sorted(item.task.env.items())), key), []).append(item)
    for (env, key), members in found.items():
        record = members[0].record
        try:
            gpu = toolchain.gpu_of(record) if record["gpus"] else GPUS[simulated_name(manifest)]
        except ValueError as error:
            raise BuilderError(str(error)) from None
        yield _Group(dict(env), gpu, key, tuple(members))


# --- for people ------------------------------------------------------------------------------------------------------


def _report(executor: Executor, stage: Stage) -> None:
    say, warnings = executor.context.console.say, executor.context.report.warnings
    if stage.state == "off":
        return
    if stage.state == "unfit":
        say(f"prebuild: not run: {stage.reason}")
        return
    text = f"prebuild: {counted(stage.named, 'kernel')} named, {stage.present} there, {stage.made} made"
    if stage.made:
        text += f" ({size(stage.made_bytes)}) by {counted(stage.workers, 'worker')} of {size(stage.worker_bytes)}"
    text += f" in {span(stage.seconds)}"
    if stage.keys:
        text += f", key {', '.join(stage.keys)}"
    say(text)
    if stage.modules:
        say(f"prebuild: {counted(stage.modules, 'module')} of sglang's own JIT")
    warnings += [f"prebuild: {text}" for text in (*stage.unverified, *stage.modules_missing)]
    for problem in stage.problems[:_SHOWN]:
        warnings.append(f"prebuild: {problem}")
    if len(stage.problems) > _SHOWN:
        warnings.append(f"prebuild: {len(stage.problems) - _SHOWN} more problems; see prebuild in --json")
