"""Every value that a run works with, and its origin: an option, a line of the manifest, or the default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from builder.manifest.document import Document, Path
from builder.manifest.fields import Key, keys_of
from builder.manifest.load import Manifest
from builder.manifest.schema import sections
from builder.manifest.task_keys import TaskTable
from builder.manifest.values import as_toml

Origin = Literal["option", "manifest", "defaults", "default"]


@dataclass(frozen=True)
class Setting:
    """One value of a run. The fields are keys of the JSON document.

    table: the section, or ``task LABEL``. value: as the manifest would have it; None: not set. origin: where it comes
    from; source: the flag, the variable, or ``FILE:LINE``. defaults: a line of [defaults].
    """

    table: str
    key: str
    value: Any
    origin: Origin
    source: str


def settings(manifest: Manifest, document: Document, given: Callable[[str], str | None]) -> Iterator[Setting]:
    """Yield every value, in the order of the reference.

    manifest: with all tasks of the document. given: returns the flag or the variable that gave an option's value, None
    where none did.
    """
    for name, section in sections().items():
        values = getattr(manifest, name)
        for key, declared in keys_of(section).items():
            yield _setting(f"[{name}]", key, declared, getattr(values, key), document, [(name, key)], given)
    for number, task in enumerate(manifest.tasks):
        for key, declared in keys_of(TaskTable).items():
            places: list[Path] = [("task", number, key), ("defaults", key)]
            yield _setting(f"task {task.label}", key, declared, getattr(task, key), document, places, given)


def _setting(
    table: str,
    key: str,
    declared: Key,
    value: Any,
    document: Document,
    places: list[Path],
    given: Callable[[str], str | None],
) -> Setting:
    shown = as_toml(declared.kind, value)
    option = given(declared.option) if declared.option and value is not None else None
    if option is not None:
        return Setting(table, key, shown, "option", option)
    for place in places:
        if _has(document.data, place):
            origin: Origin = "defaults" if place[0] == "defaults" else "manifest"
            return Setting(table, key, shown, origin, document.location(place))
    return Setting(table, key, shown, "default", "")


def _has(data: Any, place: Path) -> bool:
    try:
        for part in place:
            data = data[part]
    except (KeyError, IndexError, TypeError):
        return False
    return True
