"""Dummy weights: a model of full width and few layers, without reading a checkpoint.

Everything that a kernel's shape depends on (hidden sizes, heads, experts, parallelism) is kept; only the number of
layers shrinks. So one layer of every *kind* must be kept: dense and MoE layers, and one of each combination that the
per-layer lists of config.json distinguish. Draft layers (``num_nextn_predict_layers``) are separate: all are kept.

Sources: sglang 0.5.11 to 0.5.23 (``hf_transformers/config.py`` applies the overrides, to the draft model as well, and
merges those of a sub-configuration from 0.5.23 on; the models' ``is_layer_sparse`` and its like), and the config.json
of DeepSeek V3 to V3.2, GLM-5 and 5.2, MiMo-V2-Flash and V2.5, Qwen3-MoE and Qwen3-Next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from builder import sglang_args
from builder.task import Task

LAYERS = "num_hidden_layers"
#: More layers than this are a mistake in config.json.
MOST_LAYERS = 10_000
#: Sub-configurations of models of several parts, for the language model.
PARTS = ("text_config", "llm_config", "language_config")
#: Lists and tables that are not per layer, whatever their length.
_OTHERS = ("architectures", "auto_map", "quantization_config", "rope_scaling", "rope_parameters")


class TooFewLayersError(ValueError):
    """Too few layers to keep one of every kind. The message has the number needed."""


def task_of(task: Task, config: Mapping[str, Any] | None) -> Task:
    """Return the task as it runs with dummy weights. Raises TooFewLayersError.

    config: the model's config.json; None if it cannot be read.
    """
    overrides: dict[str, Any] = {}
    if task.layers is not None:
        overrides = {LAYERS: task.layers} if config is None else few_layers(config, task.layers)
    return replace(task, load="dummy", argv=tuple(sglang_args.with_dummy_weights(task.argv, overrides)))


def describe(task: Task) -> str:
    """Return the kind of weights, for people."""
    kept = "" if task.layers is None else f", {task.layers} layers" if task.layers > 1 else ", 1 layer"
    return f"dummy weights{kept}"


def few_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return overrides of config.json that keep `layers` layers, one of every kind among them.

    Empty if the model has no more layers than that. Raises TooFewLayersError.
    """
    if LAYERS not in config:
        for name in PARTS:
            if isinstance(config.get(name), Mapping) and LAYERS in config[name]:
                return {name: inner} if (inner := few_layers(config[name], layers)) else {}
        return {LAYERS: layers}
    total = config[LAYERS]
    if not isinstance(total, int) or total <= layers:
        return {}
    if total > MOST_LAYERS:
        raise TooFewLayersError(f"config.json names more than {MOST_LAYERS} layers, which no model has")
    lists = _per_layer(config, total)
    sparse = _is_sparse(config)
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in range(total):
        kinds.setdefault((sparse(layer), *(json.dumps(values[layer]) for values in lists.values())), layer)
    # `full_attention_interval` = n puts full attention on every n-th layer: keep one full and one linear layer.
    interval = config.get("full_attention_interval")
    if not isinstance(interval, int) or "layer_types" in config:
        interval = 1
    needed = max(len(kinds), min(interval, 2))
    if needed > layers:
        raise TooFewLayersError(f"layers = {layers} is too few: the model has {needed} kinds of layers")
    kept = set(kinds.values())
    kept |= set([layer for layer in range(total) if layer not in kept][: layers - len(kept)])
    # Dense layers come first where config.json has only their number.
    order = sorted(kept, key=lambda layer: (sparse(layer), layer) if "first_k_dense_replace" in config else layer)
    dense = [at for at, layer in enumerate(order) if not sparse(layer)]
    made: dict[str, Any] = {LAYERS: layers}
    for path, values in lists.items():
        _put(made, config, path, _cut(values, order, total))
    if isinstance(config.get("first_k_dense_replace"), int):
        made["first_k_dense_replace"] = len(dense)
        if isinstance(config.get("moe_layer_freq"), int):
            made["moe_layer_freq"] = 1
    elif isinstance(config.get("decoder_sparse_step"), int):
        made |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if interval > 1:
        made["full_attention_interval"] = min(interval, layers)
    return made


def _per_layer(config: Mapping[str, Any], total: int) -> dict[tuple[str, ...], Sequence[Any]]:
    """Return lists (and patterns: strings) with one value per layer, by path; draft layers may follow the others."""
    drafts = config.get("num_nextn_predict_layers")
    lengths = {total, total + (drafts if isinstance(drafts, int) else 0)}
    found: dict[tuple[str, ...], Sequence[Any]] = {}
    for name, value in config.items():
        if name in _OTHERS or name.endswith(("token_id", "token_ids")):
            continue
        inside = value.items() if isinstance(value, Mapping) else ()
        for path, values in [((name,), value), *(((name, inner), values) for inner, values in inside)]:
            listed = isinstance(values, list) or (isinstance(values, str) and path[-1].endswith("pattern"))
            if listed and len(values) in lengths:
                found[path] = values
    return found


def _is_sparse(config: Mapping[str, Any]) -> Callable[[int], bool]:
    """Return a function that separates MoE layers from dense ones, as sglang's models do."""
    frequency, first = config.get("moe_layer_freq"), config.get("first_k_dense_replace")
    if isinstance(first, int):
        every = frequency if isinstance(frequency, int) and frequency > 0 else 1
        return lambda layer: layer >= first and layer % every == 0
    step, only = config.get("decoder_sparse_step"), config.get("mlp_only_layers")
    only = only if isinstance(only, list) else ()
    if isinstance(step, int) and step > 0:
        return lambda layer: layer not in only and (layer + 1) % step == 0
    return lambda layer: True  # all alike, or distinguished by a list


def _cut(values: Sequence[Any], order: Sequence[int], total: int) -> Any:
    kept = [*(values[layer] for layer in order), *values[total:]]
    return "".join(kept) if isinstance(values, str) else kept


def _put(made: dict[str, Any], config: Mapping[str, Any], path: tuple[str, ...], values: Any) -> None:
    if len(path) == 1:
        made[path[0]] = values
    else:  # a plain table is replaced as a whole
        made.setdefault(path[0], dict(config[path[0]]))[path[1]] = values
