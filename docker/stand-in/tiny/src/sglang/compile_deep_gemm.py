"""python3 -m sglang.compile_deep_gemm: the messages and the order of the original, in one process."""

import os
import sys

from sglang import log, server

if __name__ == "__main__":
    os.environ["SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE"] = "1"
    args = server.parse(sys.argv[1:])
    print("Disable CUDA Graph and Torch Compile to save time...")
    print("Begin DeepGEMM Kernels compilation...\nIt may take a long time and timeout maybe raised\n")
    server.load(args)
    log.info("Running warmup compile-deep-gemm")
    print("\nGenerate warm up request for compiling DeepGEMM...\n")
    server.forward(args)
    log.info("Warmup ended")
    print("\nDeepGEMM Kernels compilation finished successfully.")
    # The original kills its server here, and the server's children complain.
    log.info("SIGQUIT received. signum=None, frame=None. It usually means one child failed.")
