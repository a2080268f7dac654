"""Shapes told by the image's own sglang: the names that the walk relies on, and what it finds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from builder.agent import model_shapes
from builder.task import Shape
from tests.agent.test_shapes import V3

pytestmark = [pytest.mark.stand_in, pytest.mark.timeout(500)]

ROOT = Path(__file__).resolve().parents[2]
#: What sglang wants of a config.json beyond what shapes depend on; two layers are enough for one of each kind.
CONFIG = {
    **V3,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "quantization_config": {**V3["quantization_config"], "activation_scheme": "dynamic"},
}
EAGLE = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
ARGVS = {
    "tensor parallel, with a draft": ("--tp", "8", *EAGLE, "--speculative-num-draft-tokens", "4"),
    "data parallel, experts by DeepEP": (
        "--tp",
        "8",
        "--dp",
        "8",
        "--enable-dp-attention",
        "--moe-a2a-backend",
        "deepep",
    ),
}
#: In the container: everything as the program does it, but for the plan.
SCRIPT = """
import json, os, subprocess, sys, tempfile
sys.path.append("/opt/warm-cache")
from builder.agent import simulated_gpu
from builder.task import GPUS
place = tempfile.mkdtemp()
environ = simulated_gpu.environment({**os.environ, "HF_HUB_OFFLINE": "1"}, place, GPUS["H200"])
environ["SGLANG_JIT_CACHE_DIR"] = place + "/jit"
code = "import sys; sys.path.append('/opt/warm-cache'); from builder.agent import model_walk, prebuild_forks; "
code += "prebuild_forks.main(sys.argv[1]); print('missing', model_walk.missing_names())"

def ask(**request):
    reader, writer = os.pipe()
    request = {"report": writer, "scratch": place, "workers": 2, "sweeps": [], "kernels": [], "models": [], **request}
    with open(place + "/request.json", "w") as file:
        json.dump(request, file)
    command = ["python3", "-c", code, place + "/request.json"]
    done = subprocess.run(command, env=environ, pass_fds=(writer,), capture_output=True, text=True)
    os.close(writer)
    return os.fdopen(reader).read().splitlines(), done

models = [{"label": name, "argv": argv, "m_values": []} for name, argv in json.load(sys.stdin).items()]
answers, done = ask(mode="walk", models=models)
modules = [module for text in answers for module in json.loads(text).get("modules", ())]
built, _ = ask(mode="modules", modules=modules[:1])
out = done.stdout.splitlines()[-1:]
print(json.dumps({"answers": answers, "out": out, "err": done.stderr[-2000:], "built": built}))
"""


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, docker_host: str, stand_in_image: str) -> dict[str, Any]:
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(CONFIG))
    command = ["docker", "-H", docker_host, "run", "--rm", "-i", "--init", "--network", "none"]
    command += ["-v", f"{ROOT / 'builder'}:/opt/warm-cache/builder:ro", "-v", f"{model}:/model:ro"]
    argvs = {name: ["--model-path", "/model", "--trust-remote-code", *argv] for name, argv in ARGVS.items()}
    done = subprocess.run(
        [*command, stand_in_image, "python3", "-c", SCRIPT],
        input=json.dumps(argvs),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_walk_finds_every_private_name(walked: dict[str, Any]) -> None:
    """Of the sglang in the image: a version that lacks one is refused by name, and the table takes its place."""
    assert walked["out"] == ["missing []"], walked["err"]


def test_walk_agrees_with_the_table(walked: dict[str, Any]) -> None:
    answers = [json.loads(line) for line in walked["answers"]]
    found = {answer["walked"]: answer for answer in answers if "walked" in answer}
    assert found.keys() == ARGVS.keys(), (answers, walked["err"])
    for name, argv in ARGVS.items():
        shapes = {Shape(*sweep["problem"]) for sweep in found[name]["sweeps"]}
        assert shapes == set(model_shapes.of_config(CONFIG, argv)), name
    first, second = (found[name] for name in ARGVS)
    assert first["classes"] == ["DeepseekV3ForCausalLM", "DeepseekV3ForCausalLMNextN"]
    assert [each["sweeps"][0]["chunked_prefill_size"] for each in (first, second)] == [8192, 1024]


def test_walk_names_modules_of_sglangs_own_jit_that_are_built_and_found_again(walked: dict[str, Any]) -> None:
    answers = [json.loads(line) for line in walked["answers"]]
    named = {json.loads(text)[0][0] for answer in answers for text in answer.get("modules", ())}
    assert any("per_token_group_quant" in name for name in named), named
    built = [json.loads(line) for line in walked["built"]]
    assert [answer for answer in built if "imported" not in answer] == [{"found": 0}], built
