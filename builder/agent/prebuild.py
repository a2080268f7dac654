"""Modes ``plan`` and ``prebuild``: kernels named, and compiled over all CPU cores, on a simulated GPU.

Neither writes a marker: what is compiled here is hit by the tasks that run on GPUs, which prove it as ever. A wrong
prebuild costs time and never a claim.

`prebuild_forks` does the work in one child process, which imports sglang once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from builder import events, processes, sglang_args
from builder.agent import model_shapes, prebuild_modules, probe, simulated_gpu
from builder.agent.guard import SCRATCH, Guard
from builder.agent.output import Output
from builder.agent.prebuild_forks import Kernel, ModelWalk, Sweep, WorkerRequest
from builder.agent.progress import LOG_SECONDS
from builder.beneath import Tree
from builder.cache import families, history, inventory, layout, model_store, toolchain
from builder.cache.families import FAMILY
from builder.events import FAILED, WARMED
from builder.job import Job, PrebuildRequest
from builder.task import Shape, Task
from builder.text import counted

#: nvcc's name of a compute capability: "a" has the instructions of that generation alone, which DeepGEMM uses.
ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a"}

_ROOT = str(Path(__file__).resolve().parents[2])
#: The child, with this package last on its path: nothing of it may hide a module of the image.
_START = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv[1]]; "
    "from builder.agent import prebuild_forks; sys.exit(prebuild_forks.main(sys.argv[2]))"
)
_READ = 1 << 16
_CHOICES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
#: Seconds for the child to end after its last answer.
_END = 10.0


class _Unable(Exception):
    """Nothing can be prebuilt here. The message is the reason."""


def plan(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``plan``: name the kernels of the request's shapes and models. Returns the exit status."""
    return _guarded(job, output, lambda request, place: _plan(job, request, place, output, guard))


