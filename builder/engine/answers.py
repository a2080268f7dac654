"""Answers of an engine as values of known types: what answers at an address may be anything.

Each function raises ForeignAnswerError for what no engine answers. That is a ValueError, which `EngineConnection`
turns into an EngineLostError with the request's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from builder.text import readable, shortened

#: Fields of an engine's description that are used, with their types. An engine leaves out what it does not know.
_INFO: Mapping[str, type | tuple[type, ...]] = {
    "BuildahVersion": str,
    "CgroupDriver": str,
    "CgroupVersion": str,
    "DiscoveredDevices": list,
    "DockerRootDir": str,
    "ID": str,
    "KernelVersion": str,
    "LiveRestoreEnabled": bool,
    "MemTotal": int,
    "Name": str,
    "Runtimes": dict,
    "SecurityOptions": list,
    "ServerVersion": str,
    "SystemTime": str,
}
#: Characters of a foreign answer that a message repeats.
_SHOWN = 200


class ForeignAnswerError(ValueError):
    """This is no answer of an engine."""

    def __init__(self, found: object, wanted: str) -> None:
        shown = "nothing" if found is None else shortened(readable(" ".join(repr(found).split())), 60)
        super().__init__(f"what answered is no container engine: {wanted} was expected, found {shown}")


def an_object(value: object) -> Mapping[str, Any]:
    """Return a JSON object."""
    if not isinstance(value, dict):
        raise ForeignAnswerError(value, "an object")
    return value


def objects(value: object) -> list[Mapping[str, Any]]:
    """Return a list of JSON objects; null is the empty list in Go."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ForeignAnswerError(value, "a list")
    return [an_object(each) for each in value]


def inner(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the object in a field; empty where it is null or missing."""
    return {} if found.get(name) is None else an_object(found[name])


def text(found: Mapping[str, Any], name: str) -> str:
    """Return the text of a field; "" where it is null or missing."""
    value = found.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ForeignAnswerError(value, f"text as {name}")
    return value


def required_text(found: Mapping[str, Any], name: str) -> str:
    """Return the text of a field that every engine sets."""
    value = text(found, name)
    if not value:
        raise ForeignAnswerError(found, f"an object with {name}")
    return value


def number(found: Mapping[str, Any], name: str) -> int:
    """Return the number of a field; 0 where it is null or missing."""
    value = found.get(name)
    if value is None:
        return 0
    if not isinstance(value, int):
        raise ForeignAnswerError(value, f"a number as {name}")
    return value


def texts(found: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the texts of a field; none where it is null or missing."""
    value = found.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ForeignAnswerError(value, f"a list of texts as {name}")
    return tuple(value)


def text_map(found: Mapping[str, Any], name: str) -> Mapping[str, str]:
    """Return the object of texts in a field; empty where it is null or missing."""
    value = inner(found, name)
    if not all(isinstance(each, str) for each in value.values()):
        raise ForeignAnswerError(value, f"texts in {name}")
    return value


def description(value: object) -> Mapping[str, Any]:
    """Return an engine's description of itself, in which the fields that this program uses have their types."""
    info = an_object(value)
    for name, kind in _INFO.items():
        if info.get(name) is not None and not isinstance(info[name], kind):
            raise ForeignAnswerError(info[name], f"another type as {name}")
    return info


def explanation(body: bytes) -> str:
    """Return the reason in a refusal's body: the engine's message, else the beginning of what is there."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = body.decode("utf-8", "replace")
    if isinstance(found, dict):
        found = next((found[name] for name in ("message", "error", "cause") if found.get(name)), found)
    words = found if isinstance(found, str) else json.dumps(found)
    return shortened(" ".join(readable(words.replace("\n", " ")).split()), 10 * _SHOWN if found else _SHOWN)
