"""Drives sglang's own DeepGEMM warm-up for one shape after another, without a server and without weights.

A script for the serving image's python, standalone on purpose: ``python3 shape_worker.py JSON`` with ``{"m_values":
[...], "chunked_prefill_size": N, "report": FD}``. It imports sglang, writes ``{"ready": [Ms, contiguous Ms]}`` to the
descriptor, then reads shapes from stdin, one ``[kernel, n, k, groups]`` a line, until that ends. For each it does what
``_maybe_compile_deep_gemm_one_type_all`` of sglang does, over the list of Ms that sglang itself makes from the chunked
prefill size (``m_values``, if given, replace it), and answers ``{"done": Ms, "seconds": S}`` or ``{"failed": reason}``.
If it can compile nothing at all it answers ``{"unable": reason}``. stdout and stderr are sglang's own.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import os
import sys
import time
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def main(document: str) -> int:
    """Compile shapes until stdin ends; a failure does not stop the others. Returns the exit status."""
    order = json.loads(document)
    os.set_inheritable(order["report"], False)  # a compiler that outlives this process must not keep it open
    return serve(load(), order, order["report"], sys.stdin)


def load() -> Any:
    """Import sglang. Returns its module that compiles."""
    # The same two switches that sglang.compile_deep_gemm sets before it imports anything.
    os.environ["SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE"] = "1"
    os.environ["SGLANG_ENABLE_JIT_DEEPGEMM"] = "1"
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    return importlib.import_module("sglang.srt.layers.deep_gemm_wrapper.compile_utils")


def serve(compile_utils: Any, order: Mapping[str, Any], report: int, orders: Iterable[str]) -> int:
    """Compile the shapes of these lines, and answer on the descriptor `report`. Returns the exit status."""
    with os.fdopen(report, "w", encoding="ascii", buffering=1) as answers:

        def answer(**fields: Any) -> None:
            answers.write(json.dumps(fields) + "\n")

        if not getattr(compile_utils, "ENABLE_JIT_DEEPGEMM", True):
            answer(unable="sglang finds no usable DeepGEMM here (no GPU that it supports, or the package is missing)")
            return 1
        m_list = sorted(set(order["m_values"])) or builtin_m_list(compile_utils, order["chunked_prefill_size"])
        multiple = alignment()
        answer(ready=[len(m_list), sum(m % multiple == 0 for m in m_list)])
        for line in orders:
            begun = time.monotonic()
            failed = compile_shape(compile_utils, json.loads(line), m_list)
            if failed:
                answer(failed=failed)
            else:
                answer(done=len(m_list), seconds=round(time.monotonic() - begun, 1))
    return 0


def alignment() -> int:
    """Return what the Ms of contiguous kinds have to be a multiple of: DeepGEMM decides by the GPU; on Hopper 128."""
    deep_gemm = importlib.import_module("deep_gemm")
    for name in ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout"):
        if hasattr(deep_gemm, name):
            return int(getattr(deep_gemm, name)())
    return 128


def builtin_m_list(compile_utils: Any, chunked_prefill_size: int) -> list[int]:
    """Return the Ms that a server with this chunked prefill size would compile.

    sglang keeps them in a module variable, filled from a running server's context (since 0.5.2x) or its arguments.
    """
    schedule = types.SimpleNamespace(chunked_prefill_size=chunked_prefill_size, base_gpu_id=0)
    compile_utils.get_schedule = lambda: schedule
    compile_utils.get_device = lambda: schedule
    fill = compile_utils.update_deep_gemm_config
    fill(*(0, schedule)[: len(inspect.signature(fill).parameters)])
    return list(compile_utils._BUILTIN_M_LIST)  # noqa: SLF001 - sglang has no public name for it


def compile_shape(compile_utils: Any, shape: list[Any], m_list: list[int]) -> str:
    """Compile one shape. Returns why it failed, in one line, or ""."""
    name, n, k, groups = shape
    text = f"<{name}> N={n}, K={k}, num_groups={groups}"
    try:
        kernel_type = compile_utils.DeepGemmKernelType[name]
    except KeyError:
        return "this sglang knows no such kernel type"
    logging.getLogger(__name__).info("Try DeepGEMM JIT Compiling for %s with all Ms.", text)
    # Ranks share the cache directory through this lock since 0.5.20; older versions have none.
    lock = getattr(compile_utils, "_local_rank_compile_lock", lambda *_: contextlib.nullcontext())
    try:
        with lock(kernel_type, n, k, groups):
            compile_utils._compile_deep_gemm_one_type_all(  # noqa: SLF001 - as above
                kernel_type=kernel_type, n=n, k=k, num_groups=groups, m_list=list(m_list)
            )
    except Exception as error:
        logging.getLogger(__name__).exception("DeepGEMM warm-up of %s failed", text)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


if __name__ == "__main__":
    # Run by path, python puts this folder first on sys.path: its modules must not be imported as top-level ones.
    if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        del sys.path[0]
    sys.exit(main(sys.argv[1]))
