"""Environment variables that change what is compiled, and those that do not, as data with their source.

A variable on neither list counts where its name begins like one of a compiler's own (`PREFIXES`): as a factor of that
compiler's family, by name, so that a difference is never silent. Where the value is the program's default, the variable
is no factor: keys of environments without these variables are what they always were.

Variables of sglang and DeepGEMM (`toolchain.SWITCHES`) are factors of tasks instead, because they decide which kernels
are asked for: a change of one makes tasks cold, and moves no directory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

#: Values that a program reads as "off", where off is its default.
OFF = ("", "0", "false", "no", "off")
#: Families that run nvcc.
_NVCC = ("deep_gemm", "deep_ep", "inductor", "flashinfer", "sglang_jit", "tvm_ffi", "tilelang", "torch_extensions")
#: Families whose build files name the compiler by its path, so that the same compiler elsewhere compiles all anew.
_BY_PATH = ("deep_ep", "flashinfer", "tvm_ffi", "torch_extensions")

#: The CUDA toolkit as its users find it: CUDA_HOME, CUDA_PATH (of equal meaning), the nvcc on PATH, or this default.
CUDA_HOME, CUDA_PATH, DEFAULT_HOME = "CUDA_HOME", "CUDA_PATH", "/usr/local/cuda"


@dataclass(frozen=True)
class Factor:
    """Variables that change what these families compile, or whether they find it.

    defaults: values that mean the same as no variable. apart: the program itself keeps results of different values
    apart, so that tasks with a value of their own share one directory, and their markers name the value. Without it
    another value has another directory.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]
    source: str
    defaults: tuple[str, ...] = ("",)
    apart: bool = False


FACTORS: tuple[Factor, ...] = (
    Factor((CUDA_HOME,), _BY_PATH, "ninja compares command lines: FlashInfer issues 4884 and 4885", ("", DEFAULT_HOME)),
    Factor(
        ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN"),
        _NVCC,
        "nvcc manual, 4.1: read by nvcc itself; no key of a JIT cache has them",
    ),
    Factor(
        ("CC",),
        ("triton", "tvm_ffi", "torch_extensions"),
        "Triton 3.9 runtime/build.py, tvm-ffi and torch 2.14 cpp_extension.py",
    ),
    Factor(
        ("CXX",),
        ("triton", "inductor", "flashinfer", "tvm_ffi", "torch_extensions"),
        "Triton 3.9 runtime/build.py, torch 2.14 cpp_builder.py and cpp_extension.py; sglang_jit has its version",
    ),
    Factor(("CUDACXX", "PYTORCH_NVCC"), ("inductor", "torch_extensions"), "torch 2.14 cpp_extension.py, cuda_env.py"),
    Factor(
        ("TORCH_CUDA_ARCH_LIST",),
        ("inductor", "flashinfer", "tvm_ffi", "torch_extensions"),
        "torch 2.14 cpp_extension.py, _inductor; FlashInfer before 0.3",
    ),
    Factor(
        ("FLASHINFER_CUDA_ARCH_LIST",),
        ("flashinfer",),
        "FlashInfer 0.7.2: part of the folder's name, <version>/<architectures>/cached_ops; issue 566",
        apart=True,
    ),
    Factor(
        ("FLASHINFER_EXTRA_CFLAGS", "FLASHINFER_EXTRA_CUDAFLAGS", "FLASHINFER_EXTRA_LDFLAGS"),
        ("flashinfer",),
        "FlashInfer jit/cpp_ext.py: in build.ninja, built in place",
    ),
    Factor(
        ("TRITON_ALWAYS_COMPILE", "TRITON_KERNEL_OVERRIDE", "TRITON_INTERPRET"),
        ("triton",),
        "Triton 3.9 knobs.py, compiler.py: the cache is not read",
        OFF,
    ),
    Factor(("TRITON_CACHE_MANAGER", "TRITON_REMOTE_CACHE_BACKEND"), ("triton",), "Triton 3.9 runtime/cache.py"),
    Factor(
        (
            *("DISABLE_FAST_REDUCTION", "DISABLE_LLVM_OPT", "DISABLE_MMA_V3", "DISABLE_MMA_V5", "DISABLE_PTXAS_OPT"),
            *("MLIR_*", "LLVM_*", "NVPTX_ENABLE_DUMP", "PTXAS_OPTIONS", "USE_IR_LOC"),
            *("ALLOW_LHS_TMEM_LAYOUT_CONVERSION", "STORE_TMEM_TO_GLOBAL_BYPASS_SMEM"),
            *("ENABLE_MMA_V5_ATT_PIPELINE", "WARP_SPECIALIZE_ATTENTION_FLAG"),
        ),
        ("triton",),
        "Triton 3.9 knobs.py, Tools/Sys/GetEnv.hpp (CACHE_INVALIDATING_ENV_VARS): part of its own keys",
        apart=True,
    ),
    Factor(
        ("TORCHINDUCTOR_FORCE_DISABLE_CACHES",), ("inductor",), "torch 2.14 compiler/config.py: nothing is read", OFF
    ),
    Factor(
        ("TORCHINDUCTOR_FX_GRAPH_CACHE",), ("inductor",), "torch 2.14 _inductor/config.py: on by default", ("", "1")
    ),
    Factor(("TILELANG_DISABLE_CACHE",), ("tilelang",), "tilelang env.py: the cache is not read", OFF),
    Factor(
        ("CUTE_DSL_NO_CACHE", "CUTE_DSL_DISABLE_FILE_CACHING"),
        ("cute_dsl", "quack"),
        "nvidia-cutlass-dsl 4.8.0 env_manager.py: the cache is not read",
        OFF,
    ),
    Factor(("QUACK_CACHE_ENABLED",), ("quack",), "quack-kernels 0.6.5: on by default", ("", "1")),
)

