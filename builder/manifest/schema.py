"""Generates ``schema.json`` for editors and ``docs/manifest.md`` for people, from the keys that dataclasses declare.

``python3 -m builder.manifest.schema`` writes both. The schema knows the type of every value; what only several keys
together make wrong is found by the parser alone.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from builder.manifest import load
from builder.manifest.document import Document
from builder.manifest.fields import Key, keys_of
from builder.manifest.task_keys import Defaults, TaskTable, arguments
from builder.manifest.values import as_toml

SCHEMA_FILE = Path(__file__).with_name("schema.json")
PAGE_FILE = Path(__file__).parents[1] / "docs" / "manifest.md"

_ARGS = "Groups of arguments that tasks share, by name. `@NAME` in `argv`, or in a later group, stands for the group."
_VERSION = "Version of the manifest's form."
_HEAD = """\
# The manifest

A TOML file, or the same document as JSON. Sections may stand in any order; `schema` and at least one `[[task]]` are
required. Every problem is reported at once, with its line.

Editors that read JSON Schema (taplo; in VS Code the extension *Even Better TOML*) check and complete a manifest whose
first line is `#:schema PATH`, with the path or the URL of `builder/manifest/schema.json`.

An option replaces the manifest's value, and `WARM_CACHE_<OPTION>` is the same as the option.

This page is generated: edit the fields in `builder/manifest/`, then run `python3 -m builder.manifest.schema`.

| value | form |
| --- | --- |
| duration | `"20m"`, `"1h30m"`, `"45s"`, `"14d"`, or a number of seconds; at most 365 days |
| size | `"32g"`, `"512MiB"` (powers of 1024), or a number of bytes |
"""


def sections() -> dict[str, type[Any]]:
    """Return the dataclass of every section, by the section's name."""
    hints = typing.get_type_hints(load.Manifest)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}


def schema() -> dict[str, Any]:
    """Return the manifest's JSON Schema (2020-12)."""
    tables = {name: _table(section) for name, section in sections().items()}
    task = {**_table(TaskTable), "required": [name for name, key in keys_of(TaskTable).items() if key.required]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Manifest of warm-cache",
        "type": "object",
        "properties": {
            "schema": {"const": load.SCHEMA, "description": _VERSION},
            **tables,
            "defaults": _table(Defaults),
            "args": {"type": "object", "description": _ARGS, "additionalProperties": arguments.schema},
            "task": {"type": "array", "items": task},
        },
        "required": ["schema", "task"],
        "additionalProperties": False,
    }


def page() -> str:
    """Return the reference page, in Markdown."""
    lines = [_HEAD]
    for name, section in sections().items():
        lines += [f"## [{name}]", "", _text(section), "", *_rows(section, keys_of(section)), ""]
    lines += ["## [defaults]", "", _text(Defaults), "", *_rows(Defaults, keys_of(Defaults)), ""]
    lines += ["## [args]", "", _ARGS, "", "```toml", "[args]", 'tp8 = ["--tp", "8"]', "```", ""]
    own = {name: key for name, key in keys_of(TaskTable).items() if name not in keys_of(Defaults)}
    lines += ["## [[task]]", "", f"{_text(TaskTable)} All keys of [defaults] may stand here, too.", ""]
    return "\n".join([*lines, *_rows(TaskTable, own), ""])


def write() -> None:
    SCHEMA_FILE.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE_FILE.write_text(page(), encoding="utf-8")


def _table(table: type[Any]) -> dict[str, Any]:
    properties = {name: _property(key, getattr(table, name)) for name, key in keys_of(table).items()}
    return {"type": "object", "description": _text(table), "properties": properties, "additionalProperties": False}


def _property(key: Key, default: object) -> dict[str, Any]:
    example = Document.parse("example", f"value = {key.example}".encode()).data["value"]
    found = {**key.kind.schema, "description": _meaning(key), "examples": [example]}
    if default not in (None, "") and not key.default and not key.required:
        found["default"] = as_toml(key.kind, default)
    return found


def _rows(table: type[Any], keys: Mapping[str, Key]) -> Iterator[str]:
    yield "| key | value | default | option | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for name, key in keys.items():
        option = f"`--{key.option.replace('_', '-')}`" if key.option else ""
        meaning = f"{_meaning(key)} E.g. `{key.example}`"
        yield f"| `{name}` | {key.kind.title} | {_default(key, getattr(table, name))} | {option} | {meaning} |"


def _default(key: Key, default: object) -> str:
    if key.required or key.default:
        return key.default or "required"
    return "not set" if default in (None, "") else f"`{json.dumps(as_toml(key.kind, default), ensure_ascii=False)}`"


def _meaning(key: Key) -> str:
    return key.text + (f" For the recipe {' or '.join(f'`{name}`' for name in key.recipes)}." if key.recipes else "")


def _text(table: type[Any]) -> str:
    return " ".join((table.__doc__ or "").split())


if __name__ == "__main__":
    write()
