"""Compiles one Triton kernel to an sm_90 cubin: real Triton, real ptxas, no GPU."""

import os

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def matmul(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for s in range(0, K, BK):
        total += tl.dot(tl.load(a + i[:, None] * K + s + k[None, :]), tl.load(b + (s + k)[:, None] * BN + j[None, :]))
    tl.store(c + i[:, None] * BN + j[None, :], total)


blocks = {"BM": 64, "BN": 64, "BK": 32}
signature = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32", **dict.fromkeys(blocks, "constexpr")}
source = ASTSource(matmul, signature, blocks)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(f"triton {triton.__version__}, cubin of {len(kernel.asm['cubin'])} bytes in {os.environ['TRITON_CACHE_DIR']}")
print("TRITON KERNEL READY")