#: Other variables that begin like this are factors of these families. apart: as in `Factor`.
PREFIXES: tuple[Factor, ...] = (
    Factor(("TRITON_*",), ("triton",), "knobs.py: most are part of its own keys", apart=True),
    Factor(
        ("TORCHINDUCTOR_*", "TORCHDYNAMO_*", "TORCH_COMPILE_*", "AOT_INDUCTOR_*"),
        ("inductor",),
        "its configuration is part of its own keys",
        apart=True,
    ),
    Factor(("FLASHINFER_*", "TRTLLM_DG_*"), ("flashinfer",), "flags, built in place"),
    Factor(("TVM_FFI_*",), ("tvm_ffi",), "flags, built in place"),
    Factor(("TILELANG_*",), ("tilelang",), "part of its own keys", apart=True),
    Factor(("CUTE_DSL_*",), ("cute_dsl", "quack"), "part of its own keys", apart=True),
    Factor(("QUACK_*",), ("quack",), "part of its own keys", apart=True),
    Factor(("EP_JIT_*",), ("deep_ep",), "DeepEP 2 csrc/jit: part of its own keys", apart=True),
)


@dataclass(frozen=True)
class Inert:
    """Variables that are factors of nothing."""

    names: tuple[str, ...]
    source: str


INERT: tuple[Inert, ...] = (
    Inert(
        ("SGLANG_BUILD_COMMIT", "SGLANG_IMAGE_TAG", "SGLANG_HOST_IP", "SGLANG_PORT", "SGLANG_*_PORT"),
        "sglang 0.5.23 srt/environ.py: which build it is, and where it listens",
    ),
    Inert(
        ("SGLANG_CI_*", "SGLANG_IS_IN_CI*", "SGLANG_TEST_*", "SGLANG_JIT_KERNEL_RUN_FULL_TESTS", "SGLANG_PRECISION_*"),
        "sglang's workflows (_pr-test-stage.yml, scheduled runs): books of continuous integration",
    ),
    Inert(
        ("SGLANG_ENABLE_ASYNC_ASSERT", "SGLANG_CUDA_COREDUMP*", "SGLANG_PYSPY_*", "SGLANG_DIAG_*"),
        "sglang 0.5.23 srt/environ.py: what a failure does; asserts of tensors are PyTorch's own kernels",
    ),
    Inert(
        ("SGLANG_CRASH_ON_JIT_COMPILE", "SGLANG_JIT_CACHE_DEBUG", "SGLANG_JIT_CACHE_KEEP", "SGLANG_JIT_LOG_*"),
        "sglang 0.5.23 kernels/jit: what is said, kept or refused, after the key is made",
    ),
    Inert(
        ("SGLANG_LOG*", "SGLANG_PROFILE_*", "SGLANG_TORCH_PROFILER_DIR", "SGLANG_TRACE_*", "SGLANG_OTLP_*"),
        "sglang 0.5.23 srt/environ.py: logs, profiles and traces",
    ),
    Inert(
        ("SGLANG_HEALTH_CHECK_TIMEOUT", "SGLANG_WARMUP_TIMEOUT", "SGLANG_WAIT_PORT_TIMEOUT"),
        "sglang 0.5.23 srt/environ.py: for how long",
    ),
    Inert(
        ("DG_JIT_DUMP_*", "DG_JIT_PRINT_*", "DG_PRINT_CONFIGS"),
        "sgl-deep-gemm 0.1 to 0.2.5 csrc/jit: not among the flags of its keys",
    ),
    Inert(
        (
            "TRITON_CACHE_AUTOTUNING",
            "TRITON_CUOBJDUMP_PATH",
            "TRITON_CUPTI_*",
            "TRITON_DUMP_*",
            "TRITON_HOME",
            "TRITON_KERNEL_DUMP",
            "TRITON_LIBCUDA_PATH",
            "TRITON_NVDISASM_PATH",
            "TRITON_OVERRIDE_DIR",
            "TRITON_PRINT_AUTOTUNING",
            "TRITON_PROFILE_*",
            "TRITON_PROTON_*",
            "TRITON_PTXAS*_PATH",  # the assembler's version is a factor
            "TRITON_REDIS_*",
        ),
        "Triton 3.9 knobs.py: where files are and what is printed; TRITON_ALWAYS_COMPILE makes dumps matter",
    ),
    Inert(
        (
            "TORCHINDUCTOR_*LOG*",
            "TORCHINDUCTOR_*TIMEOUT*",
            "TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED",
            "TORCHINDUCTOR_COMPILE_THREADS",
            "TORCHINDUCTOR_COMPILE_WORKER_*",
            "TORCHINDUCTOR_ENABLED_METRIC_TABLES",
            "TORCHINDUCTOR_PROFILE*",
            "TORCHINDUCTOR_QUIESCE_*",
            "TORCHINDUCTOR_REDIS_*",
            "TORCHINDUCTOR_WORKER_*",
            "TORCHDYNAMO_VERBOSE",
        ),
        "torch 2.14 _inductor/config.py: workers, logs and displays",
    ),
    Inert(
        ("FLASHINFER_CUBIN*", "FLASHINFER_DISABLE_VERSION_CHECK", "FLASHINFER_LOG*", "FLASHINFER_DUMP_*"),
        "FlashInfer jit/env.py, api_logging.py: cubins of the image, and logs",
    ),
    Inert(("TVM_FFI_DISABLE_TORCH_C_DLPACK",), "tvm-ffi: a conversion at run time"),
    Inert(("TILELANG_PRINT_ON_COMPILATION", "TILELANG_TMP_DIR"), "tilelang env.py: output and scratch"),
    Inert(("CUTE_DSL_LOG_*", "CUTE_DSL_PRINT_*", "CUTE_DSL_DUMP_DIR"), "nvidia-cutlass-dsl 4.8.0 env_manager.py"),
    Inert(("EP_JIT_DUMP_*", "EP_JIT_PRINT_*"), "DeepEP 2 csrc/jit: output"),
    Inert(("*_KEY", "*PASSWORD*", "*SECRET*", "*_TOKEN"), "whatever else they are: no secret's value is recorded"),
)


