"""DeepGEMM shapes that a model's server uses: by sglang's own model code, a table, or markers of earlier runs.

sglang's own model code is first (`prebuild.shapes_by_sglang`). Where it gives no list, there is a table:
`of_config` knows the DeepSeek V3 family (V3, V3-0324, R1, V3.1, V3.2) with FP8 weights in blocks of 128 × 128, on
Hopper: sglang's ``models/deepseek_v2.py``, ``layers/attention/dsa/dsa_indexer.py``, ``layers/quantization/fp8.py`` and
``fp8_utils.py`` of 0.5.23. Anything else raises NotUnderstood. A missing shape would be compiled during a test; so
where sglang chooses while serving (masked or contiguous experts) both are listed.

The attention kernels of DeepGEMM that V3.2's indexer uses are in no list: sglang does not warm them by shape.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from builder import files, sglang_args
from builder.beneath import Tree
from builder.cache import marker_files, model_store
from builder.task import Shape, Task
from builder.text import printable

DENSE = "GEMM_NT_F8F8BF16"
MASKED = "GROUPED_GEMM_NT_F8F8BF16_MASKED"
CONTIGUOUS = "GROUPED_GEMM_NT_F8F8BF16_CONTIG"

ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM")
#: The architecture with a shared expert that sglang adds to the routed ones, given one of it and so many of them.
FUSED_ARCHITECTURE, FUSED_EXPERTS = "DeepseekV3ForCausalLM", 256
BLOCK = [128, 128]

DENSE_TENSOR_PARALLEL = ("--moe-dense-tp-size",)
REDUNDANT_EXPERTS = ("--ep-num-redundant-experts",)
ALL_TO_ALL = ("--moe-a2a-backend",)
MOE_RUNNER = ("--moe-runner-backend",)
DEEPEP_MODE = ("--deepep-mode",)
FP8_GEMM = ("--fp8-gemm-backend", "--fp8-gemm-runner-backend")
DISABLE_FUSION = "--disable-shared-experts-fusion"
ENFORCE_FUSION = "--enforce-shared-experts-fusion"

#: Options that change shapes, or where they come from, in ways that are not understood here.
FOREIGN = (
    "--attention-context-parallel-size",
    "--attention-data-parallel-size",
    "--attn-cp-size",
    "--attn-dp-size",
    "--dcp-size",
    "--decode-context-parallel-size",
    "--enable-deepep-moe",
    "--enable-ep-moe",
    "--enable-single-batch-overlap",
    "--enable-two-batch-overlap",
    "--enable-waterfill",
    "--max-ep-size",
    "--moe-data-parallel-size",
    "--moe-dp-size",
    "--quantization",
)
#: Switches of the environment, likewise: set to anything but off.
FOREIGN_ENV = ("SGLANG_SHARED_EXPERT_TP1", "SGLANG_USE_DEEPGEMM_BMM")

#: Of a kernel's source; they have about 500.
_SOURCE_BYTES = 64 << 10

_FORMS = {"auto": (CONTIGUOUS, MASKED), "normal": (CONTIGUOUS,), "low_latency": (MASKED,)}
_OFF = ("", "0", "false", "no", "off")


class NotUnderstood(Exception):
    """No list can be made. The message has the reason."""


#: Returns the shapes of a server with the task's model and argv. Raises NotUnderstood.
Walk = Callable[[Task], tuple[Shape, ...]]


def wanted(
    root: Path, task: Task, environ: Mapping[str, str], walk: Walk, say: Callable[[str], None]
) -> tuple[Shape, ...]:
    """Return the task's own shapes and those of its sources, each once.

    Raises NotUnderstood if there are none, or if a source cannot be understood. walk: runs sglang's own code; where it
    gives no list, the table is used, and `say` gets the reason.
    """
    found = dict.fromkeys(task.shapes)
    for source in task.shapes_from:
        if source == "config":
            found.update(dict.fromkeys(_of_model(task, environ, walk, say)))
        else:
            found.update(dict.fromkeys(marker_files.shapes_of(root, {task.model})[task.model]))
    if not found:
        hint = 'warm it once with compile-deep-gemm, or set shapes_from = "config"'
        raise NotUnderstood(f"no earlier run of {task.model} left a marker that names shapes: {hint}")
    return tuple(found)


def missed(directory: Tree, entries: Iterable[str], asked: Iterable[Shape]) -> tuple[str, ...]:
    """Return of which of the shapes that sglang asked for these entries are; and the names of those that are of none.

    directory: of deep_gemm. DeepGEMM writes N, K and the groups of a problem into the source that it compiles.
    """
    found: set[str] = set()
    for entry in entries:
        source = b""
        with contextlib.suppress(files.UnreadableError, OSError):
            source = directory.read_bytes(f"{entry}/kernel.cu", _SOURCE_BYTES)
        own = {str(s) for s in asked if re.search(rb"\b%d,\s*%d,\s*%d\b" % (s.n, s.k, s.groups), source)}
        found |= own or {printable(entry)}
    return tuple(sorted(found))


def _of_model(task: Task, environ: Mapping[str, str], walk: Walk, say: Callable[[str], None]) -> tuple[Shape, ...]:
    config = model_store.config(task, environ)
    if config is None:
        raise NotUnderstood(f"the config.json of {task.model} cannot be read")
    try:
        return walk(task)
    except NotUnderstood as why:
        try:
            found = of_config(config, task.argv, environ)
        except NotUnderstood as other:
            raise NotUnderstood(f"{other}; and sglang's own code does not tell: {why}") from None
        say(f"shapes of the table, because sglang's own code does not tell: {why}")
        return found


def of_config(
    config: Mapping[str, Any], argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> tuple[Shape, ...]:
    """Return the shapes of a server with this argv, largest N·K first. Raises NotUnderstood."""
    return _Server(config, argv, environ or {}).shapes()


class _Server:
    """A model's sizes, and how a server's argv splits them."""

    def __init__(self, config: Mapping[str, Any], argv: Sequence[str], environ: Mapping[str, str]) -> None:
        self._argv = argv
        self._config = {**config, **_overrides(argv)}
        self._names = sglang_args.names(argv)
        self._refuse_foreign(environ)
        self._architecture = self._known_architecture()
        self._refuse_other_weights()
        self._hidden = self._size("hidden_size")
        self._tensor = sglang_args.number(argv, sglang_args.TENSOR_PARALLEL, 1)
        attention_ranks = (
            sglang_args.number(argv, sglang_args.DATA_PARALLEL, 1) if sglang_args.DP_ATTENTION in self._names else 1
        )
        self._attention = self._split(self._tensor, attention_ranks, "tp", "dp")

    def shapes(self) -> tuple[Shape, ...]:
        """Return all shapes, each once."""
        found = {*self._attention_layers(), *self._dense_layers(), *self._experts()}
        return tuple(sorted(found, key=lambda shape: (-shape.n * shape.k, shape)))

    def _attention_layers(self) -> Iterable[Shape]:
        heads = self._split(self._size("num_attention_heads"), self._attention, "num_attention_heads", "attention's tp")
        nope, rope = self._size("qk_nope_head_dim"), self._size("qk_rope_head_dim")
        value, rank = self._size("v_head_dim"), self._size("kv_lora_rank")
        queries = self._config.get("q_lora_rank")
        if queries is None:
            yield from self._linear(heads * (nope + rope), self._hidden)
            yield from self._linear(rank + rope, self._hidden)
        else:
            queries = self._size("q_lora_rank")
            yield from self._linear(queries + rank + rope, self._hidden)  # fused_qkv_a_proj_with_mqa, on every rank
            yield from self._linear(heads * (nope + rope), queries)  # q_b_proj
        yield from self._linear(heads * (nope + value), rank)  # kv_b_proj, where attention is not absorbed
        yield from self._linear(self._hidden, heads * value)  # o_proj
        if self._config.get("index_topk") is not None:  # the sparse attention of V3.2: its indexer is on every rank
            width = self._size("index_head_dim")
            yield from self._linear(self._size("index_n_heads") * width, self._size("q_lora_rank"))  # wq_b
            if not self._config.get("indexer_rope_interleave"):  # else it belongs to a projection in bfloat16
                yield from self._linear(width, self._hidden)  # wk

    def _dense_layers(self) -> Iterable[Shape]:
        if self._count("first_k_dense_replace") > 0:
            ranks = 1 if sglang_args.number(self._argv, DENSE_TENSOR_PARALLEL, 0) == 1 else self._tensor
            yield from self._feed_forward(self._size("intermediate_size"), ranks)

    def _experts(self) -> Iterable[Shape]:
        exchange = self._option(ALL_TO_ALL, "none", ("none", "deepep"))
        runner = sglang_args.value(self._argv, MOE_RUNNER) or "auto"
        routed, shared = self._size("n_routed_experts"), self._count("n_shared_experts")
        width = self._size("moe_intermediate_size")
        parallel = (
            self._tensor if exchange == "deepep" else sglang_args.number(self._argv, sglang_args.EXPERT_PARALLEL, 1)
        )
        fused = self._fuses_shared(routed, shared, exchange, parallel)
        if shared and not fused:
            yield from self._feed_forward(width * shared, 1 if exchange == "deepep" else self._tensor)
        if runner != "deep_gemm" and not (runner == "auto" and exchange == "deepep"):
            return  # its experts run on Triton, or on what the option names
        slots = parallel if exchange == "deepep" else shared
        routed += sglang_args.number(self._argv, REDUNDANT_EXPERTS, 0) + (slots if fused else 0)
        groups = self._split(routed, parallel, "the number of experts", "ep")
        part = self._split(width, self._split(self._tensor, parallel, "tp", "ep"), "moe_intermediate_size", "tp")
        mode = self._option(DEEPEP_MODE, "auto", tuple(_FORMS))
        for kernel in _FORMS[mode if exchange == "deepep" else "auto"]:
            yield Shape(kernel, 2 * part, self._hidden, groups)
            yield Shape(kernel, self._hidden, part, groups)

    def _fuses_shared(self, routed: int, shared: int, exchange: str, parallel: int) -> bool:
        if not shared or DISABLE_FUSION in self._names:
            return False
        if ENFORCE_FUSION in self._names:
            return True
        usual = self._architecture == FUSED_ARCHITECTURE and routed == FUSED_EXPERTS and shared == 1
        return usual and exchange == "none" and parallel == 1

    def _feed_forward(self, width: int, ranks: int) -> Iterable[Shape]:
        part = self._split(width, ranks, "the width of a feed-forward layer", "tp")
        yield from self._linear(2 * part, self._hidden)
        yield from self._linear(self._hidden, part)

    def _linear(self, n: int, k: int) -> Iterable[Shape]:
        """Yield the shape if sglang runs it on DeepGEMM; others run on Triton."""
        if n % 64 == 0 and k % 128 == 0:
            yield Shape(DENSE, n, k)

    # What is not understood

    def _known_architecture(self) -> str:
        named = self._config.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
        if name not in ARCHITECTURES:
            known = " and ".join(ARCHITECTURES)
            found = printable(name)[:80] if name else f"type {self._config.get('model_type')!r}"[:80]
            raise NotUnderstood(f"config.json is of {found}, and shapes are only known for {known}")
        return str(name)

    def _refuse_other_weights(self) -> None:
        quantization = self._config.get("quantization_config")
        quantization = quantization if isinstance(quantization, dict) else {}
        if quantization.get("quant_method") != "fp8" or quantization.get("weight_block_size") != BLOCK:
            raise NotUnderstood("config.json has no quantization_config with FP8 weights in blocks of 128 × 128")
        skipped = next((name for name in ("ignored_layers", "modules_to_not_convert") if quantization.get(name)), None)
        if skipped:
            raise NotUnderstood(f"config.json leaves layers out of its quantization ({skipped})")

    def _refuse_foreign(self, environ: Mapping[str, str]) -> None:
        for option in sorted(self._names & set(FOREIGN)):
            raise NotUnderstood(f"argv holds {option}, whose effect on shapes is not known")
        for name in FOREIGN_ENV:
            if environ.get(name, "").lower() not in _OFF:
                raise NotUnderstood(f"{name} is set, whose effect on shapes is not known")
        self._option(FP8_GEMM, "auto", ("auto", "deep_gemm"))

    def _option(self, names: Sequence[str], default: str, known: tuple[str, ...]) -> str:
        value = sglang_args.value(self._argv, names) or default
        if value not in known:
            raise NotUnderstood(f"argv holds {names[0]} {value}, and shapes are only known for {' and '.join(known)}")
        return value

    def _size(self, name: str) -> int:
        if self._count(name) < 1:
            raise NotUnderstood(f"config.json has no {name}")
        return self._count(name)

    def _count(self, name: str) -> int:
        value = self._config.get(name)
        if value is None:
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise NotUnderstood(f"config.json: {name} is {value!r}"[:120])
        return value

    @staticmethod
    def _split(whole: int, parts: int, what: str, by: str) -> int:
        if parts < 1 or whole % parts:
            raise NotUnderstood(f"{what} ({whole}) cannot be divided by {by} ({parts})")
        return whole // parts


def _overrides(argv: Sequence[str]) -> dict[str, Any]:
    text = sglang_args.value(argv, sglang_args.OVERRIDES)
    try:
        overrides = json.loads(text or "{}")
    except (ValueError, RecursionError):
        overrides = None
    if not isinstance(overrides, dict):
        raise NotUnderstood(f"argv: {sglang_args.OVERRIDES[0]} is no JSON object")
    return overrides
