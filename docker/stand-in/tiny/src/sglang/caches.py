"""One entry for every other cache that sglang fills, where its variable points; a default would lie elsewhere."""

import os
from pathlib import Path

from deep_gemm.jit import cubin

#: variable → where below it the real program writes, and what.
ENTRIES = {
    "EP_JIT_CACHE_DIR": "cache/kernel.dispatch.0123/kernel.cubin",
    "TORCHINDUCTOR_CACHE_DIR": "fxgraph/ab/fab0123/entry",
    "FLASHINFER_WORKSPACE_BASE": ".cache/flashinfer/0.6.5/90a/cached_ops/norm/norm.so",
    "TRTLLM_DG_CACHE_DIR": "cache/kernel.gemm.0123/kernel.cubin",
    "SGLANG_JIT_CACHE_DIR": "sm90a/rope/build-01/deps-23/rope.so",
    "TVM_FFI_CACHE_DIR": "rope_0123456789abcdef/rope.so",
    "CUTE_DSL_CACHE_DIR": "0123.mlir",
    "SGLANG_CUTE_AOT_CACHE_DIR": "gemm-0123.o",
    "QUACK_CACHE_DIR": "0123/4567.o",
    "TILELANG_CACHE_DIR": "0123/kernel_lib.so",
    "TORCH_EXTENSIONS_DIR": "py312_cu130/pool/pool.so",
    "SGLANG_CACHE_DIR": "flashinfer/autotune/0.6.5/90a/0123/rank_tp0_pp0_dp0.json",
    "CUDA_CACHE_PATH": "0/1/0123",
}


def fill() -> None:
    """Makes what is missing."""
    for variable, name in ENTRIES.items():
        path = Path(os.environ[variable]) / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cubin(variable.encode()) if path.suffix in (".so", ".o", ".cubin") else b"{}")
            if path.suffix == ".cubin":
                path.with_suffix(".cu").write_text("// test double\n")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    Path(os.environ["SGLANG_CACHE_DIR"], f"gpu_p2p_access_cache_for_{devices}.json").write_text("{}")
