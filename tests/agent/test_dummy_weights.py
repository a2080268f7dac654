"""Dummy weights: what stays of a model, what sglang is told, and what happens when they do not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder import events, sglang_args
from builder.agent import dummy_weights
from builder.agent.dummy_weights import TooFewLayersError, few_layers
from builder.errors import UsageError
from builder.manifest.load import load
from builder.task import Task
from tests.program import Program

DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
}
GLM: dict[str, Any] = {
    "num_hidden_layers": 78,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "indexer_types": ["full"] * 3 + ["shared", "shared", "shared", "full"] * 18 + ["shared"] * 3,
    "index_topk_pattern": "F" * 78,
    "eos_token_id": [154820, 154827, 154829],
    "quantization_config": {"modules_to_not_convert": [f"model.layers.{layer}" for layer in range(78)]},
}
MIMO: dict[str, Any] = {
    "num_hidden_layers": 48,
    "hybrid_layer_pattern": [0, *[1, 1, 1, 1, 0] * 9, 1, 0],
    "moe_layer_freq": [0] + [1] * 47,
}


def test_few_layers_keeps_dense_and_moe_layers() -> None:
    assert few_layers(DEEPSEEK, 4) == {"num_hidden_layers": 4, "first_k_dense_replace": 3, "moe_layer_freq": 1}
    assert few_layers(DEEPSEEK, 2)["first_k_dense_replace"] == 1
    with pytest.raises(TooFewLayersError, match="layers = 1 is too few: the model has 2 kinds of layers"):
        few_layers(DEEPSEEK, 1)


def test_few_layers_keeps_one_of_every_kind_in_lists() -> None:
    made = few_layers(GLM, 4)
    assert made["mlp_layer_types"] == ["dense", "dense", "sparse", "sparse"]
    assert set(made["indexer_types"][2:]) == {"full", "shared"}, "a sparse layer of both"
    assert (made["first_k_dense_replace"], made["index_topk_pattern"]) == (2, "FFFF")
    assert made.keys() <= GLM.keys() - {"eos_token_id", "quantization_config"}
    made = few_layers(MIMO, 3)
    kinds = set(zip(made["hybrid_layer_pattern"], made["moe_layer_freq"], strict=True))
    assert (
        kinds == {(0, 0), (1, 1), (0, 1)} == set(zip(MIMO["hybrid_layer_pattern"], MIMO["moe_layer_freq"], strict=True))
    )
    with pytest.raises(TooFewLayersError, match="has 3 kinds"):
        few_layers(MIMO, 2)


@pytest.mark.parametrize(
    ("config", "made"),
    [
        ({"num_hidden_layers": 4}, {}),
        ({"num_hidden_layers": 40}, {"num_hidden_layers": 4}),
        ({"model_type": "unheard of"}, {"num_hidden_layers": 4}),
        # Interleaved experts cannot be said by a number of dense layers: those come first.
        (
            {"num_hidden_layers": 9, "first_k_dense_replace": 1, "moe_layer_freq": 2},
            {"num_hidden_layers": 4, "first_k_dense_replace": 3, "moe_layer_freq": 1},
        ),
        (
            {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
            {"num_hidden_layers": 4, "decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2]},
        ),
        (
            {"num_hidden_layers": 48, "full_attention_interval": 12},
            {"num_hidden_layers": 4, "full_attention_interval": 4},
        ),
        (
            {"text_config": DEEPSEEK, "vision_config": {"num_hidden_layers": 3}},
            {"text_config": few_layers(DEEPSEEK, 4)},
        ),
        # The draft's own values at the end of a list stay; a table with a list in it is given as a whole.
        (
            {"num_hidden_layers": 6, "num_nextn_predict_layers": 1, "ratios": [0, 4, 4, 4, 4, 4, 9]},
            {"num_hidden_layers": 4, "ratios": [0, 4, 4, 4, 9]},
        ),
        (
            {"num_hidden_layers": 6, "sparse": {"freq": [0, 1, 1, 1, 1, 1], "heads": 4}},
            {"num_hidden_layers": 4, "sparse": {"freq": [0, 1, 1, 1], "heads": 4}},
        ),
    ],
)
def test_dummy_task_overrides_layer_counts(config: dict[str, Any], made: dict[str, Any]) -> None:
    assert few_layers(config, 4) == made


def test_dummy_task_drops_refused_options_and_task_overrides_win() -> None:
    argv = ("--tp", "8", "--model-loader-extra-config", '{"a": 1}', "--load-format=auto",
            "--speculative-draft-load-format", "auto", "--json-model-override-args",
            '{"num_hidden_layers": 9, "b": {"c": 1}}')  # fmt: skip
    task = Task("l", "m", "serve", argv, load="dummy-then-weights", layers=4)
    words = dummy_weights.task_of(task, {**DEEPSEEK, "b": 1}).argv
    assert words[:4] == ("--tp", "8", "--load-format", "dummy")
    told = json.loads(sglang_args.value(words, sglang_args.OVERRIDES) or "")
    assert told == {"num_hidden_layers": 9, "first_k_dense_replace": 3, "moe_layer_freq": 1, "b": {"c": 1}}
    assert len(words) == 6


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ('load = "dummies"', "load: there is no way to load 'dummies' (did you mean 'dummy'?)."),
        ("layers = 4", 'layers keeps a few layers of a model without weights; it needs load = "dummy".'),
        (
            'load = "dummy"\nlayers = 4\nargv = ["--speculative-draft-model-path", "org/draft"]',
            "sglang would cut the draft model of argv to as many layers: leave layers out.",
        ),
        (
            'load = "dummy-then-weights"\nargv = ["--json-model-override-args", "{x"]',
            "argv: --json-model-override-args is no JSON object.",
        ),
    ],
)
def test_dummy_manifest_with_impossible_layers_is_refused(tmp_path: Path, task: str, said: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(f'schema = 1\nimage.ref = "i"\ncache.root = "/c"\n[[task]]\nmodel = "org/m"\n{task}\n')
    with pytest.raises(UsageError) as caught:
        load(path)
    assert [str(problem).partition(": ")[2] for problem in caught.value.problems] == [said]


# With a server that plays


def dummy(program: Program, play: str = "", **fields: Any) -> Task:
    argv = ("--tp", "8", "--model-loader-extra-config", '{"num_threads": 64}')
    return program.task(play, **{"argv": argv, "load": "dummy-then-weights", "layers": 4, **fields})


def marker(program: Program, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((program.root / path).read_text())
    return found


def test_dummy_weights_succeeding_load_no_weights(program: Program) -> None:
    (program.model / "config.json").write_text(json.dumps(DEEPSEEK))
    (program.model / "model.safetensors").unlink()
    done = program.run(dummy(program))
    assert done.status == 0, done.verdict
    assert (done.verdict.loaded, done.verdict.proof) == ("dummy weights, 4 layers", "verified")
    assert b'"first_k_dense_replace": 3' in done.stderr
    assert marker(program, done.marker)["observed"]["loaded"] == "dummy weights, 4 layers"


@pytest.mark.parametrize(
    ("play", "fields", "why"),
    [
        ("crash-exit-0@dummy", {}, 'crash: "Scheduler hit an exception"'),
        ("no-kernels@dummy", {}, "deep_gemm is required and it holds no valid entry"),
        ("grows-in-second-pass@dummy", {"recipe": "serve"}, "the second pass added 3 entries"),
        ("reducing@dummy", {"layers": 1}, "layers = 1 is too few"),
    ],
)
def test_dummy_then_weights_falls_back_to_weights(
    program: Program, play: str, fields: dict[str, Any], why: str
) -> None:
    (program.model / "config.json").write_text(json.dumps(DEEPSEEK))
    done = program.run(dummy(program, play, **fields))
    verdict = done.verdict
    assert (done.status, verdict.loaded, verdict.proof) == (0, "weights", "verified"), verdict
    assert verdict.reason.startswith("with weights, because dummy weights, ") and why in verdict.reason
    assert b"num_threads" in done.stderr, "the loader's configuration is back"
    found = marker(program, done.marker)
    assert found["observed"]["loaded"] == "weights"
    assert found["coverage"]["load"] == "dummy-then-weights"
    assert "falling back to weights" in [event.phase for event in done.all(events.Phase)]


def test_dummy_weights_failing_fail_the_task(program: Program) -> None:
    done = program.run(dummy(program, "crash-exit-0@dummy", load="dummy"))
    assert (done.status, done.verdict.loaded, done.verdict.marker) == (20, "dummy weights, 4 layers", None)
    assert b"falling back" not in done.log


@pytest.mark.parametrize(
    ("play", "checkpoint", "said"),
    [
        ("crash-exit-0@dummy", False, "; and with weights: "),
        ("crash-exit-0", True, "(and dummy weights, 4 layers did not do: crash"),
    ],
)
def test_dummy_then_weights_both_failing_names_both_reasons(
    program: Program, play: str, checkpoint: bool, said: str
) -> None:
    if not checkpoint:
        (program.model / "model.safetensors").unlink()
    done = program.run(dummy(program, play))
    assert (done.status, done.verdict.marker) == (20, None)
    assert said in done.verdict.reason and "Scheduler hit an exception" in done.verdict.reason


def test_dummy_config_with_absurd_values_is_refused() -> None:
    with pytest.raises(TooFewLayersError, match="more than 10000 layers"):
        few_layers({"num_hidden_layers": 10**30}, 4)
    assert (
        few_layers({"num_hidden_layers": 9, "decoder_sparse_step": 1, "mlp_only_layers": 7}, 4)["num_hidden_layers"]
        == 4
    )
