"""Inputs of property tests: garbage, valid documents with a few errors, and events.

The second kind finds more: a document that is right in all but one place gets past the first checks.
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from builder import events

EXAMPLES = int(os.environ.get("WARM_CACHE_EXAMPLES", "100"))

#: For every property. An example takes milliseconds; one that takes seconds hangs, whatever else the machine does.
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

#: What no message may hold: controls of terminals, newlines, turns of direction, and what no encoding takes.
HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> bool:
    """One line that any terminal, log and JSON reader takes."""
    return not HARMFUL.search(text)


# --- values ---

#: Strings that break readers which think of names, numbers and lines.
ODD_TEXTS = (
    "", " ", "\0", "\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\x85", "\u202e", "\u2028", "\ud800", "\udcff", "\U0010ffff",
    "..", "/", "a/../b", "x" * 300, "-", "--", "0", "nan", "١", "é", "%s", "{}", "'", '"', "\\",
)  # fmt: skip

texts = st.one_of(
    st.sampled_from(ODD_TEXTS), st.text(max_size=12), st.text(st.characters(categories=["Cc", "Cf", "Cs"]), max_size=4)
)
numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**300, 10**4000, 1e308, 5e-324]),
    st.integers(),
    st.floats(),
)


def nested(depth: int, kind: str = "list") -> Any:
    """A document of this depth."""
    value: Any = None
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


#: Stand for JSON that Python's writer does not write; see `written`.
DEEP, HUGE = "@deep@", "@huge@"

#: Any JSON document, and what Python's reader takes beyond JSON (NaN, lone surrogates).
documents = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, st.sampled_from([DEEP, HUGE])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
) | st.builds(nested, st.sampled_from([5, 60, 100]), st.sampled_from(["list", "dict"]))

#: Around the depths at which the readers and writers of Python 3.10 to 3.14 give up, whatever stack they stand on.
_depths = st.one_of(st.integers(850, 1000), st.sampled_from([3000, 50_000]))
_deep = st.one_of(
    _depths.map(lambda depth: b"[" * depth + b"1" + b"]" * depth),
    _depths.map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth),
)
_huge = st.sampled_from([b"9" * 4301, b"-" + b"9" * 5000, b"1e999", b"-1e999", b"9" * 400])


@st.composite
def written(draw: st.DrawFn, document: Any) -> bytes:
    """The document as JSON, its stand-ins as what they stand for."""
    text = json.dumps(document).encode("ascii")
    for name, real in ((DEEP, _deep), (HUGE, _huge)):
        if name.encode() in text:
            text = text.replace(f'"{name}"'.encode(), draw(real))
    return text


# --- mutations ---


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a document."""
    yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*above, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy in which ``change(parent, key)`` was called for the place at this path; the whole has no parent."""
    whole = {"": copy.deepcopy(value)}
    parent: Any = whole
    path = ("", *path)
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return whole.get("")


@st.composite
def mutated(draw: st.DrawFn, document: Any, within: Sequence[tuple[Any, ...]] = ((),)) -> Any:
    """The document with one to three places replaced, removed, renamed or doubled.

    within: paths below which places are chosen; one of them is drawn first, so that a small part gets its share.
    """
    for _ in range(draw(st.integers(1, 3))):
        below = draw(st.sampled_from(list(within)))
        everything = [path for path in places(document) if path[: len(below)] == below]
        if not everything:
            continue
        path = draw(st.sampled_from(everything))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "double"]))
        new, name = draw(documents), draw(texts)

        def change(parent: Any, key: Any, how: str = how, new: Any = new, name: str = name) -> None:
            if how == "remove":
                del parent[key]
            elif how == "rename" and isinstance(parent, dict):
                parent[name] = parent.pop(key)
            elif how == "double":
                parent[key] = [copy.deepcopy(parent[key]), copy.deepcopy(parent[key])]
            else:
                parent[key] = new

        document = changed(document, path, change)
    return document


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a few of them flipped, overwritten, removed, inserted or moved, or with the end cut off."""
    whole = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(whole) - 1)))
        size = draw(st.sampled_from([0, 1, 1, 2, 4, 8, 40]))
        how = draw(st.sampled_from(["flip", "flip", "write", "remove", "insert", "double", "cut"]))
        if how == "flip" and whole:
            whole[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "write":
            whole[at : at + size] = draw(
                st.one_of(st.binary(max_size=8), st.just(b"\0" * size), st.just(b"\xff" * size))
            )
        elif how == "remove":
            del whole[at : at + size]
        elif how == "insert":
            whole[at:at] = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"\0", b"\xff", b"\n", b"\r", b'"'])))
        elif how == "double":
            whole[at:at] = whole[at : at + size]
        elif how == "cut":
            del whole[at:]
    return bytes(whole)


def chunked(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The bytes in chunks of these sizes, over and over."""
    chunks, at = [], 0
    for number in range(len(data) + 1):
        if at >= len(data):
            break
        chunks.append(data[at : at + sizes[number % len(sizes)]])
        at += len(chunks[-1])
    return chunks


R = TypeVar("R")
E = TypeVar("E", bound=Exception)


def attempt(read: Callable[[], R], refusal: type[E]) -> tuple[R | None, E | None]:
    """Return what was read, or the documented refusal; both are right. Any other exception fails the test."""
    try:
        return read(), None
    except refusal as error:
        return None, error


# --- events ---

NONCE = "cafe0123"


def line_of(event: events.Event) -> bytes:
    return events.encode(NONCE, event)


PHASE, VERDICT = line_of(events.Phase("x")), line_of(events.Verdict(state="warmed"))
KINDS = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)]
NAMES = sorted(kind.wire_name for kind in KINDS if kind is not events.Event)


def field_values(hint: Any) -> st.SearchStrategy[Any]:
    """What a field of this type can hold."""
    origin, parts = get_origin(hint), get_args(hint)
    if type(None) in parts:
        return st.none() | field_values(parts[0])
    if origin is Literal:
        return st.sampled_from(parts)
    if origin is tuple:
        each = [field_values(part) for part in parts if part is not ...]
        return st.lists(each[0], max_size=3).map(tuple) if ... in parts else st.tuples(*each)
    if origin is collections.abc.Mapping:
        return st.dictionaries(st.text(max_size=4), field_values(parts[1]), max_size=3)
    simple = {
        str: st.text(max_size=8),
        int: st.integers(-(2**63) + 1, 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False, max_value=1e300),
        bool: st.booleans(),
        Any: st.none() | st.integers() | st.text(max_size=4),
    }
    return simple[hint]


def any_of(kind: type[events.Event]) -> st.SearchStrategy[events.Event]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{each.name: field_values(hints[each.name]) for each in dataclasses.fields(kind)})


any_event = st.sampled_from([kind for kind in KINDS if kind is not events.Event]).flatmap(any_of)
#: Lines with the name of an event and whatever fields.
lookalikes = st.builds(
    lambda name, fields: events.prefix(NONCE) + json.dumps({**fields, "event": name}).encode() + b"\n",
    st.sampled_from(NAMES),
    st.dictionaries(st.sampled_from(["done", "phase", "unit", "stdout", "families", "x"]), documents, max_size=3),
)
