"""Which recipe warms a recorded launch: the one that compiles what its server compiles.

``compile-deep-gemm`` where DeepGEMM compiles the matrix products of the model, ``serve`` where other compilers do
(Triton, FlashInfer, CuTe DSL): a server that answers requests compiles whatever it needs. The rules are data. They
follow ``sglang/srt`` of upstream's tree of 2026-08-22 (d315eb7250), and each names the place that it follows.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from builder.recording import Launch

COMPILE, SERVE = "compile-deep-gemm", "serve"

#: Models whose checkpoint is FP8 in blocks of 128 × 128 (``quantization_config`` of their config.json: quant_method
#: ``fp8`` and weight_block_size): pattern → whether the experts are FP4 (``is_fp4_experts`` of ``model_config.py``).
FP8_BLOCKS: Mapping[str, bool] = {
    "deepseek-ai/DeepSeek-V3*": False,
    "deepseek-ai/DeepSeek-R1*": False,
    "deepseek-ai/DeepSeek-V4-*": True,
    "sgl-project/DeepSeek-V4-*-FP8": False,
    "lmsys/sglang-ci-dsv3-test": False,  # `warmup_deep_gemm_models` of upstream's pr-test.yml
    "zai-org/GLM-5*-FP8": False,
    "XiaomiMiMo/MiMo-V2*": False,
    "MiniMaxAI/MiniMax-M2*": False,
    "Qwen/Qwen3*-FP8": False,
}
#: Communication between experts with which `auto` means DeepGEMM (``is_deepgemm_moe_runner_backend_enabled``).
_EXPERTS_APART = ("deepep", "mooncake", "nixl")
_OFF = ("0", "false", "no", "off", "n", "f")


@dataclass(frozen=True)
class LaunchedServer:
    """What the rules look at. flags: options in their first spelling, with values; gpu: as `import-tests --gpu`."""

    launch: Launch
    flags: Mapping[str, str]
    gpu: str

    def flag(self, *names: str, default: str = "") -> str:
        return next((self.flags[name] for name in names if name in self.flags), default)

    def is_off(self, variable: str) -> bool:
        return dict(self.launch.env).get(variable, "1").lower() in _OFF

    @property
    def experts(self) -> str:
        return self.flag("--moe-runner-backend", default="auto")

    @property
    def apart(self) -> bool:
        return self.flag("--moe-a2a-backend") in _EXPERTS_APART

    @property
    def in_blocks(self) -> bool:
        return _pattern(self.launch.model) is not None

    @property
    def fp4_experts(self) -> bool:
        pattern = _pattern(self.launch.model)
        env = dict(self.launch.env)
        kept = "SGLANG_DSV4_FP4_DEQUANT" not in env or self.is_off("SGLANG_DSV4_FP4_DEQUANT")
        return pattern is not None and FP8_BLOCKS[pattern] and kept


@dataclass(frozen=True)
class RecipeRule:
    """Decides about a server for which `holds`. recipe: None where none warms it; why: a format string."""

    recipe: str | None
    why: str
    holds: Callable[[LaunchedServer], bool]


#: The first one that holds decides.
RULES: tuple[RecipeRule, ...] = (
    # disaggregation/encoder/http_server.py: it has /encode, and no /generate.
    RecipeRule(None, "an encoder alone generates no tokens", lambda server: "--encoder-only" in server.flags),
    # server_args.py: language_only needs encoder_urls.
    RecipeRule(None, "it needs the server of an encoder", lambda server: "--language-only" in server.flags),
    # deep_gemm_wrapper/configurer.py; compile_deep_gemm.py would turn it on.
    RecipeRule(SERVE, "its environment turns DeepGEMM off", lambda server: server.is_off("SGLANG_ENABLE_JIT_DEEPGEMM")),
    RecipeRule(SERVE, "it runs in the test's own process", lambda server: server.launch.kind in ("engine", "bench")),
    # lora/backend: Triton's kernels, and csgmv's.
    RecipeRule(
        SERVE,
        "its adapters' kernels are Triton's",
        lambda server: "--enable-lora" in server.flags or "--lora-paths" in server.flags,
    ),
    # layers/quantization/__init__.py: only fp8 has a weight_block_size.
    RecipeRule(
        SERVE,
        "--quantization {quantization} is not FP8 in blocks",
        lambda server: server.flag("--quantization", default="fp8") != "fp8",
    ),
    # layers/moe/moe_runner/runner.py, layers/quantization/fp8.py: get_quant_method.
    RecipeRule(SERVE, "its experts run on {experts}", lambda server: server.experts not in ("auto", "deep_gemm")),
    # arg_groups/overrides.py, DeepSeek-V4: auto becomes flashinfer_mxfp4.
    RecipeRule(
        SERVE,
        "its experts are FP4, and run on flashinfer_mxfp4",
        lambda server: server.fp4_experts and server.experts == "auto" and not server.apart,
    ),
    # arg_groups/overrides.py: auto becomes flashinfer_trtllm on SM100 for all families with such checkpoints.
    RecipeRule(
        SERVE,
        "on {gpu} its experts run on flashinfer_trtllm",
        lambda server: server.gpu == "B200" and server.in_blocks and server.experts == "auto" and not server.apart,
    ),
    # layers/quantization/unquant.py, mxfp4.py: DeepGEMM's grouped kernels for other checkpoints.
    RecipeRule(COMPILE, "its experts run on DeepGEMM", lambda server: server.experts == "deep_gemm"),
    # layers/quantization/fp8_utils.py: _dispatch_explicit_backend.
    RecipeRule(
        SERVE,
        "--fp8-gemm-backend {dense} is not DeepGEMM",
        lambda server: server.flag("--fp8-gemm-backend", default="auto") not in ("auto", "deep_gemm"),
    ),
    # layers/quantization/fp8_utils.py: _dispatch_auto_backend takes DeepGEMM first.
    RecipeRule(COMPILE, "its checkpoint is FP8 in blocks", lambda server: server.in_blocks),
    RecipeRule(SERVE, "its checkpoint is not FP8 in blocks", lambda _server: True),
)


def choose(launch: Launch, flags: Mapping[str, str], gpu: str) -> tuple[str | None, str]:
    """Return the recipe that warms a launch (None: none does), and why."""
    server = LaunchedServer(launch, flags, gpu)
    rule = next(rule for rule in RULES if rule.holds(server))
    values = {
        "quantization": server.flag("--quantization"),
        "experts": server.experts,
        "dense": server.flag("--fp8-gemm-backend"),
        "gpu": gpu,
    }
    return rule.recipe, rule.why.format_map(values)


def _pattern(model: str) -> str | None:
    return next((each for each in FP8_BLOCKS if fnmatch.fnmatchcase(model, each)), None)
