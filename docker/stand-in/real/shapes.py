"""Drives sglang's own DeepGEMM warm-up loop for a few small problems, by hand or while the image is made.

    LD_PRELOAD=/opt/standin/stubs/fakert.so python /opt/standin/shapes.py [KERNEL_TYPE...]

A kernel type that does not exist imports everything and compiles nothing.
"""

import logging
import os
import sys
import time
from pathlib import Path

from sglang.srt.environ import envs

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
envs.SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE.set(True)

import deep_gemm  # noqa: E402
from sglang.srt.layers.deep_gemm_wrapper import compile_utils  # noqa: E402

M_VALUES = [1, 64, 128, 256, 512, 1024, 2048]
PROBLEMS = [
    ("GEMM_NT_F8F8BF16", 4096, 7168, 1),
    ("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 4096, 7168, 32),
    ("GROUPED_GEMM_NT_F8F8BF16_MASKED", 4096, 7168, 32),
]

cache = Path(os.environ["DG_JIT_CACHE_DIR"])
print("deep_gemm", deep_gemm.__version__, "enabled", compile_utils.ENABLE_JIT_DEEPGEMM, "cache", cache, flush=True)
for name, n, k, groups in PROBLEMS:
    if sys.argv[1:] and name not in sys.argv[1:]:
        continue
    kernel_type = compile_utils.DeepGemmKernelType[name]
    started = time.monotonic()
    with compile_utils._local_rank_compile_lock(kernel_type, n, k, groups):
        compile_utils._compile_deep_gemm_one_type_all(
            kernel_type=kernel_type, n=n, k=k, num_groups=groups, m_list=list(M_VALUES)
        )
    seconds, entries = time.monotonic() - started, len(list((cache / "cache").iterdir()))
    print(f"{name} N={n}, K={k}, num_groups={groups}: {seconds:.1f} s, {entries} entries", flush=True)
