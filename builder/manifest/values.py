"""Kinds of values in a manifest: each converts what TOML or JSON holds, and has a JSON Schema.

A converter raises ValueError with what was expected and what was found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from builder.text import did_you_mean

T = TypeVar("T")

#: Names of variables that hold secrets, and the form of an access token: neither may reach a marker, log or message.
SECRET_NAME = re.compile(r"(.*_)?(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY|CREDENTIALS?)", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

#: The longest duration in seconds: threads and engines cannot count much further.
LONGEST = 365 * 86400.0
#: The largest size in bytes, as engines count them.
LARGEST = (1 << 63) - 1

#: Both patterns are also part of the JSON Schema: only what Python and ECMA 262 read alike.
_DURATION = (
    r"(?:([0-9]+(?:\.[0-9]+)?)d)?(?:([0-9]+(?:\.[0-9]+)?)h)?(?:([0-9]+(?:\.[0-9]+)?)m)?(?:([0-9]+(?:\.[0-9]+)?)s?)?"
)
_SIZE = r"([0-9]+(?:\.[0-9]+)?) ?(?:([kKmMgGtT])(?:[iI]?[bB])?|[bB])?"
_TYPES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a table"}
#: The longest value in characters that a message repeats.
_SHOWN = 60


class Kind(Generic[T]):
    """A kind of value: called with a value of a manifest, it returns the converted one or raises ValueError.

    title: its name in the reference. schema: the JSON Schema of the values that it accepts.
    """

    def __init__(self, convert: Callable[[Any], T], title: str, schema: Mapping[str, Any]) -> None:
        self.convert = convert
        self.title = title
        self.schema = schema

    def __call__(self, value: Any) -> T:
        return self.convert(value)


def kind(title: str, **schema: Any) -> Callable[[Callable[[Any], T]], Kind[T]]:
    """Decorate a converter: make it a kind with this title and JSON Schema."""
    return lambda convert: Kind(convert, title, schema)


@kind(
    "duration",
    type=["string", "number"],
    minimum=0,
    maximum=int(LONGEST),
    pattern=rf"^\s*(?=[0-9]){_DURATION}\s*$",
)
def seconds(value: Any) -> float:
    """Seconds of a duration of at most a year: ``"20m"``, ``"1h30m"``, ``"45s"`` or a number of seconds."""
    expected = 'expected a duration such as "20m", "1h30m", "45s", or a number of seconds'
    if isinstance(value, str) and value.strip():
        found = re.fullmatch(_DURATION, value.strip())
        if not found:
            raise ValueError(f"{expected}, found {value!r}")
        days, hours, minutes, rest = (float(part or 0) for part in found.groups())
        total = days * 86400 + hours * 3600 + minutes * 60 + rest
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        total = value
    else:
        raise ValueError(f"{expected}, found {describe(value)}")
    if not 0 <= total <= LONGEST:
        raise ValueError(f"{expected}, from 0 to 365 days, found {describe(value)}")
    return float(total)


@kind("duration above 0", **{**seconds.schema, "exclusiveMinimum": 0})
def positive_seconds(value: Any) -> float:
    """Seconds, as `seconds` reads them, but not 0."""
    number = seconds(value)
    if number <= 0:
        raise ValueError(f"expected more than 0 seconds, found {value!r}")
    return number


@kind("size", type=["string", "integer"], minimum=0, maximum=LARGEST, pattern=rf"^\s*{_SIZE}\s*$")
def size(value: Any) -> int:
    """Bytes of a size: ``"32g"``, ``"2GiB"`` (powers of 1024) or a number of bytes."""
    number: float = -1
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and (found := re.fullmatch(_SIZE, value.strip())):
        number = float(found[1]) * 1024 ** " kmgt".index((found[2] or " ").lower())
    if not 0 <= number <= LARGEST:
        raise ValueError(f'expected a size such as "32g", "512MiB", or a number of bytes, found {describe(value)}')
    return int(number)


def describe(value: object) -> str:
    """Return the value's type and the value, for a message; of a long value the type alone."""
    name = next((name for type_, name in _TYPES.items() if isinstance(value, type_)), type(value).__name__)
    text = repr(value)
    return f"{name}: {text}" if len(text) <= _SHOWN else name


def _instance(type_: type[T], expected: str) -> Callable[[Any], T]:
    def convert(value: Any) -> T:
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            raise ValueError(f"expected {expected}, found {describe(value)}")
        return value

    return convert


