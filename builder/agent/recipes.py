"""How the recipes of `task.RECIPES` run: how a task's kernels are compiled, and what is evidence of it.

PASSES has the first and the second pass of each. A pass raises Failed or Partial with the reason. The log texts are
those of sglang 0.5.11 to 0.5.23 and of sgl-deep-gemm 0.1.0 to 0.2.5.
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
from builder.agent.pass_context import Partial, PassContext, model_argv
from builder.agent.process import Failed
from builder.task import Shape, Task

SETTLE_SECONDS = 120.0  # compile_deep_gemm sleeps 10 s after its success line and waits 60 s for its server
STEADY_ROUNDS = 8
COMPILED = "DeepGEMM Kernels compilation finished successfully."


def _row(text: str, name: str = "", *, pattern: str = "", shared: str = "") -> Row:
    expression = re.compile((pattern or re.escape(text)).encode())
    return Row((shared or text).encode(), expression, name or text.rstrip(": ("))


#: Lines after which a task cannot succeed, unless its evidence came before: teardown prints some of them, too.
#: "Health check failed. Server couldn't get a response from detokenizer" is a symptom, and not among them.
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
class Passes:
    """The two passes of a recipe."""

    first: Callable[[PassContext], Watch]  # returns the watch that read its log
    second: Callable[[PassContext, Watch], str]  # asks for the same work again; returns why it proves less, or ""
    resumable: bool = False  # the first pass names shapes; those cut short for memory can be compiled by the pool
    steady: bool = False  # the first pass ends when nothing is compiled any more: verify = "steady" accepts that


def _watch(evidence: str | None = None, *, pool: bool = False) -> Watch:
    pattern = None if evidence is None else re.compile(evidence.encode(), re.MULTILINE)
    # A crash of one worker does not end the shape pool: another one continues, and the last line names what is missing.
    crashes = () if pool else CRASHES
    return Watch(crashes=crashes, phases=PHASES, progress=PROGRESS, evidence=pattern, pool=pool)


# --- compile-deep-gemm, command --------------------------------------------------------------------------------------


def compile_deep_gemm(context: PassContext) -> Watch:
    """Run sglang's own compile script: it starts a server with its weights and sends one request."""
    watch = _watch(re.escape(COMPILED))
    with context.child(model_argv(context.task, "sglang.compile_deep_gemm"), watch) as child:
        if not child.wait(lambda: watch.succeeded):
            raise Failed(child.describe_end(f" without the line {COMPILED!r}"))
        child.wait_ended(SETTLE_SECONDS)
    return watch


def command(context: PassContext) -> Watch:
    """Run the task's argv. It succeeds with exit status 0, and the declared line where one is declared."""
    task = context.task
    if not task.argv:
        raise Failed("the task has no command")
    try:
        watch = _watch(task.success)
    except re.error as error:
        raise Failed(f"success is no regular expression: {error}") from None
    with context.child(task.argv, watch) as child:
        child.wait_ended()
        if child.status:
            raise Failed(child.describe_end())
        if task.success is not None and not watch.succeeded:
            raise Failed(f"exit status 0, but no line matched {task.success!r}")
    return watch


def _command_again(context: PassContext, _first: Watch) -> str:
    command(context)
    return ""


# --- serve -----------------------------------------------------------------------------------------------------------


def serve(context: PassContext) -> Watch:
    """Start a server and send requests until they compile nothing new."""
    from builder.agent.server import Server, generate_until_steady  # HTTP: a quarter of all modules of this program

    watch = _watch()
    with Server(context, watch) as (child, client):
        generate_until_steady(context, child, client, STEADY_ROUNDS)
        watch.succeeded = True
    return watch


def _serve_again(context: PassContext, _first: Watch) -> str:
    from builder.agent.server import Server, generate

    watch = _watch()
    with Server(context, watch) as (child, client):
        generate(context, child, client, 0)
        watch.succeeded = True
    return ""


# --- shapes ----------------------------------------------------------------------------------------------------------


