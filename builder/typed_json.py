"""Frozen dataclasses out of JSON objects, for what crosses the border between the builder and its in-container program.

Strict: a field that is missing, unknown or of another type is an error that names it. Types understood are str, bool,
int, float, Literal, Optional, tuples, Mapping with string keys, and dataclasses of these.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

#: Larger integers overflow where they are compared with a float or formatted.
_MOST = 2**63
_KNOWN: dict[type[Any], dict[str, tuple[Any, bool]]] = {}


def from_object(kind: type[T], data: Mapping[str, Any], name: str, *, floats: tuple[float, float] | None = None) -> T:
    """Build a `kind` from a JSON object. Raises ValueError that names the wrong field.

    name: of the object, for messages.
    floats: the least number and the first one too large, for every float in it; None: any finite number.
    """
    known = _fields(kind)
    for given in data:
        if given not in known:
            raise ValueError(f"{name} has no field {given[:40]!r}")
    for field_name, (_, is_required) in known.items():
        if is_required and field_name not in data:
            raise ValueError(f"{name} needs {field_name!r}")
    limits = floats or (-sys.float_info.max, sys.float_info.max)
    return kind(**{given: _value(known[given][0], value, given, limits) for given, value in data.items()})


def _fields(kind: type[Any]) -> dict[str, tuple[Any, bool]]:
    """Each field's type, and whether it has no default."""
    if kind not in _KNOWN:
        hints = get_type_hints(kind)
        _KNOWN[kind] = {
            each.name: (hints[each.name], each.default is MISSING and each.default_factory is MISSING)
            for each in fields(kind)
        }
    return _KNOWN[kind]


def _value(kind: Any, value: Any, name: str, floats: tuple[float, float]) -> Any:
    """Convert one JSON value to a field's type."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if type(None) in parts:
        return None if value is None else _value(parts[0], value, name, floats)
    if origin is Literal:
        if value in parts and isinstance(value, str):
            return value
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return from_object(kind, value, name, floats=floats)
    elif origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) == len(value):
            return tuple(_value(inner, item, name, floats) for inner, item in zip(kinds, value, strict=True))
    elif origin is Mapping and isinstance(value, dict):
        return {key: _value(parts[1], item, name, floats) for key, item in value.items()}
    elif kind is float and type(value) in (int, float):
        if floats[0] <= value < floats[1]:
            return float(value)
    elif kind is int and type(value) is int:
        if abs(value) < _MOST:
            return value
    elif kind in (str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{name} is not of its kind")