a_boolean = Kind(_instance(bool, "true or false"), "boolean", {"type": "boolean"})
a_table: Kind[Mapping[str, Any]] = Kind(_instance(dict, "a table"), "table", {"type": "object"})
_an_integer = _instance(int, "an integer")
_a_string = _instance(str, "a string")


@kind("string", type="string", pattern=r"\S")
def a_string(value: Any) -> str:
    """A string that is not blank and fits into an argument or an environment variable."""
    text = _a_string(value)
    if not text.strip() or "\0" in text:
        raise ValueError(f"expected a string that is not blank and has no NUL, found {text!r}")
    return text


@kind("string", type="string")
def an_argument(value: Any) -> str:
    """Any string without NUL; an argument may be empty."""
    text = _a_string(value)
    if "\0" in text:
        raise ValueError("NUL cannot be part of an argument")
    return text


@kind("integer from 0", type="integer", minimum=0)
def count(value: Any) -> int:
    number = _an_integer(value)
    if number < 0:
        raise ValueError(f"expected a number of at least 0, found {number}")
    return number


@kind("integer from 1", type="integer", minimum=1)
def positive(value: Any) -> int:
    number = _an_integer(value)
    if number < 1:
        raise ValueError(f"expected a number of at least 1, found {number}")
    return number


def list_of(item: Kind[T], names: str) -> Kind[tuple[T, ...]]:
    """Return the kind for lists of these items. names: what the items are, in the plural."""

    @kind(f"list of {names}", type="array", items=item.schema)
    def convert(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            hint = f"; write {toml(value.split())}" if names == "arguments" and isinstance(value, str) else ""
            raise ValueError(f"expected a list of {names}, found {describe(value)}{hint}")
        done = []
        for index, each in enumerate(value):
            try:
                done.append(item(each))
            except ValueError as error:
                raise ValueError(f"item {index + 1}: {error}") from None
        return tuple(done)

    return convert


def one_of(names: Iterable[str], what: str, *, guess: bool = True) -> Kind[str]:
    """Return the kind for one of a few names. what: what the names are of, for messages.

    guess: whether a wrong one is probably a misspelt one; else all are named.
    """
    known = tuple(names)

    @kind(" or ".join(f'`"{name}"`' for name in known) if len(known) < 5 else "name", enum=list(known))
    def convert(value: Any) -> str:
        name = _a_string(value)
        if name not in known:
            hint = did_you_mean(name, known) if guess else f"known: {', '.join(known)}"
            raise ValueError(f"there is no {what} {name!r} ({hint})")
        return name

    return convert


def matching(pattern: str, what: str) -> Kind[str]:
    """Return the kind for strings that match the whole pattern, which ECMA 262 has to read as Python does."""

    @kind(what.partition(" ")[2], type="string", pattern=f"^(?:{pattern})$")
    def convert(value: Any) -> str:
        text = a_string(value)
        if not re.fullmatch(pattern, text):
            raise ValueError(f"expected {what}, found {text!r}")
        return text

    return convert


@kind("name of a variable", type="string", pattern=f"^{VARIABLE.pattern}$")
def a_variable(value: Any) -> str:
    """The name of an environment variable. A secret in its place is not repeated in the message."""
    text = a_string(value)
    if SECRET_VALUE.search(text):
        raise ValueError("expected the NAME of an environment variable, found a secret's value")
    if not VARIABLE.fullmatch(text):
        raise ValueError(f"expected the NAME of an environment variable, found {text!r}")
    return text


def as_toml(kind: Kind[Any], value: Any) -> Any:
    """Return a converted value as a manifest would have it: durations and sizes with their units, the rest as text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if kind in (seconds, positive_seconds):
        units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
        return next((f"{value / length:.0f}{unit}" for unit, length in units if value and not value % length), value)
    if kind is size:
        units = (("t", 1 << 40), ("g", 1 << 30), ("m", 1 << 20), ("k", 1 << 10))
        return next((f"{value // length}{unit}" for unit, length in units if value and not value % length), value)
    if isinstance(value, (tuple, list)):
        return [as_toml(kind, each) if isinstance(each, tuple) else _plain(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return _plain(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def toml(value: Any) -> str:
    """Return the text of a value that `as_toml` returned, for one line of a manifest."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {toml(each)}" for name, each in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    # A string of JSON is one of TOML, but that TOML wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
