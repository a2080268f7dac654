"""A server's command line: what it says, and what a recipe adds to it or takes away."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PORT = ("--port",)
API_KEY = ("--api-key",)
TENSOR_PARALLEL = ("--tp", "--tp-size", "--tensor-parallel-size")
PIPELINE_PARALLEL = ("--pp", "--pp-size", "--pipeline-parallel-size")
EXPERT_PARALLEL = ("--ep", "--ep-size", "--expert-parallel-size")
DATA_PARALLEL = ("--dp", "--dp-size", "--data-parallel-size")
DP_ATTENTION = "--enable-dp-attention"
#: sglang 0.5.23's word for both of them.
ATTENTION_DP = ("--attn-dp-size",)
CHUNKED_PREFILL = ("--chunked-prefill-size",)
LOAD_FORMAT = ("--load-format",)
DRAFT_LOAD_FORMAT = ("--speculative-draft-load-format",)
DRAFT_MODEL = ("--speculative-draft-model-path", "--speculative-draft-model")
LOADER_CONFIG = ("--model-loader-extra-config",)
OVERRIDES = ("--json-model-override-args",)
#: The first of several spellings of an option.
SPELLING = {
    name: names[0] for names in (TENSOR_PARALLEL, PIPELINE_PARALLEL, EXPERT_PARALLEL, DATA_PARALLEL) for name in names
}


def value(argv: Sequence[str], names: Sequence[str]) -> str | None:
    """The option's value, the last one where it is repeated (as argparse has it), or None."""
    found = None
    for at, word in enumerate(argv):
        name, equals, rest = word.partition("=")
        if name in names:
            if equals:
                found = rest
            elif at + 1 < len(argv):
                found = argv[at + 1]
    return found


def number(argv: Sequence[str], names: Sequence[str], default: int) -> int:
    """The option's value as a whole number; the default where it is missing or none."""
    try:
        return int(value(argv, names) or "")
    except ValueError:
        return default


def without(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The argv less these options and their values."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
            continue
        name, equals, _ = word.partition("=")
        if name in names:
            skip = not equals
            continue
        kept.append(word)
    return kept


def with_dummy_weights(argv: Sequence[str], overrides: Mapping[str, Any]) -> list[str]:
    """Random weights instead of a checkpoint, and a model configuration with these overrides.

    sglang refuses a loader configuration together with dummy weights. Overrides that argv has already win. Raises
    ValueError where those are no JSON object.
    """
    words = without(argv, (*LOAD_FORMAT, *DRAFT_LOAD_FORMAT, *LOADER_CONFIG))
    words += [LOAD_FORMAT[0], "dummy"]
    if overrides:
        given = json.loads(value(words, OVERRIDES) or "{}")
        if not isinstance(given, dict):
            raise ValueError(f"{OVERRIDES[0]} is not a JSON object")
        words = without(words, OVERRIDES)
        words += [OVERRIDES[0], json.dumps(_merged(overrides, given))]
    return words


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    made = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            made[key] = _merged(below[key], above[key])
    return made


def ranks(argv: Sequence[str]) -> int:
    """How many data-parallel ranks take requests."""
    return max(1, number(argv, DATA_PARALLEL, 1), number(argv, ATTENTION_DP, 1))


def chunked_prefill_size(argv: Sequence[str], default: int) -> int:
    """What a server makes of its flags: DP attention divides the size among its ranks."""
    size = number(argv, CHUNKED_PREFILL, default)
    ranks = number(argv, ATTENTION_DP, number(argv, DATA_PARALLEL, 1) if DP_ATTENTION in argv else 1)
    return size // ranks if ranks > 1 and size > 0 else size
