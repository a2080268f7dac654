"""The keys of a task, and of [defaults] for all tasks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.cache.families import CLAIMABLE, FAMILY
from builder.manifest.fields import key
from builder.manifest.values import (
    VARIABLE,
    Kind,
    a_string,
    a_table,
    an_argument,
    count,
    describe,
    kind,
    list_of,
    one_of,
    positive,
    positive_seconds,
)
from builder.task import RECIPES, Shape, Task
from builder.text import printable

LOADS = ("weights", "dummy", "dummy-then-weights")
SHAPES_FROM = ("config", "markers")
VERIFY = ("second-pass", "steady", "inventory")

#: Recipes that start a server with the task's argv.
SERVERS = tuple(name for name, recipe in RECIPES.items() if recipe.server)
EXAMPLE_SHAPE = Shape("GEMM_NT_F8F8BF16", 4096, 7168)

arguments = list_of(an_argument, "arguments")


@kind("name of a family", enum=[family.name for family in CLAIMABLE])
def family_name(value: Any) -> str:
    name = one_of(FAMILY, "family")(value)
    if not FAMILY[name].claimable:
        raise ValueError(f"the family {name!r} cannot be claimed: its entries depend on the driver alone")
    return name


@kind("shape", type="string")
def shape(value: Any) -> Shape:
    return Shape.parse(a_string(value))


@kind(
    " and ".join(f'`"{name}"`' for name in SHAPES_FROM) + ", one or a list",
    anyOf=[{"enum": list(SHAPES_FROM)}, {"type": "array", "items": {"enum": list(SHAPES_FROM)}}],
)
def shape_sources(value: Any) -> tuple[str, ...]:
    """One source of shapes, or a list of them; a repeated one counts once."""
    source = one_of(SHAPES_FROM, "source of shapes")
    sources = (source(value),) if isinstance(value, str) else list_of(source, "sources of shapes")(value)
    return tuple(dict.fromkeys(sources))


@kind("pair of integers", type="array", items=positive.schema, minItems=2, maxItems=2)
def request(value: Any) -> tuple[int, int]:
    numbers = list_of(positive, "two numbers")(value)
    if len(numbers) != 2:
        raise ValueError(f"expected [prompt tokens, new tokens], found {describe(value)}")
    return numbers[0], numbers[1]


@kind("regular expression", type="string", pattern=r"\S")
def regexp(value: Any) -> str:
    """A pattern that compiles as the container will compile it: over bytes."""
    text = a_string(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that a later Python may read in another way
            re.compile(text.encode(), re.MULTILINE)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"{text!r} is no regular expression: {printable(str(error))}") from None
    return text


variables: Kind[Mapping[str, Any]] = Kind(
    a_table,
    "table of strings",
    {
        "type": "object",
        "propertyNames": {"pattern": f"^{VARIABLE.pattern}$"},
        "additionalProperties": {"type": ["string", "integer"]},
    },
)


@dataclass(kw_only=True, eq=False, repr=False)
class Defaults:
    """Values for every task that does not set the key itself. `env` is merged, variable by variable."""

    recipe: str = key(
        one_of(RECIPES, "recipe"),
        "compile-deep-gemm",
        "What compiles: sglang's own warm-up of DeepGEMM, a server with requests, a list of shapes, or any command.",
        '"serve"',
    )
    env: Mapping[str, str] | None = key(
        variables,
        None,
        "Environment of the task. Variables that the builder sets, and secrets, are refused.",
        '{ SGLANG_JIT_DEEPGEMM_FAST_WARMUP = "1" }',
    )
    gpus: int = key(count, 0, "How many GPUs the task needs.", "4", default_text="`[gpus] count`")
    timeout: float = key(positive_seconds, Task.timeout, "How long the task may take.", '"30m"', option="timeout")
    silence: float = key(
        positive_seconds, Task.silence, "How long the task may write nothing to its log.", '"5m"', option="silence"
    )
    requests: tuple[tuple[int, int], ...] = key(
        list_of(request, "[prompt tokens, new tokens] pairs"),
        Task.requests,
        "Requests sent to the server: [prompt tokens, new tokens].",
        "[[1024, 8]]",
        recipes=("serve",),
    )
    m_values: tuple[int, ...] = key(
        list_of(positive, "values of M"),
        Task.m_values,
        "Values of M that are compiled; empty: sglang's own list.",
        "[64, 128]",
        recipes=("shapes",),
    )
    workers: int = key(
        count,
        Task.workers,
        "How many processes compile shapes; 0: one per GPU, or per CPU core where the task has no GPU.",
        "8",
        recipes=("shapes", "compile-deep-gemm"),
    )
    load: str = key(
        one_of(LOADS, "way to load"),
        Task.load,
        "Read the checkpoint, use random weights, or read it only where random weights prove too little.",
        '"dummy"',
        recipes=SERVERS,
    )
    layers: int | None = key(
        positive,
        Task.layers,
        'How many layers of the model stay, with `load = "dummy"`; not set: all.',
        "4",
        recipes=SERVERS,
    )
    verify: str = key(
        one_of(VERIFY, "way to verify"),
        Task.verify,
        "Proof of success: a second process compiles nothing, repeated requests do not, or entries are on disk.",
        '"steady"',
    )
    families: tuple[str, ...] | None = key(
        list_of(family_name, "family names"),
        Task.families,
        "Cache families that must hold entries afterwards.",
        '["deep_gemm", "triton"]',
        default_text="what the recipe requires",
    )


@dataclass(kw_only=True, eq=False, repr=False)
class TaskTable(Defaults):
    """One warm-up: a model, and how a server or command compiles its kernels. At least one is required."""

    model: str = key(a_string, "", "The model: its name in the store or a path.", '"org/model"', required=True)
    revision: str | None = key(
        a_string, Task.revision, "Revision of the model; not set: the store's main one.", '"0123456789abcdef"'
    )
    argv: tuple[str, ...] = key(
        arguments,
        Task.argv,
        "Arguments of the server or the command, without the model. `@NAME` stands for a group of [args], `@@` for @.",
        '["@tp8", "--mem-fraction-static", "0.85"]',
    )
    success: str | None = key(
        regexp, Task.success, "Regular expression (Python, multi-line) that must match in the log.", '"KERNELS READY"'
    )
    shapes: tuple[Shape, ...] = key(
        list_of(shape, "shapes"),
        Task.shapes,
        "DeepGEMM shapes to compile, written as sglang logs them.",
        f'["{EXAMPLE_SHAPE}"]',
        recipes=("shapes",),
    )
    shapes_from: tuple[str, ...] = key(
        shape_sources,
        Task.shapes_from,
        "Where more shapes come from: the model's config.json, or the markers of its earlier runs.",
        '"config"',
        recipes=("shapes",),
    )
