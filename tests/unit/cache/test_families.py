"""The table of families: complete, consistent, and data alone."""

from __future__ import annotations

import re

import pytest

from builder.cache.families import FAMILIES, FAMILY, HOST_ABI, PACKAGES, Family, directory, environment

NAMES = [
    "deep_gemm",
    "deep_ep",
    "triton",
    "inductor",
    "flashinfer",
    "sglang_jit",
    "tvm_ffi",
    "cute_dsl",
    "quack",
    "tilelang",
    "torch_extensions",
    "sglang_cache",
    "cuda",
]


def test_families_are_listed_once() -> None:
    assert [family.name for family in FAMILIES] == NAMES
    assert set(FAMILY) == set(NAMES)


def test_environment_covers_old_and_new_sglang() -> None:
    keys = {name: f"{number:016x}" for number, name in enumerate(NAMES)}
    made = environment("/jit", keys)
    assert made == {
        "SGLANG_DG_CACHE_DIR": f"/jit/deep_gemm/{keys['deep_gemm']}",
        "DG_JIT_CACHE_DIR": f"/jit/deep_gemm/{keys['deep_gemm']}",
        "EP_JIT_CACHE_DIR": f"/jit/deep_ep/{keys['deep_ep']}",
        "TRITON_CACHE_DIR": f"/jit/triton/{keys['triton']}",
        "TORCHINDUCTOR_CACHE_DIR": f"/jit/inductor/{keys['inductor']}",
        "FLASHINFER_WORKSPACE_BASE": f"/jit/flashinfer/{keys['flashinfer']}",
        "TRTLLM_DG_CACHE_DIR": f"/jit/flashinfer/{keys['flashinfer']}/trtllm_deep_gemm",
        "SGLANG_JIT_CACHE_DIR": f"/jit/sglang_jit/{keys['sglang_jit']}",
        "TVM_FFI_CACHE_DIR": f"/jit/tvm_ffi/{keys['tvm_ffi']}",
        "CUTE_DSL_CACHE_DIR": f"/jit/cute_dsl/{keys['cute_dsl']}",
        "SGLANG_CUTE_AOT_CACHE_DIR": f"/jit/cute_dsl/{keys['cute_dsl']}/aot",
        "QUACK_CACHE_DIR": f"/jit/quack/{keys['quack']}",
        "TILELANG_CACHE_DIR": f"/jit/tilelang/{keys['tilelang']}",
        "TORCH_EXTENSIONS_DIR": f"/jit/torch_extensions/{keys['torch_extensions']}",
        "SGLANG_CACHE_DIR": f"/jit/sglang_cache/{keys['sglang_cache']}",
        "CUDA_CACHE_PATH": f"/jit/cuda/{keys['cuda']}",
    }


def test_environment_leaves_families_without_key_alone() -> None:
    assert environment("/jit", {"triton": "a" * 16}) == {"TRITON_CACHE_DIR": f"/jit/triton/{'a' * 16}"}
    assert directory("/jit", "triton", "k") == "/jit/triton/k"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_build_factor_only_in_unshared_families(family: Family) -> None:
    assert family.shared != ("sglang_build" in family.factors)
    assert "image" not in family.factors
    assert len(set(family.factors)) == len(family.factors) > 0
    assert re.fullmatch("[a-z_]+", family.name)
    assert family.layout in ("deep_gemm", "triton", "files")


def test_driver_cache_is_never_claimed() -> None:
    assert [family.name for family in FAMILIES if not family.claimable] == ["cuda"]


def test_families_with_host_binaries_have_host_abi_factor() -> None:
    for name in set(NAMES) - {"deep_gemm", "deep_ep", "sglang_cache", "cuda"}:
        assert set(HOST_ABI) <= set(FAMILY[name].factors), name


def test_families_with_absolute_paths_have_mount_factor() -> None:
    assert "mount" in FAMILY["triton"].factors
    assert "mount" not in FAMILY["deep_gemm"].factors


def test_package_factors_are_used_by_a_family() -> None:
    used = {factor for family in FAMILIES for factor in family.factors}
    assert set(PACKAGES) <= used
