"""A server's command line: the one reader of its options, and what a recipe adds to it or removes from it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PORT = ("--port",)
API_KEY = ("--api-key",)
TENSOR_PARALLEL = ("--tp", "--tp-size", "--tensor-parallel-size")
PIPELINE_PARALLEL = ("--pp", "--pp-size", "--pipeline-parallel-size")
EXPERT_PARALLEL = ("--ep", "--ep-size", "--expert-parallel-size")
DATA_PARALLEL = ("--dp", "--dp-size", "--data-parallel-size")
DP_ATTENTION = "--enable-dp-attention"
#: Of sglang 0.5.23, for both of them.
ATTENTION_DP = ("--attn-dp-size",)
DISAGGREGATION = ("--disaggregation-mode",)
CHUNKED_PREFILL = ("--chunked-prefill-size",)
LOAD_FORMAT = ("--load-format",)
DRAFT_LOAD_FORMAT = ("--speculative-draft-load-format",)
DRAFT_MODEL = ("--speculative-draft-model-path", "--speculative-draft-model")
LOADER_CONFIG = ("--model-loader-extra-config",)
OVERRIDES = ("--json-model-override-args",)
#: Spelling of an option → its first spelling. Markers hold argvs in first spellings: a new row makes tasks cold.
SPELLING = {
    name: names[0] for names in (TENSOR_PARALLEL, PIPELINE_PARALLEL, EXPERT_PARALLEL, DATA_PARALLEL) for name in names
}
#: Options that give a degree of parallelism, by its short name.
PARALLELISM = {
    "tp": TENSOR_PARALLEL,
    "pp": PIPELINE_PARALLEL,
    "dp": (*DATA_PARALLEL, *ATTENTION_DP),
    "ep": EXPERT_PARALLEL,
}
#: Degrees from here on are mistakes.
_TOO_MANY = 10_000

_NUMBER = re.compile(r"-\.?\d")


@dataclass(frozen=True)
class Option:
    """One option of a command line, with the words up to the next one."""

    name: str  # in its first spelling
    spelt: str  # as it stands in argv
    values: tuple[str, ...]
    words: tuple[str, ...]  # all of it, as it stands in argv


def split(argv: Iterable[str]) -> tuple[list[str], list[Option], list[str]]:
    """Split argv into the words before the first option, the options, and ``--`` with what follows it."""
    words = list(argv)
    rest = words[words.index("--") :] if "--" in words else []
    front: list[str] = []
    groups: list[list[str]] = []
    for word in words[: len(words) - len(rest)]:
        if _is_option(word):
            groups.append([word])
        else:
            (groups[-1] if groups else front).append(word)
    return front, [_option(group) for group in groups], rest


def _option(words: Sequence[str]) -> Option:
    spelt, equals, value = words[0].partition("=")
    values = (value, *words[1:]) if equals else tuple(words[1:])
    return Option(SPELLING.get(spelt, spelt), spelt, values, tuple(words))


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _NUMBER.match(word)


def normalised(argv: Iterable[str]) -> list[str]:
    """Return one spelling for argvs that mean the same to an option parser.

    ``--a=b`` becomes ``--a b``, and ``--tp-size`` becomes ``--tp``; options are sorted by name; repeated ones keep
    their order, because the last one counts. A value that looks like an option (``--a=--b``) keeps its equals sign.
    """
    front, options, rest = split(argv)
    words = (_normalised(option) for option in sorted(options, key=lambda option: option.name))
    return [*front, *itertools.chain.from_iterable(words), *rest]


def _normalised(option: Option) -> list[str]:
    _, equals, value = option.words[0].partition("=")
    if equals and (_is_option(value) or not option.spelt.startswith("--")):
        return [f"{option.name}={value}", *option.words[1:]]
    return [option.name, *option.values]


def names(argv: Sequence[str]) -> set[str]:
    """Return the options that argv has, as they are spelt there."""
    return {option.spelt for option in split(argv)[1]}


def value(argv: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the option's value, the last one if it is repeated (as argparse does); None if it has none.

    names: its spellings.
    """
    found = None
    for option in split(argv)[1]:
        if option.spelt in names and option.values:
            found = option.values[0]
    return found


def number(argv: Sequence[str], names: Sequence[str], default: int) -> int:
    """Return the option's value as a whole number; the default if it is missing or is no number."""
    try:
        return int(value(argv, names) or "")
    except ValueError:
        return default


def degree(argv: Sequence[str], name: str) -> int:
    """Return the degree of tp, pp, dp or ep that argv sets; 1 where it sets none."""
    found = number(argv, PARALLELISM[name], 1)
    return found if 0 < found < _TOO_MANY else 1


def without(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return argv without these options, each of which has one value."""
    front, options, rest = split(argv)
    kept: list[str] = []
    for option in options:
        kept += option.values[1:] if option.spelt in names else option.words
    return [*front, *kept, *rest]


def with_dummy_weights(argv: Sequence[str], overrides: Mapping[str, Any]) -> list[str]:
    """Return argv with random weights instead of a checkpoint, and with these overrides of config.json.

    sglang refuses a loader configuration together with dummy weights. Overrides that argv has already take precedence.
    Raises ValueError if those are no JSON object.
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
    """Return the number of data-parallel ranks that take requests."""
    return max(1, number(argv, DATA_PARALLEL, 1), number(argv, ATTENTION_DP, 1))


def chunked_prefill_size(argv: Sequence[str], default: int) -> int:
    """Return the size of a server with these options: DP attention divides it among its ranks."""
    size = number(argv, CHUNKED_PREFILL, default)
    ranks = number(argv, ATTENTION_DP, number(argv, DATA_PARALLEL, 1) if DP_ATTENTION in names(argv) else 1)
    return size // ranks if ranks > 1 and size > 0 else size
