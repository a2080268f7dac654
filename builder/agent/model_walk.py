"""Finds the DeepGEMM shapes that a server would request, by sglang's own model code, without weights and without a GPU.

The model class is built on the simulated GPU as rank 0 of the world that argv asks for. Then the quantization method
of each linear and expert layer is called with empty tensors, and a recorder stands where sglang would compile. So
sglang itself derives kernel type, N, K, groups, and the chunked prefill size. Written against sglang 0.5.23: `PRIVATE`
lists the names that it relies on. Whatever is missing or raises is a problem of the answer, which is then refused,
because a shape may be missing in it.

Not walked: what a forward pass computes between layers, pipeline stages after the first, and other ranks than 0.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: Module → names of sglang that the walk uses and that are no promise of it; a test compares them with each version.
PRIVATE: dict[str, tuple[str, ...]] = {
    "sglang.srt.server_args": ("prepare_server_args",),
    "sglang.srt.runtime_context": ("SpawnRanks", "get_device", "get_schedule", "get_spec", "publish"),
    "sglang.srt.configs.load_config": ("LoadConfig",),
    "sglang.srt.configs.model_config": ("ModelConfig",),
    "sglang.srt.distributed.bootstrap": ("init_parallel_runtime", "init_layer_runtime"),
    "sglang.srt.layers.deep_gemm_wrapper.compile_utils": ("_maybe_compile_deep_gemm_one_type_all",),
    "sglang.srt.layers.deep_gemm_wrapper.entrypoint": ("deep_gemm",),
    "sglang.srt.layers.linear": ("LinearBase",),
    "sglang.srt.layers.moe.fused_moe_triton.layer": ("FusedMoE",),
    "sglang.srt.layers.moe.token_dispatcher.deepep": ("DeepEPLLDispatchOutput", "DeepEPNormalDispatchOutput"),
    "sglang.srt.layers.moe.token_dispatcher.standard": ("StandardDispatchOutput",),
    "sglang.srt.layers.moe.topk": ("StandardTopKOutput",),
    "sglang.srt.layers.moe.utils": ("get_deepep_mode", "get_moe_a2a_backend", "initialize_moe_config"),
    "sglang.srt.layers.quantization.fp4_utils": ("initialize_fp4_gemm_config",),
    "sglang.srt.layers.quantization.fp8_utils": ("initialize_fp8_gemm_config",),
    "sglang.srt.layers.quantization.unquant": ("initialize_bf16_gemm_config",),
    "sglang.srt.model_loader.loader": ("_get_quantization_config", "_initialize_model"),
    "sglang.srt.model_loader.utils": ("set_default_torch_dtype",),
    "sglang.kernels.jit.utils": ("load_jit",),
}

#: Tokens of the empty tensors. Shapes do not depend on it.
TOKENS = 128


class _NoKernel:
    """Stands for a kernel or a module of kernels: any name, any call. real: has the names that compute nothing."""

    def __init__(self, real: Any = None) -> None:
        self._real = real

    def __call__(self, *_: Any, **__: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        real = self.__dict__.get("_real")
        if real is not None and ("gemm" not in name or name.startswith(("get_", "set_"))):
            return getattr(real, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return _NoKernel()


def missing_names() -> list[str]:
    """Return the names of PRIVATE that this sglang lacks."""
    found = []
    for module, names in PRIVATE.items():
        try:
            loaded = importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - the reason is the answer
            found.append(f"{module} ({type(error).__name__}: {error})"[:200])
            continue
        found += [f"{module}.{name}" for name in names if not hasattr(loaded, name)]
    return found


def walk(argv: Sequence[str]) -> dict[str, Any]:
    """Return ``shapes`` (kernel type, N, K, groups), ``chunked_prefill_size``, ``classes`` and ``problems``.

    And ``modules`` of sglang's own JIT that layers asked for: arguments of ``load_jit``, by place and by name, as JSON.

    argv: of a server. It changes sglang, torch and this process for good: call it in a fork, and once.
    """
    # Groups of a world of one process would wait for the others.
    os.environ.update(SGLANG_USE_MESSAGE_QUEUE_BROADCASTER="0", SGLANG_ENABLE_JIT_DEEPGEMM="1")
    if missing := missing_names():
        problems = {"sglang lacks": ", ".join(missing)}
        return {"shapes": [], "classes": [], "modules": [], "chunked_prefill_size": 0, "problems": problems}
    return _Walk(argv).run()


def _names(module: str) -> Any:
    return importlib.import_module(f"sglang.srt.{module}")


class _Walk:
    """One server's models: the target, and its draft."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)
        self._shapes: dict[tuple[str, int, int, int], None] = {}
        self._problems: dict[str, str] = {}
        self._modules: collections.Counter[str] = collections.Counter()
        self._jit_modules: dict[str, None] = {}
        self._at = ""
        self._torch = importlib.import_module("torch")
        self._jit = importlib.import_module("sglang.kernels.jit.utils").load_jit

    def run(self) -> dict[str, Any]:
        args = _names("server_args").prepare_server_args(self._argv)
        args.resolve_once()
        context = _names("runtime_context")
        context.publish(args, role="scheduler", ranks=context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
        self._fake_groups()
        self._record()
        config = _names("configs.model_config").ModelConfig
        target, bootstrap = config.from_server_args(args), _names("distributed.bootstrap")
        bootstrap.init_parallel_runtime(server_args=args, device=context.get_device().device, dist_port=1)
        bootstrap.init_layer_runtime(model_config=target)
        _names("layers.moe.utils").initialize_moe_config()
        for kind in ("fp8", "fp4"):
            getattr(_names(f"layers.quantization.{kind}_utils"), f"initialize_{kind}_gemm_config")()
        _names("layers.quantization.unquant").initialize_bf16_gemm_config()
        classes = [self._model(target, "target")]
        speculative = context.get_spec()
        if speculative.speculative_algorithm and speculative.speculative_draft_model_path:
            draft = {"model_path": speculative.speculative_draft_model_path, "is_draft_model": True}
            classes.append(self._model(config.from_server_args(args, **draft), "draft"))
        return {
            "shapes": [list(shape) for shape in self._shapes],
            "classes": classes,
            "modules": list(self._jit_modules),
            "chunked_prefill_size": int(context.get_schedule().chunked_prefill_size),
            "problems": self._problems,
        }

    def _fake_groups(self) -> None:
        """Let this process have process groups of the whole world, which nothing is sent through."""
        distributed = self._torch.distributed
        fake_pg = importlib.import_module("torch.testing._internal.distributed.fake_pg")
        init, group = distributed.init_process_group, distributed.new_group
        distributed.init_process_group = lambda *_, world_size, rank, **__: init(
            backend="fake", store=fake_pg.FakeStore(), world_size=world_size, rank=rank
        )
        distributed.new_group = lambda ranks=None, *_, **__: group(ranks, backend="fake")

    def _record(self) -> None:
        """Put recorders where sglang would compile or launch."""

        def record(kernel_type: Any, n: int, k: int, num_groups: int) -> None:
            self._shapes[(kernel_type.name, int(n), int(k), int(num_groups))] = None

        wrapper = "layers.deep_gemm_wrapper"
        _names(f"{wrapper}.compile_utils")._maybe_compile_deep_gemm_one_type_all = record  # noqa: SLF001 - see PRIVATE
        _names(f"{wrapper}.entrypoint").deep_gemm = _NoKernel(importlib.import_module("deep_gemm"))
        importlib.import_module("triton.runtime.jit").JITFunction.run = lambda *_, **__: None

    def _attempt(self, call: Callable[[], Any]) -> None:
        """Call; what it raises is a problem, because a shape would be missing in silence."""
        for module in list(sys.modules.values()):  # they bind it when they are imported, some of them late
            if getattr(module, "__dict__", {}).get("load_jit") is self._jit:
                module.load_jit = self._note_module  # type: ignore[attr-defined]
        try:
            call()
        except Exception as error:  # noqa: BLE001 - see above
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._problems[self._at] = f"{text} ({where.filename.rpartition('/')[2]}:{where.lineno})"

    def _note_module(self, *args: Any, **options: Any) -> _NoKernel:
        """Stand for `load_jit`: note what it is asked for."""
        self._jit_modules[json.dumps([[str(each) for each in args], options], default=str)] = None
        return _NoKernel()

    def _model(self, config: Any, who: str) -> str:
        loader = _names("model_loader.loader")
        load = _names("configs.load_config").LoadConfig(load_format="dummy")
        linear, experts = _names("layers.linear").LinearBase, _names("layers.moe.fused_moe_triton.layer").FusedMoE
        dtype = _names("model_loader.utils").set_default_torch_dtype
        with dtype(config.dtype), self._torch.device("cuda"):
            quantization = loader._get_quantization_config(config, load)  # noqa: SLF001 - see PRIVATE
            model = loader._initialize_model(config, load, quantization)  # noqa: SLF001 - see PRIVATE
        for name, layer in model.named_modules():
            self._at = f"{who}: {'.'.join('*' if part.isdigit() else part for part in name.split('.'))}"
            if isinstance(layer, linear) and layer.quant_method is not None:
                width = getattr(layer, "input_size_per_partition", layer.input_size)
                x = self._empty(TOKENS, width, dtype=config.dtype)
                self._attempt(lambda: layer.quant_method.apply(layer, x, None))  # noqa: B023 - called at once
            elif isinstance(layer, experts):
                for form in self._forms(layer, config.dtype):
                    self._attempt(lambda: layer.quant_method.apply(layer, form()))  # noqa: B023 - called at once
        return type(model).__name__

    def _empty(self, *size: int, dtype: Any = None) -> Any:
        return self._torch.empty(size, dtype=dtype or self._torch.float32, device="cuda")

    def _forms(self, layer: Any, dtype: Any) -> Iterator[Callable[[], Any]]:
        """Yield a maker of each form in which tokens may reach these experts: runners free what they get."""
        torch, k, hidden, groups = self._torch, layer.top_k, layer.hidden_size, layer.num_local_experts
        utils, empty = _names("layers.moe.utils"), self._empty
        if utils.get_moe_a2a_backend().is_none():
            output = _names("layers.moe.token_dispatcher.standard").StandardDispatchOutput
            top = _names("layers.moe.topk").StandardTopKOutput
            for layout in ("masked", "compact"):  # a server chooses by the memory that is free
                os.environ["SGLANG_DEEPGEMM_STANDARD_LAYOUT"] = layout
                yield lambda: output(
                    empty(TOKENS, hidden, dtype=dtype),
                    None,
                    top(empty(TOKENS, k), empty(TOKENS, k, dtype=torch.int32), empty(TOKENS, layer.num_experts)),
                )
            return
        deepep, mode = _names("layers.moe.token_dispatcher.deepep"), utils.get_deepep_mode()

        def tokens(*rows: int) -> tuple[Any, Any]:
            return empty(*rows, hidden, dtype=torch.float8_e4m3fn), empty(*rows, hidden // 128)

        def choice() -> tuple[Any, Any]:
            return empty(TOKENS, k, dtype=torch.int64), empty(TOKENS, k)

        if mode.enable_normal():
            yield lambda: deepep.DeepEPNormalDispatchOutput(*tokens(TOKENS), *choice(), [TOKENS] * groups)
        if mode.enable_low_latency():
            yield lambda: deepep.DeepEPLLDispatchOutput(
                *tokens(groups, TOKENS), *choice(), empty(groups, dtype=torch.int32), TOKENS
            )