def shapes(context: PassContext) -> Watch:
    """Run sglang's DeepGEMM warm-up for the task's shapes, without a server."""
    if not context.task.shapes:
        raise Failed("the task names no shapes")
    watch = compile_shapes(context, context.task.shapes, None, workers=worker_count(context.task))
    if watch.reduced:
        raise Partial("memory is too small for all Ms of a shape, though no weights are loaded: sglang reduced max_m")
    return watch


def worker_count(task: Task) -> int:
    """Return the number of workers for a task's shapes: one per GPU; without GPUs one per CPU core of this process."""
    return task.workers or task.gpus or len(os.sched_getaffinity(0))


def _devices(context: PassContext) -> list[str]:
    """Return a value of CUDA_VISIBLE_DEVICES for each worker; none if the task has no GPUs."""
    given = context.env.get("CUDA_VISIBLE_DEVICES")
    own = given.split(",") if given else [str(index) for index in range(context.task.gpus)]
    return own[: context.task.gpus]


def compile_shapes(
    context: PassContext, wanted: Sequence[Shape], chunked_prefill_size: int | None, *, workers: int = 1
) -> Watch:
    """Compile every shape over sglang's own list of Ms. Raises Partial if some shapes failed, Failed if none was done.

    chunked_prefill_size: of the server that asks for these shapes; None: as the task's argv sets it.
    """
    task = context.task
    size = (
        sglang_args.chunked_prefill_size(task.argv, context.chunked_prefill_size)
        if chunked_prefill_size is None
        else chunked_prefill_size
    )
    request = {
        "shapes": [[shape.kernel, shape.n, shape.k, shape.groups] for shape in wanted],
        "m_values": list(task.m_values),
        "chunked_prefill_size": size,
        "workers": workers,
        "devices": _devices(context),
        "imported": context.imported.socket(),
    }
    watch = _watch(r"^warm-cache shapes: all \d+ shapes done", pool=True)
    script = Path(__file__).with_name("shape_pool.py")
    with context.child(["python3", str(script), json.dumps(request, separators=(",", ":"))], watch) as child:
        child.wait_ended()
        if child.status == 0 and watch.succeeded:
            return watch
        failed = f" (first: {watch.failed_shapes[0]})" if watch.failed_shapes else f"; {child.describe_end()}"
        reason = f"{len(watch.finished_shapes)} of {len(wanted)} shapes done{failed}"
    raise Partial(reason) if watch.finished_shapes else Failed(reason)


def finish_shapes(context: PassContext, first: Watch) -> None:
    """Compile, without server and weights, the Ms that memory cut short. Raises Partial if memory cuts them again."""
    workers = worker_count(context.task)
    try:
        watch = compile_shapes(context, list(first.shapes), first.chunked_prefill_size, workers=workers)
    except Failed as failed:
        raise Partial(f"sglang reduced max_m, and the rest could not be compiled: {failed}") from None
    if watch.reduced:
        raise Partial("sglang reduced max_m for lack of memory, with the weights and without them")
    done = watch.finished_shapes
    first.shapes.update({shape: count for shape, count in done.items() if shape in first.shapes})


def _shapes_again(context: PassContext, first: Watch) -> str:
    if not first.shapes:
        return "the log named no shapes that could be compiled again"
    watch = compile_shapes(context, list(first.shapes), first.chunked_prefill_size)
    if watch.reduced:
        return "the second pass reduced max_m for lack of memory"
    for shape, total in first.shapes.items():
        again = watch.finished_shapes.get(shape, 0)
        # sglang drops unaligned Ms of the contiguous kinds only after it made the list, so their totals differ.
        if total and not shape.kernel.endswith("_CONTIG") and again != total:
            return f"the first pass went over {total} Ms of {shape}, the second over {again}"
    return ""


PASSES: dict[str, Passes] = {
    "compile-deep-gemm": Passes(first=compile_deep_gemm, second=_shapes_again, resumable=True),
    "serve": Passes(first=serve, second=_serve_again, steady=True),
    "shapes": Passes(first=shapes, second=_shapes_again),
    "command": Passes(first=command, second=_command_again),
}
