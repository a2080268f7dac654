"""The process that imports sglang once, and forks what names or compiles the kernels of DeepGEMM shapes.

It runs in the serving image's python, as a child of the in-container program (`prebuild`), on a simulated GPU only:
importing sglang asks for the GPU, and a real driver does not survive a fork. Its argument is a `WorkerRequest` as JSON.
It answers by JSON lines on a separate descriptor; stdout and stderr are sglang's.

`prebuild_plan` names kernels, `prebuild_pool` compiles them. Both leave out sglang's lock for a shape: one worker would
wait for another, and DeepGEMM publishes each entry by a rename.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.agent.shape_worker import alignment, builtin_m_list
from builder.task import PRETEND_VARIABLE

#: Characters of a reason.
_REASON = 300
#: OOM scores: of workers with their compilers (their kernel can be tried again), and of the process that forks them.
_FIRST, _FIRST_BUT_ITS_WORKERS = 1000, 500

#: Kernel type, N, K, groups.
Problem = tuple[str, int, int, int]


@dataclass(frozen=True)
class Sweep:
    """A shape and the Ms to compile it for. m_values: empty for sglang's own, made from chunked_prefill_size.

    every: each M up to chunked_prefill_size, whatever sglang's list leaves out.
    """

    problem: Problem
    m_values: list[int]
    chunked_prefill_size: int
    every: bool = False


@dataclass(frozen=True)
class ModelWalk:
    """A model to walk for its shapes. argv: of a server. m_values: as in `Sweep`."""

    label: str
    argv: list[str]
    m_values: list[int]


@dataclass(frozen=True)
class Kernel:
    """One M of a shape, and the names of the entries that compiling it makes."""

    problem: Problem
    m: int
    names: list[str]


@dataclass(frozen=True)
class WorkerRequest:
    """The argument. memory: bytes for all workers together, 0 for what is available.

    scratch: a folder for this process alone. cache: the family's directory. architecture: as nvcc names it.
    modules: arguments of sglang's ``load_jit``, positional and named ones, as JSON.
    cpus: the processors to use, empty for all. gentle: give way to whatever else runs on this machine.
    """

    mode: str  # plan, walk, compile or modules
    report: int  # descriptor for answers
    scratch: str
    workers: int
    nvcc: str = ""
    architecture: str = ""
    sweeps: list[Sweep] = field(default_factory=list)
    models: list[ModelWalk] = field(default_factory=list)
    cache: str = ""
    kernels: list[Kernel] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    memory: int = 0
    cpus: list[int] = field(default_factory=list)
    gentle: bool = False

    @classmethod
    def from_json(cls, text: str) -> WorkerRequest:
        data = json.loads(text)
        data["sweeps"] = [Sweep(**{**each, "problem": tuple(each["problem"])}) for each in data["sweeps"]]
        data["models"] = [ModelWalk(**each) for each in data["models"]]
        data["kernels"] = [Kernel(**{**each, "problem": tuple(each["problem"])}) for each in data["kernels"]]
        return cls(**data)


class Answers:
    """Writes answers, one JSON line each, to a descriptor that no child of this process inherits."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor

    def write(self, **fields: Any) -> None:
        text = json.dumps(fields).encode() + b"\n"
        while text:
            text = text[os.write(self._descriptor, text) :]


def main(file: str) -> int:
    """Do the work of the request in this file. Returns the exit status: 1 where nothing can be done here at all."""
    from builder.agent import prebuild_modules, prebuild_plan, prebuild_pool

    request = WorkerRequest.from_json(Path(file).read_text(encoding="ascii"))
    _give_way(request)
    answers = Answers(request.report)
    if not os.environ.get(PRETEND_VARIABLE):
        answers.write(unable="this forks after CUDA was used, which only a simulated GPU allows")
        return 1
    # The same two switches that sglang.compile_deep_gemm sets before it imports anything.
    os.environ["SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE"] = os.environ["SGLANG_ENABLE_JIT_DEEPGEMM"] = "1"
    begun = time.monotonic()
    try:
        compile_utils = importlib.import_module("sglang.srt.layers.deep_gemm_wrapper.compile_utils")
    except Exception as error:  # noqa: BLE001 - whatever an import raises is the reason
        answers.write(unable=f"sglang cannot be imported: {reason(error)}")
        return 1
    if not getattr(compile_utils, "ENABLE_JIT_DEEPGEMM", True):
        answers.write(
            unable="sglang finds no usable DeepGEMM here (no GPU that it supports, or the package is missing)"
        )
        return 1
    answers.write(imported=round(time.monotonic() - begun, 2))
    if request.mode == "modules":
        prebuild_modules.build(request, answers)
        return 0
    if request.mode == "compile":
        prebuild_pool.Pool(request, answers, compile_utils).run()
        return 0
    plan = prebuild_plan.PlanPass(request, answers, compile_utils)
    (plan.walk if request.mode == "walk" else plan.run)()
    return 0


