"""Where shapes come from: config.json of the DeepSeek V3 family (numbers of the published models), and markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.agent import model_shapes
from builder.agent.model_shapes import CONTIGUOUS, DENSE, MASKED, NotUnderstood
from builder.cache import marker_files
from builder.task import Shape
from tests.program import Program

#: config.json of deepseek-ai/DeepSeek-V3-0324, as far as it counts.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
}
#: What deepseek-ai/DeepSeek-V3.2 has beyond that.
V32 = {
    **V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
TP8 = ("--tp", "8")
DP8 = ("--tp", "8", "--dp", "8", "--enable-dp-attention")


def dense(*pairs: tuple[int, int]) -> set[Shape]:
    return {Shape(DENSE, n, k) for n, k in pairs}


#: Attention, and the three dense layers.
V3_TP8 = dense((2112, 7168), (3072, 1536), (4096, 512), (7168, 2048), (4608, 7168), (7168, 2304))
V3_DP8 = dense((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4608, 7168), (7168, 2304))
INDEXER = dense((8192, 1536), (128, 7168))
SHARED_TP8 = dense((512, 7168), (7168, 256))
SHARED_WHOLE = dense((4096, 7168), (7168, 2048))


def grouped(n: int, k: int, groups: int, *kernels: str) -> set[Shape]:
    return {Shape(kernel, *pair, groups) for kernel in kernels for pair in ((n, k), (7168, n // 2))}


@pytest.mark.parametrize(
    ("config", "argv", "wanted"),
    [
        pytest.param(V3, TP8, V3_TP8, id="V3: the shared expert is one of the routed ones, and those run on Triton"),
        pytest.param(V3, (*TP8, "--speculative-algorithm", "EAGLE"), V3_TP8, id="the draft layer has no other"),
        pytest.param(V3, DP8, V3_DP8, id="DP attention is on every rank, the rest is split"),
        pytest.param(V3, (*TP8, "--disable-shared-experts-fusion"), V3_TP8 | SHARED_TP8, id="shared expert apart"),
        pytest.param(V32, TP8, V3_TP8 | INDEXER | SHARED_TP8, id="V3.2"),
        pytest.param(V32, DP8, V3_DP8 | INDEXER | SHARED_TP8, id="V3.2 with DP attention"),
        pytest.param(
            {**V32, "indexer_rope_interleave": True},
            TP8,
            V3_TP8 | dense((8192, 1536)) | SHARED_TP8,
            id="a fused indexer",
        ),
        pytest.param(
            V3,
            (*TP8, "--moe-dense-tp-size", "1"),
            V3_TP8 - dense((4608, 7168), (7168, 2304)) | dense((36864, 7168), (7168, 18432)),
            id="dense layers whole on every rank",
        ),
        pytest.param(
            V3,
            (*TP8, "--moe-runner-backend", "deep_gemm"),
            V3_TP8 | grouped(512, 7168, 257, CONTIGUOUS, MASKED),
            id="experts on DeepGEMM, the shared one among them",
        ),
        pytest.param(
            V3,
            (*TP8, "--ep", "8", "--moe-runner-backend", "deep_gemm"),
            V3_TP8 | SHARED_TP8 | grouped(4096, 7168, 32, CONTIGUOUS, MASKED),
            id="expert parallel",
        ),
        pytest.param(
            V3,
            (*DP8, "--moe-a2a-backend", "deepep", "--deepep-mode=low_latency", "--ep-num-redundant-experts", "32"),
            V3_DP8 | SHARED_WHOLE | grouped(4096, 7168, 36, MASKED),
            id="DeepEP",
        ),
        pytest.param(
            {**V3, "q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": None},
            TP8,
            dense((3072, 7168), (576, 7168), (4096, 512), (7168, 2048)),
            id="no low rank of queries",
        ),
        pytest.param(
            V3,
            ("--tp", "16"),
            dense((2112, 7168), (1536, 1536), (2048, 512), (7168, 1024), (2304, 7168), (7168, 1152)),
            id="tp 16",
        ),
        pytest.param(
            V3,
            ("--tp", "32"),
            dense((2112, 7168), (768, 1536), (1024, 512), (7168, 512), (1152, 7168)),
            id="K of 576 is no multiple of 128: that one runs on Triton",
        ),
    ],
)
def test_shapes_of_config_are_derived(config: dict[str, Any], argv: tuple[str, ...], wanted: set[Shape]) -> None:
    found = model_shapes.of_config(config, argv)
    assert set(found) == wanted
    assert len(found) == len(wanted)
    assert found[0].n * found[0].k == max(shape.n * shape.k for shape in found)


@pytest.mark.parametrize(
    ("config", "argv", "environ", "why"),
    [
        ({**V3, "architectures": ["DeepseekV4ForCausalLM"]}, TP8, {}, "config.json is of DeepseekV4ForCausalLM, and"),
        ({**V3, "architectures": ["GlmMoeDsaForCausalLM"]}, TP8, {}, "config.json is of GlmMoeDsaForCausalLM, and"),
        ({"model_type": "llama"}, TP8, {}, "config.json is of type 'llama', and shapes are only known for Deepseek"),
        ({**V3, "quantization_config": None}, TP8, {}, "no quantization_config with FP8 weights in blocks of 128"),
        ({**V3, "quantization_config": {**V3["quantization_config"], "ignored_layers": ["a"]}}, TP8, {}, "ignored_"),
        ({**V3, "kv_lora_rank": None}, TP8, {}, "config.json has no kv_lora_rank"),
        ({**V3, "hidden_size": "7168"}, TP8, {}, "config.json: hidden_size is '7168'"),
        (V3, ("--tp", "7"), {}, "num_attention_heads (128) cannot be divided by attention's tp (7)"),
        (V3, ("--tp", "8", "--dp", "3", "--enable-dp-attention"), {}, "tp (8) cannot be divided by dp (3)"),
        (V3, (*TP8, "--attn-cp-size=2"), {}, "argv holds --attn-cp-size, whose effect on shapes is not known"),
        (V3, (*TP8, "--moe-a2a-backend", "mooncake"), {}, "argv holds --moe-a2a-backend mooncake, and shapes are"),
        (V3, (*TP8, "--fp8-gemm-backend", "triton"), {}, "argv holds --fp8-gemm-backend triton"),
        (V3, (*TP8, "--json-model-override-args", "["), {}, "argv: --json-model-override-args is no JSON object"),
        (V3, TP8, {"SGLANG_USE_DEEPGEMM_BMM": "1"}, "SGLANG_USE_DEEPGEMM_BMM is set"),
    ],
)
def test_shapes_of_unknown_config_are_refused_by_name(
    config: dict[str, Any], argv: tuple[str, ...], environ: dict[str, str], why: str
) -> None:
    with pytest.raises(NotUnderstood) as refused:
        model_shapes.of_config(config, argv, environ)
    assert why in str(refused.value)


def test_shapes_honour_overrides_of_argv() -> None:
    argv = (*TP8, "--json-model-override-args", '{"first_k_dense_replace": 0}')
    assert set(model_shapes.of_config(V3, argv)) == V3_TP8 - dense((4608, 7168), (7168, 2304))


def test_shapes_of_markers_ignore_other_models_and_garbage(program: Program, tmp_path: Path) -> None:
    assert program.run(program.task()).status == 0
    other = Shape(DENSE, 64, 64)
    assert program.run(program.task(recipe="shapes", label="other", model="other", shapes=(other,))).status == 0
    path = next(program.root.glob("markers/tiny-*/*.json"))
    marker = json.loads(path.read_text())
    (path.parent / "strange.json").write_text(json.dumps({**marker, "shapes": ["no shape", 7, None]}))
    (program.root / "markers" / "a-file").write_text("x")
    model = str(program.model)
    found = marker_files.shapes_of(program.root, {model, "other", "third"})
    assert found == {model: tuple(sorted(map(Shape.parse, marker["shapes"]))), "other": (other,), "third": ()}


def test_shapes_of_markers_and_config_need_no_server(program: Program) -> None:
    (program.model / "config.json").write_text(json.dumps(V3))
    assert program.run(program.task(label="first")).status == 0
    task = program.task(
        label="shapes", recipe="shapes", shapes=(Shape(DENSE, 64, 64),), shapes_from=("config", "markers")
    )
    done = program.run(task)
    assert done.status == 0, done.verdict
    of_markers = marker_files.shapes_of(program.root, {str(program.model)})[str(program.model)]
    assert set(map(Shape.parse, done.verdict.shapes)) == V3_TP8 | {Shape(DENSE, 64, 64), *of_markers}
    assert f"{len(done.verdict.shapes)} shapes, ".encode() in done.stderr


def test_shapes_without_source_name_both_reasons(program: Program) -> None:
    done = program.run(program.task(recipe="shapes", shapes_from=("markers",)))
    assert (done.status, done.verdict.state) == (20, "failed")
    assert "left a marker that names shapes: warm it once with compile-deep-gemm, or" in done.verdict.reason
    done = program.run(program.task(recipe="shapes", shapes_from=("config",)))
    assert done.verdict.reason.startswith("config.json is of type None, and shapes are only known for Deepseek")
    (program.model / "config.json").unlink()
    done = program.run(program.task(recipe="shapes", shapes_from=("config",)))
    assert (done.status, done.verdict.state) == (22, "skipped")
