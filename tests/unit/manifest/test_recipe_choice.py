"""The recipe of a launch: by what its server compiles."""

from __future__ import annotations

import pytest

from builder.manifest import recipe_choice
from builder.manifest.from_tests import flags_of
from builder.recording import Kind, Launch

BLOCKS, BF16, FP4 = "deepseek-ai/DeepSeek-V3-0324", "Qwen/Qwen3-32B", "deepseek-ai/DeepSeek-V4-Flash"


def choose(
    model: str, *argv: str, kind: Kind = "server", gpu: str = "H200", env: dict[str, str] | None = None
) -> tuple[str | None, str]:
    launch = Launch("T.setUpClass", "a.py:1", kind, model, argv, tuple((env or {}).items()))
    return recipe_choice.choose(launch, flags_of(argv), gpu)


@pytest.mark.parametrize(
    ("model", "argv", "env"),
    [
        (BLOCKS, ("--tp", "8"), {}),
        (BLOCKS, ("--moe-a2a-backend", "deepep"), {}),
        (BLOCKS, ("--quantization", "fp8"), {}),
        (BLOCKS, (), {"SGLANG_ENABLE_JIT_DEEPGEMM": "1"}),
        (BF16, ("--moe-runner-backend", "deep_gemm"), {}),
        (FP4, ("--tp", "8"), {"SGLANG_DSV4_FP4_DEQUANT": "1"}),
        (FP4, ("--moe-a2a-backend=deepep",), {}),
        ("XiaomiMiMo/MiMo-V2-Flash", (), {}),
        ("sgl-project/DeepSeek-V4-Flash-FP8", (), {"SGLANG_DSV4_FP4_EXPERTS": "0"}),
    ],
)
def test_choose_compile_deep_gemm_where_deep_gemm_compiles(
    model: str, argv: tuple[str, ...], env: dict[str, str]
) -> None:
    assert choose(model, *argv, env=env)[0] == "compile-deep-gemm"


@pytest.mark.parametrize(
    ("model", "argv", "env", "why"),
    [
        (BF16, ("--tp", "4"), {}, "not FP8 in blocks"),
        ("RedHatAI/gemma-4-26B-A4B-it-FP8-Dynamic", (), {}, "not FP8 in blocks"),
        (BLOCKS, (), {"SGLANG_ENABLE_JIT_DEEPGEMM": "false"}, "turns DeepGEMM off"),
        (BLOCKS, ("--moe-runner-backend=triton",), {}, "run on triton"),
        (BLOCKS, ("--fp8-gemm-backend", "flashinfer_trtllm"), {}, "flashinfer_trtllm is not DeepGEMM"),
        (BLOCKS, ("--lora-paths", "org/adapter"), {}, "adapters"),
        ("nvidia/DeepSeek-V3-0324-FP4", ("--quantization", "modelopt_fp4"), {}, "modelopt_fp4"),
        (FP4, ("--tp", "4"), {}, "FP4"),
        (FP4, ("--moe-runner-backend", "marlin"), {"SGLANG_DSV4_FP4_DEQUANT": "0"}, "marlin"),
    ],
)
def test_choose_serve_where_others_compile(model: str, argv: tuple[str, ...], env: dict[str, str], why: str) -> None:
    recipe, reason = choose(model, *argv, env=env)
    assert recipe == "serve"
    assert why in reason


@pytest.mark.parametrize("kind", ["engine", "bench"])
def test_choose_serve_for_engine_in_the_process_of_the_test(kind: Kind) -> None:
    assert choose(BLOCKS, kind=kind)[0] == "serve"


def test_choose_serve_on_b200_unless_deep_gemm_is_asked_for() -> None:
    assert choose(BLOCKS, gpu="B200") == ("serve", "on B200 its experts run on flashinfer_trtllm")
    assert choose(BLOCKS, "--moe-runner-backend", "deep_gemm", gpu="B200")[0] == "compile-deep-gemm"
    assert choose(BLOCKS, "--moe-a2a-backend", "deepep", gpu="B200")[0] == "compile-deep-gemm"


@pytest.mark.parametrize("option", ["--encoder-only", "--language-only"])
def test_choose_none_for_half_of_a_pair_with_an_encoder(option: str) -> None:
    assert choose(BF16, option)[0] is None