def _give_way(request: WorkerRequest) -> None:
    """Set this process's place among others. What the system refuses is left to the engine's limits."""
    _set_oom_score(_FIRST_BUT_ITS_WORKERS)
    with contextlib.suppress(OSError):
        if chosen := set(request.cpus) & os.sched_getaffinity(0):
            os.sched_setaffinity(0, chosen)
        if request.gentle:
            os.nice(19)


def _set_oom_score(score: int) -> None:
    """Set how early the kernel ends this process when memory runs out (proc(5)): at 1000 before any other."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score), encoding="ascii")


def fork(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a forked child that writes its output to a file. Returns its pid; status 0: it returned."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _set_oom_score(_FIRST)
        allow_cuda()
        work()
        status = 0
    except BaseException as error:  # noqa: BLE001 - the parent finds it in the log
        os.write(2, f"{reason(error)}\n".encode("utf-8", "replace"))
    finally:
        os._exit(status)


def allow_cuda() -> None:
    """Let torch use the simulated GPU in a fork. On a real one this must not be done."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda"):
        torch._C._cuda_isInBadFork = torch.cuda._is_in_bad_fork = lambda: False  # noqa: SLF001 - no public way


def use_cache(folder: Path, nvcc: Path | None = None) -> Path:
    """Let DeepGEMM, which looks once in a process, keep entries in `folder`, made by `nvcc`. Returns their folder."""
    os.environ["DG_JIT_CACHE_DIR"] = os.environ["SGLANG_DG_CACHE_DIR"] = str(folder)
    if nvcc is not None:
        os.environ["DG_JIT_NVCC_COMPILER"] = str(nvcc)
    return folder / "cache"


def m_list(compile_utils: Any, sweep: Sweep) -> list[int]:
    """Return the Ms to compile a shape for: contiguous kinds take only multiples of sglang's alignment."""
    if sweep.every:
        found = list(range(1, sweep.chunked_prefill_size + 1))
    else:
        found = sorted(set(sweep.m_values)) or builtin_m_list(compile_utils, sweep.chunked_prefill_size)
    if sweep.problem[0].endswith("_CONTIG"):
        multiple = alignment()
        found = [m for m in found if m % multiple == 0]
    return found


def compile_one(compile_utils: Any, problem: Sequence[Any], m: int) -> str:
    """Have sglang compile one M of a shape. Returns why it failed, in one line, or ""."""
    name, n, k, groups = problem
    if name not in compile_utils.DeepGemmKernelType.__members__:
        return "this sglang knows no such kernel type"
    try:
        compile_utils._compile_deep_gemm_one_type_all(  # noqa: SLF001 - sglang has no public name for it
            kernel_type=compile_utils.DeepGemmKernelType[name], n=n, k=k, num_groups=groups, m_list=[m]
        )
    except Exception as error:  # noqa: BLE001 - the reason is an answer
        return reason(error)
    return ""


def reason(error: BaseException) -> str:
    """Return an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_REASON]


def last_lines(log: Path) -> str:
    """Return the end of a child's output in one line, without progress bars; "" where there is none."""
    with contextlib.suppress(OSError):
        text = log.read_bytes()[-4096:].decode("utf-8", "replace").replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines() if line.strip() and "DeepGEMM warmup:" not in line]
        return " ".join(" ".join(lines[-3:]).split())[-_REASON:]
    return ""


def describe_end(status: int, log: Path) -> str:
    """Return how a child ended, by its exit status (negative: a signal), and its last output."""
    how = f"its process ended with status {status}"
    if status == -signal.SIGKILL:
        how = "its process was killed, as the kernel does when memory runs out"
    elif status < 0:
        how = f"its process was ended by signal {-status}"
    return f"{how}: {last}" if (last := last_lines(log)) else how
