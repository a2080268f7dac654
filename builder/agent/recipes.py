"""How a task makes its kernels compile, and what counts as proof that they did.

A recipe is a row of RECIPES: how its first pass runs, how its second one does, and what it needs. A pass returns the
Watch that read its log, or raises Failed or Partial with the reason. The texts are those of sglang 0.5.11 to 0.5.23 and
of sgl-deep-gemm 0.1.0 to 0.2.5.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder import sglang_args
from builder.agent.log_watch import Row, Watch
from builder.agent.pass_context import Partial, Setting, model_argv
from builder.agent.process import Failed
from builder.agent.server import Server, ask_all, until_steady
from builder.task import Shape, Task

SETTLE_SECONDS = 120.0  # compile_deep_gemm sleeps 10 s after its success line and waits 60 s for its server
CHUNKED_PREFILL_SIZE = 8192  # sglang's default on an H200
STEADY_ROUNDS = 8
COMPILED = "DeepGEMM Kernels compilation finished successfully."


def _row(text: str, name: str = "", *, pattern: str = "", shared: str = "") -> Row:
    expression = re.compile((pattern or re.escape(text)).encode())
    return Row((shared or text).encode(), expression, name or text.rstrip(": ("))


#: Lines after which nothing good comes, until a recipe has its evidence: teardown prints some of them.
#: "Health check failed. Server couldn't get a response from detokenizer" is a symptom and not among them.
CRASHES: tuple[Row, ...] = (
    _row("Scheduler hit an exception: ", shared=" hit an exception:"),
    _row("TokenizerManager hit an exception:", shared=" hit an exception:"),
    _row("Received sigquit from a child process. It usually means the child failed."),
    _row(
        "SIGQUIT received. signum=",
        "SIGQUIT received",
        pattern=r"SIGQUIT received\. signum=.*It usually means one child failed\.",
    ),
    _row(
        " scheduler died during initialization",
        "scheduler died during initialization",
        pattern=r"Rank \S+ scheduler died during initialization \(exit code",
    ),
    _row(" crashed with exit code ", "subprocess crashed", pattern=r"Subprocess .{0,200}? crashed with exit code "),
    _row("Initialization failed. warmup error: "),
    _row("watchdog timeout ("),
    _row("DeepGEMM Kernels compilation timeout."),
    _row("NVCC compilation failed:", shared="NVCC "),
    _row("Corrupted JIT cache directory (missing kernel.cu or kernel.cubin)"),
    _row("missing CUDA CUBIN: "),
    _row("NVCC did not produce a valid CUBIN: ", shared="NVCC "),
    _row("NVCC version must be at least 12.9", shared="NVCC "),
)

PHASES: tuple[Row, ...] = (
    _row("Load weight begin", "loading weights"),
    _row("Load weight end", "weights loaded"),
    _row("Running warmup ", "warming up"),
    _row("Entering DeepGEMM JIT Pre-Compile session", "DeepGEMM"),
    _row("raph begin", "capturing CUDA graphs", pattern=r"Capture .{0,80}?(?:cuda|CUDA) graph begin"),
    _row("Warmup ended", "warm-up ended"),
    _row("The server is fired up and ready to roll!", "ready"),
)

PROGRESS: tuple[Row, ...] = (
    _row("checkpoint shards:", "shards", pattern=r"checkpoint shards:[^\n]*?\|\s*(?P<done>\d+)/(?P<total>\d+)"),
)


@dataclass(frozen=True)
class Recipe:
    """first: the first pass. second: asks for the same again and returns a doubt ("" when there is none).

    needs_model: reads the model's config.json, and its checkpoint unless the weights are dummies. requires: families
    that must hold an entry that this task used, and the only ones it claims; empty means that it claims whatever
    holds valid entries. sweeps: its first pass names shapes, and what it cut short can be finished by a sweep.
    steady: its first pass goes on until nothing is compiled any more, so a task may settle for that.
    """

    first: Callable[[Setting], Watch]
    second: Callable[[Setting, Watch], str]
    needs_model: bool = False
    requires: tuple[str, ...] = ()
    sweeps: bool = False
    steady: bool = False


def _watch(evidence: str | None = None, *, sweeping: bool = False) -> Watch:
    pattern = None if evidence is None else re.compile(evidence.encode(), re.MULTILINE)
    # What kills a worker of a sweep is no end of the sweep: another one goes on, and the end says what is missing.
    crashes = () if sweeping else CRASHES
    return Watch(crashes=crashes, phases=PHASES, progress=PROGRESS, evidence=pattern, sweeping=sweeping)


def compile_deep_gemm(setting: Setting) -> Watch:
    """sglang's own compile script: a server, its weights, one request."""
    watch = _watch(re.escape(COMPILED))
    with setting.child(model_argv(setting.task, "sglang.compile_deep_gemm"), watch) as child:
        if not child.wait(lambda: watch.succeeded):
            raise Failed(child.describe_end(f" without the line {COMPILED!r}"))
        child.wait(lambda: child.ended, SETTLE_SECONDS)
    return watch


