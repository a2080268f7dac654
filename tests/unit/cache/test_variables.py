"""Variables that change what is compiled: factors of their family; those that do not: factors of nothing."""

from __future__ import annotations

import pytest

from builder.cache import toolchain, variables
from builder.cache.coverage import coverage
from builder.cache.families import FAMILIES, FAMILY
from builder.cache.toolchain import Record
from builder.task import Task

HOME = variables.DEFAULT_HOME


def record(home: str | None = None, **environ: str) -> Record:
    return {
        "schema": 2,
        "factors": {factor: f"{factor} 1" for family in FAMILIES for factor in family.factors},
        "gpus": [],
        "sglang": {"version": "0.5.23", "commit": None, "sources": None},
        "switches": toolchain.switches(environ),
        "variables": toolchain.factor_variables(environ, home),
        "observed": {},
    }


def moved(changed: Record) -> set[str]:
    before, after = toolchain.family_keys(record()), toolchain.family_keys(changed)
    return {name for name in before if before[name] != after[name]}


def test_keys_without_variables_are_those_of_records_that_have_none() -> None:
    old = record()
    del old["variables"]
    assert toolchain.family_keys(old) == toolchain.family_keys(record())


@pytest.mark.parametrize(
    ("name", "value", "family"),
    [
        ("FLASHINFER_CUDA_ARCH_LIST", "9.0", "flashinfer"),
        ("FLASHINFER_EXTRA_CUDAFLAGS", "-lineinfo", "flashinfer"),
        ("FLASHINFER_UNHEARD_OF", "1", "flashinfer"),
        ("TORCH_CUDA_ARCH_LIST", "9.0a", "torch_extensions"),
        ("NVCC_APPEND_FLAGS", "-G", "deep_gemm"),
        ("NVCC_PREPEND_FLAGS", "-G", "sglang_jit"),
        ("CXX", "clang++", "flashinfer"),
        ("CC", "clang", "triton"),
        ("TRITON_ALWAYS_COMPILE", "1", "triton"),
        ("TRITON_DEFAULT_FP_FUSION", "0", "triton"),
        ("TRITON_UNHEARD_OF", "0", "triton"),
        ("DISABLE_LLVM_OPT", "1", "triton"),
        ("MLIR_ENABLE_DUMP", "1", "triton"),
        ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1", "inductor"),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1", "inductor"),
        ("TILELANG_DISABLE_CACHE", "1", "tilelang"),
    ],
)
def test_variable_of_a_compiler_moves_keys_of_its_families_only(name: str, value: str, family: str) -> None:
    found = record(**{name: value})
    row = variables.factor_of(name)
    assert row is not None
    assert moved(found) == set(row.families)
    assert family in row.families
    assert toolchain.family_factors(found, family)[f"env {name}"] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRITON_ALWAYS_COMPILE", "0"),
        ("TRITON_ALWAYS_COMPILE", "False"),
        ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", ""),
        ("TORCHINDUCTOR_FX_GRAPH_CACHE", "1"),
        ("NVCC_APPEND_FLAGS", ""),
        ("TRITON_CACHE_DIR", "/jit/triton/x"),
        ("TRITON_PTXAS_PATH", "/opt/ptxas"),
        ("FLASHINFER_WORKSPACE_BASE", "/jit/flashinfer/x"),
        ("FLASHINFER_LOGLEVEL", "3"),
        ("FLASHINFER_DISABLE_VERSION_CHECK", "1"),
        ("TORCHINDUCTOR_COMPILE_THREADS", "4"),
        ("CUDA_PATH", "/usr/local/cuda"),
        ("PATH", "/bin"),
        ("HOME", "/root"),
    ],
)
def test_default_value_or_place_moves_no_key(name: str, value: str) -> None:
    assert moved(record(**{name: value})) == set()


def test_toolkit_elsewhere_moves_families_that_name_it_in_build_files() -> None:
    assert moved(record(home="/usr/local/cuda-12.9")) == {"deep_ep", "flashinfer", "tvm_ffi", "torch_extensions"}
    assert moved(record(home=HOME)) == set()


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_ENABLE_ASYNC_ASSERT",
        "SGLANG_JIT_KERNEL_RUN_FULL_TESTS",
        "SGLANG_PRECISION_COMMIT",
        "SGLANG_CRASH_ON_JIT_COMPILE",
        "SGLANG_JIT_CACHE_DEBUG",
        "SGLANG_JIT_CACHE_KEEP",
        "SGLANG_LOG_MS",
        "SGLANG_JIT_LOG_LEVEL",
        "SGLANG_PROFILE_V2",
        "SGLANG_TORCH_PROFILER_DIR",
        "SGLANG_GRPC_PORT",
        "SGLANG_TRACE_ASYNC",
        "SGLANG_DIAG_BYPASS_HEALTH_GENERATE",
        "SGLANG_WAIT_PORT_TIMEOUT",
    ],
)
def test_inert_variable_of_sglang_is_a_factor_of_nothing(name: str) -> None:
    task = Task(label="t", model="m", recipe="command")
    with_it = record(**{name: "1"})
    assert moved(with_it) == set()
    assert coverage(task, record=with_it, config_digest=None) == coverage(task, record=record(), config_digest=None)
    own = Task(label="t", model="m", recipe="command", env={name: "1"})
    assert coverage(own, record=record(), config_digest=None) == coverage(task, record=record(), config_digest=None)


def test_variables_of_sglang_on_neither_list_are_counted() -> None:
    assert toolchain.switches({"SGLANG_UNHEARD_OF": "1", "SGLANG_JIT_FORCE_RECOMPILE": "1"}) == {
        "SGLANG_JIT_FORCE_RECOMPILE": "1",
        "SGLANG_UNHEARD_OF": "1",
    }


def test_unlisted_names_those_that_count_by_their_beginning() -> None:
    assert variables.unlisted(["TRITON_UNHEARD_OF", "TRITON_ALWAYS_COMPILE", "TRITON_HOME", "HOME"]) == [
        "TRITON_UNHEARD_OF"
    ]


def test_task_variable_that_the_program_keeps_apart_shares_the_directory() -> None:
    """A job sets it around one launch, and the others' kernels are in the same directory."""
    own = {"TRITON_DEFAULT_FP_FUSION": "0"}
    assert moved(toolchain.of_task(record(), own)) == set()
    assert moved(toolchain.of_task(record(**own), own)) == set(), "a job that was given it finds the same directory"
    assert moved(toolchain.of_task(record(**own), {})) == {"triton"}


def test_task_variable_that_no_cache_sees_gets_a_directory_of_its_own() -> None:
    own = {"NVCC_APPEND_FLAGS": "-G"}
    assert "deep_gemm" in moved(toolchain.of_task(record(), own))
    assert moved(toolchain.of_task(record(NVCC_APPEND_FLAGS="-g"), own)) == moved(toolchain.of_task(record(), own))


def test_every_row_names_families_of_the_table_and_its_source() -> None:
    for row in (*variables.FACTORS, *variables.PREFIXES):
        assert row.source
        assert set(row.families) <= FAMILY.keys()
    assert all(row.source for row in variables.INERT)