def prebuild(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``prebuild``: compile the kernels that the request names and the cache lacks. Returns the exit status."""
    return _guarded(job, output, lambda request, place: _prebuild(job, request, place, output, guard))


def shapes_by_sglang(
    task: Task,
    record: toolchain.Record,
    environ: Mapping[str, str],
    workdir: str,
    output: Output,
    guard: Guard,
) -> tuple[Shape, ...]:
    """Return the shapes that sglang's own model code asks for with the task's model and argv.

    record: of this environment; its GPU is simulated for the walk. Raises NotUnderstood, if anything was not walked.
    """
    place = tempfile.mkdtemp(prefix=SCRATCH)
    try:
        gpu = toolchain.gpu_of(record)
        simulated = simulated_gpu.environment(_without_gpus(environ), place, gpu)
        argv = _server_argv(task.model, task.revision, task.argv)
        asked = WorkerRequest("walk", -1, place, 1, models=[ModelWalk(task.label, argv, [])])
        for answer in _answers(asked, simulated, PrebuildRequest(gpu=gpu), workdir, output, guard):
            if "walked" in answer:
                return tuple(Shape(*each["problem"]) for each in answer["sweeps"])
            if "unwalked" in answer:
                raise model_shapes.NotUnderstood(answer["why"])
        raise model_shapes.NotUnderstood("the walk gave no answer")
    except (_Unable, simulated_gpu.Impossible, ValueError) as why:
        raise model_shapes.NotUnderstood(str(why)) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _without_gpus(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that choose among real GPUs."""
    return {name: value for name, value in environ.items() if name not in _CHOICES}


def _guarded(job: Job, output: Output, work: Any) -> int:
    request = job.prebuild
    if request is None:
        output.say(f"mode {job.mode} needs a request")
        return FAILED
    place = tempfile.mkdtemp(prefix=SCRATCH)
    try:
        work(request, place)
    except (_Unable, simulated_gpu.Impossible, layout.LayoutError) as why:
        output.event(events.PrebuildProblem((), "all", str(why)))
        output.say(str(why))
        return FAILED
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return WARMED


def _environment(job: Job, request: PrebuildRequest, place: str) -> dict[str, str]:
    """Return the environment of the child: the task's, with the simulated GPU alone."""
    task = job.task
    environ = {**os.environ, **({} if task is None else task.env)}
    environ = simulated_gpu.environment(_without_gpus(environ), place, request.gpu)
    return {**model_store.defaults(environ, place), **environ}


# --- plan ------------------------------------------------------------------------------------------------------------


def _plan(job: Job, request: PrebuildRequest, place: str, output: Output, guard: Guard) -> None:
    environ = _environment(job, request, place)
    sweeps = [
        Sweep(
            _problem(each.shape),
            list(each.m_values),
            each.chunked_prefill_size or request.gpu.chunked_prefill_size,
            each.every,
        )
        for each in request.shapes
    ]
    walks = [
        ModelWalk(task.label, _server_argv(task.model, task.revision, task.argv), list(task.m_values))
        for task in request.models
    ]
    architecture = ARCHITECTURES.get(request.gpu.capability)
    if architecture is None:
        raise _Unable(f"DeepGEMM has no kernels for a GPU of capability {'.'.join(map(str, request.gpu.capability))}")
    nvcc = _nvcc(environ)
    asked = WorkerRequest(
        "plan", -1, place, _workers(request), nvcc=nvcc, architecture=architecture, sweeps=sweeps, models=walks
    )
    output.event(events.Phase("plan pass: importing sglang"))
    fallen_back: list[Sweep] = []
    for answer in _answers(asked, environ, request, job.workdir, output, guard):
        if "imported" in answer:
            output.event(events.Phase("plan pass: naming kernels"))
        elif "planned" in answer:
            _report_planned(answer, output)
        elif "unplanned" in answer:
            _report_unplanned(answer, output)
        elif "walked" in answer:
            shapes = tuple(str(Shape(*each["problem"])) for each in answer["sweeps"])
            output.event(events.ModelWalked(answer["walked"], "sglang", shapes, modules=tuple(answer["modules"])))
        elif "unwalked" in answer:
            fallen_back += _from_table(answer, request, environ, output)
    if fallen_back:
        again = replace(asked, sweeps=fallen_back, models=[])
        shutil.rmtree(f"{place}/bin", ignore_errors=True)
        for answer in _answers(again, environ, request, job.workdir, output, guard):
            if "planned" in answer:
                _report_planned(answer, output)
            elif "unplanned" in answer:
                _report_unplanned(answer, output)


def _report_planned(answer: Mapping[str, Any], output: Output) -> None:
    by_m: dict[int, list[str]] = {}
    for name, m in answer["kernels"]:
        by_m.setdefault(m, []).append(name)
    sweep = answer["planned"]
    kernels = tuple((m, tuple(names)) for m, names in by_m.items())
    shape = str(Shape(*sweep["problem"]))
    output.event(events.KernelsPlanned(shape, tuple(sweep["m_values"]), sweep["chunked_prefill_size"], kernels))


def _report_unplanned(answer: Mapping[str, Any], output: Output) -> None:
    shape = str(Shape(*answer["unplanned"]["problem"]))
    output.event(events.PrebuildProblem((shape,), "shape", answer["why"]))


def _from_table(
    answer: Mapping[str, Any], request: PrebuildRequest, environ: Mapping[str, str], output: Output
) -> list[Sweep]:
    """Return the sweeps of a model by our table; none where the table does not have it."""
    task = next(each for each in request.models if each.label == answer["unwalked"])
    try:
        config = model_store.config(task, environ)
        if config is None:
            raise model_shapes.NotUnderstood(f"the config.json of {task.model} cannot be read")
        found = model_shapes.of_config(config, task.argv, {**environ, **task.env})
    except model_shapes.NotUnderstood as why:
        output.event(events.PrebuildProblem((task.label,), "task", f"shapes unverified: {answer['why']}; {why}"))
        return []
    output.event(events.ModelWalked(task.label, "table", tuple(map(str, found)), answer["why"]))
    size = sglang_args.chunked_prefill_size(task.argv, request.gpu.chunked_prefill_size)
    return [Sweep(_problem(shape), list(task.m_values), size) for shape in found]


def _problem(shape: Shape) -> tuple[str, int, int, int]:
    return shape.kernel, shape.n, shape.k, shape.groups


def _server_argv(model: str, revision: str | None, argv: Sequence[str]) -> list[str]:
    return ["--model-path", model, *([] if revision is None else ["--revision", revision]), *argv]


def _nvcc(environ: Mapping[str, str]) -> str:
    """Return the compiler that DeepGEMM would use. Raises _Unable."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    found = [environ.get("DG_JIT_NVCC_COMPILER"), f"{home}/bin/nvcc" if home else None]
    for path in (*found, shutil.which("nvcc", path=environ.get("PATH")), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            return str(path)
    raise _Unable("this image has no nvcc")


# --- prebuild --------------------------------------------------------------------------------------------------------


def _prebuild(job: Job, request: PrebuildRequest, place: str, output: Output, guard: Guard) -> None:
    root = Path(job.mount)
    environ = _environment(job, request, place)
    record = probe.probe(environ=environ, mount=job.mount, image=job.image)
    key = toolchain.family_key(record, "deep_gemm")
    if request.key and key != request.key:
        raise _Unable(
            f"kernels made here would be unused: deep_gemm's key is {key} on the simulated GPU, "
            f"and {request.key} where the tasks run"
        )
    layout.prepare(root)
    layout.describe_family(root, "deep_gemm", key, toolchain.family_factors(record, "deep_gemm"))
    lock = guard.acquire(layout.family_lock(root, "deep_gemm", key), exclusive=False)
    try:
        if request.shapes:
            _compile(job, request, place, key, environ, output, guard)
    finally:
        os.close(lock)
    if request.modules:

        def ask(asked: WorkerRequest, environ: Mapping[str, str]) -> Iterator[dict[str, Any]]:
            return _answers(asked, environ, request, job.workdir, output, guard)

        prebuild_modules.prebuild(root, place, request, _workers(request), record, environ, ask, output, guard)


def _compile(
    job: Job, request: PrebuildRequest, place: str, key: str, environ: Mapping[str, str], output: Output, guard: Guard
) -> None:
    family, began = FAMILY["deep_gemm"], time.monotonic()
    directory = Tree(job.mount, f"deep_gemm/{key}")
    quarantine = layout.quarantine(Path(job.mount), "deep_gemm", key)
    moved = inventory.sweep(family, directory, quarantine, now=time.time(), older_than=inventory.IN_PROGRESS)
    for path, why, stays in moved:
        if stays:
            output.event(events.Kept("deep_gemm", key, path, f"{why}; {stays}"))
        else:
            output.event(events.Quarantined("deep_gemm", key, path, why))

    def is_there(name: str) -> bool:
        return inventory.check(family, directory, f"cache/{name}") is None

    wanted = {name for shape in request.shapes for _, names in shape.kernels for name in names}
    missing = {name for name in wanted if not is_there(name)}
    present = len(wanted) - len(missing)
    kernels, named = [], set(missing)
    for shape in request.shapes:
        for m, names in shape.kernels:
            new = [name for name in names if name in named]
            named -= set(new)
            if new:
                kernels.append(Kernel(_problem(shape.shape), m, new))
    # The longest first, so that none is left at the end: kernels of groups take most.
    kernels.sort(key=lambda kernel: (kernel.problem[3], kernel.problem[1] * kernel.problem[2]), reverse=True)
    summary: dict[str, Any] = {}
    imported = 0.0
    if kernels:
        asked = WorkerRequest(
            "compile",
            -1,
            place,
            min(_workers(request), len(kernels)),
            cache=str(directory.path),
            kernels=kernels,
            memory=request.memory or 0,
        )
        environ = {**environ, **families.environment(job.mount, {"deep_gemm": key})}
        output.event(events.Phase("prebuild: importing sglang"))
        done, shown = 0, 0.0
        try:
            for answer in _answers(asked, environ, request, job.workdir, output, guard):
                if "imported" in answer:
                    imported = answer["imported"]
                    output.event(events.Phase(f"prebuild: {counted(len(missing), 'kernel')}"))
                elif "failed" in answer:
                    names = kernels[answer["failed"]].names
                    output.event(events.PrebuildProblem(tuple(names), "entries", answer["why"]))
                elif "done" in answer:
                    done += len(kernels[answer["done"]].names)
                    if done == len(missing) or time.monotonic() - shown >= LOG_SECONDS:
                        shown = time.monotonic()
                        output.event(events.Progress(done, len(missing), "kernels"))
                elif "finished" in answer:
                    summary = answer
        except _Unable as why:  # what is finished stays, and the rest is named below
            output.event(events.PrebuildProblem((), "all", str(why)))
    still = tuple(sorted(name for name in wanted if not is_there(name)))
    made = missing - set(still)
    finished = events.KernelsPrebuilt(
        key,
        len(made),
        present,
        still,
        sum(inventory.weigh(family, directory, f"cache/{name}") for name in made),
        summary.get("workers", 0),
        summary.get("worker_bytes", 0),
        summary.get("cpu_seconds", 0.0),
        imported,
        summary.get("paused", 0.0),
    )
    output.event(finished)
    history.add_prebuild(Path(job.mount), job, finished, time.monotonic() - began)


# --- the child -------------------------------------------------------------------------------------------------------


def _workers(request: PrebuildRequest) -> int:
    cpus = len(request.cpus) or len(os.sched_getaffinity(0))
    return min(request.workers, cpus) if request.workers else cpus


def _answers(
    asked: WorkerRequest,
    environ: Mapping[str, str],
    request: PrebuildRequest,
    workdir: str,
    output: Output,
    guard: Guard,
) -> Iterator[dict[str, Any]]:
    """Run the child, and yield its answers while it works. Raises _Unable if it fails, or can do nothing."""
    reader, writer = os.pipe()
    log = Path(asked.scratch, "sglang.log")
    limits = {"report": writer, "cpus": list(request.cpus), "gentle": request.gentle}
    document = json.dumps(asdict(asked) | limits)
    try:
        with log.open("ab") as file:
            source = Path(asked.scratch, f"{asked.mode}.json")  # Linux limits the length of an argument
            source.write_text(document, encoding="ascii")
            process = subprocess.Popen(
                ["python3", "-c", _START, _ROOT, str(source)],
                env=dict(environ),
                cwd=workdir,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                start_new_session=True,
            )
    except OSError as error:
        os.close(reader)
        raise _Unable(f"python3 cannot be started: {error.strerror}") from None
    finally:
        os.close(writer)
    held, finished = b"", False
    try:
        while not finished:
            guard.check()
            if not select.select([reader], [], [], 0.2)[0]:
                continue
            data = os.read(reader, _READ)
            finished = not data
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if "unable" in answer:
                    raise _Unable(answer["unable"])
                yield answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END)
    finally:
        os.close(reader)
        if process.poll() is None:
            processes.end_group(process, 1.0)
        processes.kill_descendants(spare=(process.pid,))
    status = process.wait()
    if status:
        for text in log.read_bytes()[-4096:].decode("utf-8", "replace").splitlines()[-20:]:
            output.say(text)
        raise _Unable(f"the process that compiles ended with {processes.describe_status(status)}")