def command(setting: Setting) -> Watch:
    """Any argv. Exit status 0, and the declared line where one is declared."""
    task = setting.task
    if not task.argv:
        raise Failed("the task has no command")
    try:
        watch = _watch(task.success)
    except re.error as error:
        raise Failed(f"success is no regular expression: {error}") from None
    with setting.child(task.argv, watch) as child:
        child.wait(lambda: child.ended)
        if child.status:
            raise Failed(child.describe_end())
        if task.success is not None and not watch.succeeded:
            raise Failed(f"exit status 0, but no line matched {task.success!r}")
    return watch


def serve(setting: Setting) -> Watch:
    """A server, its health, requests until they compile nothing new."""
    watch = _watch()
    with Server(setting, watch) as (child, client):
        until_steady(setting, child, client, STEADY_ROUNDS)
        watch.succeeded = True
    return watch


def shapes(setting: Setting) -> Watch:
    """sglang's DeepGEMM warm-up for the task's shapes, without a server."""
    if not setting.task.shapes:
        raise Failed("the task names no shapes")
    watch = sweep(setting, setting.task.shapes, None, workers=crew(setting.task))
    if watch.reduced:
        raise Partial("memory is too small for all Ms of a shape, though no weights are loaded: sglang reduced max_m")
    return watch


def crew(task: Task) -> int:
    """How many workers go over a task's shapes: one per GPU; without GPUs one per CPU core that there is for us."""
    return task.workers or task.gpus or len(os.sched_getaffinity(0))


def _devices(setting: Setting) -> list[str]:
    """A value of CUDA_VISIBLE_DEVICES for each worker; none where the task has no GPU of its own."""
    given = setting.env.get("CUDA_VISIBLE_DEVICES")
    own = given.split(",") if given else [str(index) for index in range(setting.task.gpus)]
    return own[: setting.task.gpus]


def sweep(setting: Setting, wanted: Sequence[Shape], chunked_prefill_size: int | None, *, workers: int = 1) -> Watch:
    """Every shape over sglang's own list of Ms. Raises Partial when some shapes failed, Failed when none was done."""
    task = setting.task
    size = (
        sglang_args.chunked_prefill_size(task.argv, CHUNKED_PREFILL_SIZE)
        if chunked_prefill_size is None
        else chunked_prefill_size
    )
    order = {
        "shapes": [[shape.kernel, shape.n, shape.k, shape.groups] for shape in wanted],
        "m_values": list(task.m_values),
        "chunked_prefill_size": size,
        "workers": workers,
        "devices": _devices(setting),
    }
    watch = _watch(r"^warm-cache shapes: all \d+ shapes done", sweeping=True)
    script = Path(__file__).with_name("shape_pool.py")
    with setting.child(["python3", str(script), json.dumps(order, separators=(",", ":"))], watch) as child:
        child.wait(lambda: child.ended)
        if child.status == 0 and watch.succeeded:
            return watch
        failed = f" (first: {watch.failed_shapes[0]})" if watch.failed_shapes else f"; {child.describe_end()}"
        reason = f"{len(watch.swept)} of {len(wanted)} shapes done{failed}"
    raise Partial(reason) if watch.swept else Failed(reason)


def finish(setting: Setting, first: Watch) -> None:
    """Finishes without server and weights what memory cut short. Raises Partial if that is cut short as well."""
    try:
        watch = sweep(setting, list(first.shapes), first.chunked_prefill_size, workers=crew(setting.task))
    except Failed as failed:
        raise Partial(f"sglang reduced max_m, and the rest could not be gone over: {failed}") from None
    if watch.reduced:
        raise Partial("sglang reduced max_m for lack of memory, with the weights and without them")
    first.shapes.update({shape: count for shape, count in watch.swept.items() if shape in first.shapes})


def _sweep_again(setting: Setting, first: Watch) -> str:
    if not first.shapes:
        return "the log named no shapes that could be swept again"
    watch = sweep(setting, list(first.shapes), first.chunked_prefill_size)
    if watch.reduced:
        return "the second pass reduced max_m for lack of memory"
    for shape, total in first.shapes.items():
        swept = watch.swept.get(shape, 0)
        # sglang drops unaligned Ms of the contiguous kinds only after the list was made, so their totals differ.
        if total and not shape.kernel.endswith("_CONTIG") and swept != total:
            return f"the first pass went over {total} Ms of {shape}, the second over {swept}"
    return ""


def _command_again(setting: Setting, _first: Watch) -> str:
    command(setting)
    return ""


def _serve_again(setting: Setting, _first: Watch) -> str:
    watch = _watch()
    with Server(setting, watch) as (child, client):
        ask_all(setting, child, client, 0)
        watch.succeeded = True
    return ""


RECIPES: dict[str, Recipe] = {
    "compile-deep-gemm": Recipe(
        first=compile_deep_gemm,
        second=_sweep_again,
        needs_model=True,
        requires=("deep_gemm",),
        sweeps=True,
    ),
    "serve": Recipe(first=serve, second=_serve_again, needs_model=True, steady=True),
    "shapes": Recipe(first=shapes, second=_sweep_again, requires=("deep_gemm",)),
    "command": Recipe(first=command, second=_command_again),
}
