"""What values of a manifest may be: converters that raise ValueError saying what is wanted and what was found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from builder.text import near

T = TypeVar("T")

#: Names whose values are secrets, and what an access token looks like: neither may reach a marker, a log or a message.
SECRET_NAME = re.compile(r"(.*_)?(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY|CREDENTIALS?)", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

#: Seconds. Nobody waits longer, and what threads and engines count in has an end as well.
LONGEST = 365 * 86400.0
#: Bytes, as engines count them.
LARGEST = (1 << 63) - 1

_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", re.ASCII
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(?:i?b)?|b)?", re.ASCII | re.IGNORECASE)
_KINDS = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a table"}


def seconds(value: object) -> float:
    """A duration of at most a year, ``"20m"``, ``"1h30m"``, ``"45s"`` or a number of seconds, in seconds. Raises
    ValueError."""
    wanted = 'a duration such as "20m", "1h30m", "45s", or a number of seconds'
    if isinstance(value, str) and value.strip():
        found = _DURATION.fullmatch(value.strip())
        if not found:
            raise ValueError(f"{wanted} is wanted, found {value!r}")
        parts = [float(part or 0) for part in found.groups()]
        total = parts[0] * 86400 + parts[1] * 3600 + parts[2] * 60 + parts[3]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        total = value
    else:
        raise ValueError(f"{wanted} is wanted, found {describe(value)}")
    if not 0 <= total <= LONGEST:
        raise ValueError(f"{wanted}, from 0 to 365 days, is wanted, found {describe(value)}")
    return float(total)


def size(value: object) -> int:
    """A size, ``"32g"``, ``"2GiB"`` (powers of 1024) or a number of bytes, in bytes. Raises ValueError."""
    wanted = 'a size such as "32g", "512MiB", or a number of bytes'
    number: float = -1
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())):
        number = float(found[1]) * 1024 ** " kmgt".index((found[2] or " ").lower())
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{wanted} is wanted, found {describe(value)}")
    return int(number)


def describe(value: object) -> str:
    """A value and its kind, for a message."""
    kind = next((name for type_, name in _KINDS.items() if isinstance(value, type_)), type(value).__name__)
    text = repr(value)
    return f"{kind}: {text}" if len(text) <= 60 else kind


def _a(kind: type[T], wanted: str) -> Callable[[Any], T]:
    def convert(value: Any) -> T:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{wanted} is wanted, found {describe(value)}")
        return value

    return convert


a_boolean = _a(bool, "true or false")
a_table: Callable[[Any], Mapping[str, Any]] = _a(dict, "a table")
_an_integer = _a(int, "an integer")
_a_string = _a(str, "a string")


def a_string(value: Any) -> str:
    """A string that is not empty and fits into an argument or an environment variable."""
    text = _a_string(value)
    if not text.strip() or "\0" in text:
        raise ValueError("a string with something in it is wanted, found " + repr(text))
    return text


def an_argument(value: Any) -> str:
    """Any string without NUL; an argument may be empty."""
    text = _a_string(value)
    if "\0" in text:
        raise ValueError("NUL cannot be part of an argument")
    return text


def count(value: Any) -> int:
    number = _an_integer(value)
    if number < 0:
        raise ValueError(f"a number of at least 0 is wanted, found {number}")
    return number


def positive(value: Any) -> int:
    number = _an_integer(value)
    if number < 1:
        raise ValueError(f"a number of at least 1 is wanted, found {number}")
    return number


def positive_seconds(value: Any) -> float:
    number = seconds(value)
    if number <= 0:
        raise ValueError(f"more than 0 seconds are wanted, found {value!r}")
    return number


def list_of(convert: Callable[[Any], T], what: str) -> Callable[[Any], tuple[T, ...]]:
    """A converter for lists; a wrong item is named by its position."""

    def items(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError(f"a list of {what} is wanted, found {describe(value)}")
        done = []
        for index, item in enumerate(value):
            try:
                done.append(convert(item))
            except ValueError as error:
                raise ValueError(f"item {index + 1}: {error}") from None
        return tuple(done)

    return items


def one_of(names: Iterable[str], what: str) -> Callable[[Any], str]:
    """A converter for one name out of a few."""
    known = tuple(names)

    def convert(value: Any) -> str:
        name = _a_string(value)
        if name not in known:
            raise ValueError(f"there is no {what} {name!r} ({near(name, known)})")
        return name

    return convert


def matching(pattern: re.Pattern[str], wanted: str) -> Callable[[Any], str]:
    """A converter for strings that match the whole pattern."""

    def convert(value: Any) -> str:
        text = a_string(value)
        if not pattern.fullmatch(text):
            raise ValueError(f"{wanted} is wanted, found {text!r}")
        return text

    return convert


def a_variable(value: Any) -> str:
    """The name of an environment variable. A value pasted in its place is not repeated in the message."""
    text = a_string(value)
    if SECRET_VALUE.search(text):
        raise ValueError("the NAME of an environment variable is wanted, found a secret's value")
    if not VARIABLE.fullmatch(text):
        raise ValueError(f"the NAME of an environment variable is wanted, found {text!r}")
    return text
