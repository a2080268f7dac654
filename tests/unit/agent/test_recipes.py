"""The watch of a log, the shape worker, and the tables of recipes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from builder.agent import recipes, shape_worker
from builder.agent.log_watch import Watch
from builder.agent.server import _tokens
from builder.task import RECIPES, Shape

STAMP = b"[2026-11-24 07:35:16 TP0] "

#: One line of each, as sglang 0.5.11 to 0.5.23 and sgl-deep-gemm 0.1 and 0.2 print them.
CRASH_LINES = {
    "Scheduler hit an exception": b"Scheduler hit an exception: Traceback (most recent call last):",
    "TokenizerManager hit an exception": b"TokenizerManager hit an exception: Traceback (most recent call last):",
    "Received sigquit": b"Received sigquit from a child process. It usually means the child failed.",
    "SIGQUIT received": b"SIGQUIT received. signum=3, frame=<frame at 0x7f>. It usually means one child failed.",
    "scheduler died": b"Rank 3 scheduler died during initialization (exit code: -9). If exit code is",
    "subprocess crashed": b"Subprocess detokenizer (pid=811) crashed with exit code -11. Triggering SIGQUIT for c",
    "Initialization failed": b"Initialization failed. warmup error: Traceback (most recent call last):",
    "watchdog timeout": b"Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
    "DeepGEMM Kernels compilation timeout": b"TimeoutError: DeepGEMM Kernels compilation timeout.",
    "NVCC compilation failed": b"NVCC compilation failed: error: identifier undefined",
    "Corrupted JIT cache": b"Corrupted JIT cache directory (missing kernel.cu or kernel.cubin): /jit/x, please run",
    "missing CUDA CUBIN": b"RuntimeError: missing CUDA CUBIN: /jit/deep_gemm/cache/x/kernel.cubin",
    "NVCC did not produce": b"NVCC did not produce a valid CUBIN: /jit/deep_gemm/tmp/x/kernel.cubin",
    "NVCC version": b"NVCC version must be at least 12.9, but found 12.4",
}


def watch(evidence: str | None = None) -> Watch:
    return recipes._watch(evidence)


@pytest.mark.parametrize(("name", "line"), CRASH_LINES.items(), ids=CRASH_LINES)
def test_crash_lines_are_recognised(name: str, line: bytes) -> None:
    seen = watch()
    seen.lines(b"first\n" + STAMP + line + b"\nlast\n")
    assert seen.crash is not None
    assert seen.crash.name.startswith(name)
    assert line.decode()[:60] in seen.crash.line


def test_recipes_all_have_passes() -> None:
    assert set(recipes.PASSES) == set(RECIPES)


def test_crash_rows_all_have_an_example() -> None:
    assert len(CRASH_LINES) == len(recipes.CRASHES)


@pytest.mark.parametrize(
    "line",
    [
        b"Health check failed. Server couldn't get a response from detokenizer for last 20 seconds.",
        b"Subprocess monitor started",
        b"watchdog_timeout=300",
        b"DeepGEMM Kernels compilation finished successfully.",
    ],
)
def test_crash_near_misses_are_no_crash(line: bytes) -> None:
    seen = watch()
    seen.lines(STAMP + line + b"\n")
    assert seen.crash is None


def test_crash_is_named_by_first_exception() -> None:
    seen = watch()
    seen.lines(
        STAMP
        + b'Scheduler hit an exception: Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n'
        b"torch.OutOfMemoryError: CUDA out of memory.\n" + STAMP + CRASH_LINES["Received sigquit"] + b"\n"
    )
    assert str(seen.crash) == ('crash: "Scheduler hit an exception" (torch.OutOfMemoryError: CUDA out of memory.)')


@pytest.mark.parametrize("separate", [True, False])
def test_crash_line_after_evidence_is_log(separate: bool) -> None:
    seen = watch("KERNELS READY")
    lines = [b"KERNELS READY\n", CRASH_LINES["SIGQUIT received"] + b"\n"]
    for text in lines if separate else [b"".join(lines)]:
        seen.lines(text)
    assert seen.succeeded
    assert seen.crash is None


@pytest.mark.parametrize("separate", [True, False])
def test_crash_line_before_evidence_is_crash(separate: bool) -> None:
    seen = watch("KERNELS READY")
    lines = [CRASH_LINES["SIGQUIT received"] + b"\n", b"KERNELS READY\n"]
    for text in lines if separate else [b"".join(lines)]:
        seen.lines(text)
    assert not seen.succeeded
    assert seen.crash is not None


def test_evidence_must_be_on_one_line() -> None:
    seen = watch(r"KERNELS\s+READY$")
    seen.lines(b"KERNELS\nREADY\n")
    assert not seen.succeeded
    seen.lines(b"all KERNELS  READY\r")
    assert seen.succeeded


def test_shapes_are_read_from_bars_with_carriage_returns() -> None:
    seen = watch()
    seen.lines(
        STAMP + b"Try DeepGEMM JIT Compiling for <GEMM_NT_F8F8BF16> N=4096, K=7168, num_groups=1 with all Ms. It only\n"
        b"\rDeepGEMM warmup:   0%|          | 0/2560 [00:00<?, ?it/s]"
        b"\rDeepGEMM warmup:  27%|\xe2\x96\x88\xe2\x96\x8b | 700/2560 [00:04<00:08,  4.17s/it]\n"
        + STAMP
        + b"Try DeepGEMM JIT Compiling for <GROUPED_GEMM_NT_F8F8BF16_CONTIG> N=64, K=128, num_groups=32 with all Ms.\n"
    )
    assert seen.shapes == {
        Shape("GEMM_NT_F8F8BF16", 4096, 7168, 1): 2560,
        Shape("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 64, 128, 32): 0,
    }
    assert seen.done == (700, 2560, "Ms")
    assert "64" in seen.phase


@pytest.mark.parametrize(
    "line",
    [
        b"server_args={'model_path': 'm', 'chunked_prefill_size': 1024, 'x': 1}",
        b"server_args=ServerArgs(model_path='m', chunked_prefill_size=1024, x=1)",
    ],
)
def test_chunked_prefill_size_is_read_in_both_wordings(line: bytes) -> None:
    seen = watch()
    seen.lines(STAMP + line + b"\n")
    assert seen.chunked_prefill_size == 1024


def test_reduced_max_m_is_noticed() -> None:
    seen = watch()
    seen.lines(
        STAMP
        + b"Available memory 3GB is less than required memory 9GB for warmup, reducing max_m to 2048 to avoid out\n"
    )
    assert seen.reduced


def test_log_flood_hides_no_evidence() -> None:
    noise = b"flood " * 20_000 + b"\n"
    seen = watch()
    seen.lines(
        noise
        + STAMP
        + b"Try DeepGEMM JIT Compiling for <GEMM_NT_F8F8BF16> N=1, K=2, num_groups=1 with all Ms.\n"
        + CRASH_LINES["missing CUDA CUBIN"]
        + b"\n"
        + noise * 8
    )
    assert seen.shapes
    assert seen.crash


# Server


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ('{"meta_info": {"completion_tokens": 8}}', True),
        ('[{"meta_info": {"completion_tokens": 8}}, {"meta_info": {"completion_tokens": 0}}]', False),
        ('{"meta_info": {}}', False),
        ("[]", False),
        ("null", False),
        ("<html>", False),
    ],
)
def test_server_without_tokens_of_a_rank_is_failed(answer: str, tokens: bool) -> None:
    assert _tokens(answer) is tokens


# Shape worker


def compile_utils(update: Callable[..., None]) -> Any:
    module = types.SimpleNamespace(_BUILTIN_M_LIST=[], update_deep_gemm_config=update)
    module.get_schedule = module.get_device = None
    return module


def test_m_list_of_new_sglang_signature() -> None:
    def update(gpu_id: int) -> None:
        assert module.get_device().base_gpu_id == gpu_id
        module._BUILTIN_M_LIST = [module.get_schedule().chunked_prefill_size]

    module = compile_utils(update)
    assert shape_worker.builtin_m_list(module, 4096) == [4096]


def test_m_list_of_old_sglang_signature() -> None:
    def update(gpu_id: int, server_args: Any) -> None:
        assert server_args.base_gpu_id == gpu_id
        module._BUILTIN_M_LIST = [server_args.chunked_prefill_size]

    module = compile_utils(update)
    assert shape_worker.builtin_m_list(module, 2048) == [2048]


def test_shape_sweep_of_old_sglang_takes_no_lock() -> None:
    swept: list[dict[str, Any]] = []
    module = types.SimpleNamespace(
        DeepGemmKernelType={"GEMM_NT_F8F8BF16": 5}, _compile_deep_gemm_one_type_all=lambda **what: swept.append(what)
    )
    assert shape_worker.compile_shape(module, ["GEMM_NT_F8F8BF16", 1, 2, 3], [1, 64]) == ""
    assert swept == [{"kernel_type": 5, "n": 1, "k": 2, "num_groups": 3, "m_list": [1, 64]}]


def test_failing_shape_reports_one_line() -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("nvcc is gone\nand more")

    module = types.SimpleNamespace(DeepGemmKernelType={"GEMM_NT_F8F8BF16": 5}, _compile_deep_gemm_one_type_all=fail)
    assert shape_worker.compile_shape(module, ["GEMM_NT_F8F8BF16", 1, 2, 3], [1]) == "RuntimeError: nvcc is gone"
    assert shape_worker.compile_shape(module, ["GEMM_NT_F4", 1, 2, 3], [1]) == "this sglang knows no such kernel type"