def is_inert(name: str) -> bool:
    """Return whether this variable is a factor of nothing."""
    return any(_matches(name, row.names) for row in INERT)


def factor_of(name: str) -> Factor | None:
    """Return what this variable is a factor of, if of any family. Variables that name cache paths are none."""
    if is_inert(name) or name == CUDA_PATH:
        return None
    return next((row for row in (*FACTORS, *PREFIXES) if _matches(name, row.names)), None)


def of_process(environ: Mapping[str, str], places: Iterable[str]) -> dict[str, str]:
    """Return the variables of an environment that are factors of families. places: variables that name cache paths."""
    return dict(_counted({name: value for name, value in environ.items() if name not in places}))


def of_task(inherited: Mapping[str, str], own: Mapping[str, str], places: Iterable[str]) -> dict[str, str]:
    """Return the factors of one task's processes.

    inherited: `of_process` of the environment without the task's own variables. A variable of the task's own whose
    values the program keeps apart is no factor: it names the task's marker, and one directory holds all values.
    """
    own = {name: value for name, value in own.items() if name not in places and name != CUDA_HOME}
    left = {name: value for name, value in inherited.items() if name not in own}
    return dict(sorted({**left, **dict(_counted(own, apart=False))}.items()))


def of_family(variables: Mapping[str, str], family: str) -> dict[str, str | None]:
    """Return those of these variables that are factors of a family, as ``env NAME``, in the order of their names."""
    return {
        f"env {name}": value
        for name, value in sorted(variables.items())
        if (row := factor_of(name)) is not None and family in row.families
    }


def unlisted(variables: Iterable[str]) -> list[str]:
    """Return the names among these that count only because of how they begin."""
    return sorted(name for name in variables if factor_of(name) in PREFIXES)


def _counted(environ: Mapping[str, str], *, apart: bool = True) -> Iterator[tuple[str, str]]:
    for name, value in sorted(environ.items()):
        row = factor_of(name)
        default = row is None or value in row.defaults or (row.defaults is OFF and value.strip().lower() in OFF)
        if row is not None and not default and (apart or not row.apart):
            yield name, value


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
