"""The reference of the JSON documents of ``--json``, from the dataclasses that they are made of."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder.cli.verbs import VERBS
from builder.report.results import JSON_SCHEMA, GpuResult, Section, Text

#: Packages whose modules define sections.
_PACKAGES = ("builder.report", "builder.run", "builder.cli.commands")
#: Keys of every document → meaning.
DOCUMENT: Mapping[str, str] = {
    "schema": f"version of this form: {JSON_SCHEMA}",
    "verb": "the verb; null where there was none",
    "exit": "exit status of the process",
    "image": "`ref` and `id` of the serving image; `id` is null where no engine was asked",
    "toolchain": "digest of all keys of this environment, for people; null where it is not known",
    "cache": "the cache root, or `volume NAME`",
    "tasks": "one object for each task, below; empty for verbs without tasks",
    "gpus": "one object for each GPU, below; empty where none was looked at",
    "warnings": "sentences for people",
    "seconds": "how long it took",
    "error": "only where `exit` is not 0: `message`; for a list also `problems`, with `place`, `text` and `remedy`",
}
#: Keys of a task → meaning.
TASK: Mapping[str, str] = {
    "model": "its model",
    "label": "its name in tables and file names",
    "key": "digest that names its markers",
    "state": "`warm`, `warmed`, `cold`, `failed`, `partial` or `skipped`",
    "reason": "why it is in this state, for people; empty where nothing is to say",
    "compiled_anew": "families whose keys differ from those of the nearest marker, the costliest first",
    "seconds": "how long it ran; null where nothing ran",
    "entries": "entries by family",
    "entries_added": "how many entries it added",
    "added": "entries that it added, by family",
    "added_bytes": "their bytes, by family",
    "loaded": "the weights that it was warmed with; null where it has no model",
    "verified": "whether a second process compiled nothing",
    "reservation": "a limit of its proof, for people; null where there is none",
    "proof": "`verified`, `steady`, `inventory`, `pretended` or `nothing-claimed`; null where it is cold",
    "build": "`same` or `other`: which build of sglang proved it; null where none did",
    "kernel_sources": "`same`, `changed` or `unknown`, against that build's",
    "proof_age": "seconds since that proof",
    "log": "path of its log; null where nothing ran",
}
#: Sections whose keys are not their fields, by class: key → form.
OWN_FORM: Mapping[str, Mapping[str, str]] = {
    "ExplainedFamilies": {
        "families": "list of object: `family`, `key`, `state` (`found`, `differs` or `absent`), and what differs from "
        "the nearest directory"
    },
    "_Status": {"cost": "object: `seconds` and `gpu_minutes` of the last runs of all tasks"},
    "RefreshSection": {
        "refresh": "object: `image_before` (string, or null), `registry_digest` (string, or null), `pulled` (boolean), "
        "`waited_seconds` (number), `freed` (bytes), `prune_blocked_seconds` (number)"
    },
    "Overview": {"report": "object of all these"},
}
_HEAD = """\
# JSON

With `--json` a verb prints one document on stdout, and everything else on stderr: also where it fails, and where the
command line is wrong. `hold` has no `--json`, because stdout is the command's.

`schema` counts changes that break readers: a key that is gone, or that means something else. New keys come without a
new number, so a reader ignores keys that it does not know. Sentences (`reason`, `message`, `text`, `warnings`, …) are
for people, and may change at any time.

This page is generated: `python3 -m builder.cli.reference`.
"""


def page() -> str:
    """Return the page, in Markdown."""
    lines = [_HEAD, "## Every document", "", *_keys(DOCUMENT), "", "### A task", "", *_keys(TASK)]
    lines += ["", "### A GPU", "", _about(GpuResult), "", *_fields(GpuResult), "", "## What verbs and stages add", ""]
    lines += ["Each field is a key at the top of the document.", ""]
    for section in sections():
        lines += [f"### {_title(section)}", "", _about(section), "", *_fields(section), ""]
    lines += ["### Verbs whose result is text", ""]
    names = ", ".join(f"`{name}`" for name, verb in VERBS.items() if verb.text)
    lines += [
        f"The key of the verb's own name holds the text that it prints without `--json`: {names}, as far as no",
        "",
    ]
    return "\n".join([*lines[:-2], f"{lines[-2]} section above has the same.", ""])


def sections() -> list[type[Section]]:
    """Return every section of the program, by module and name."""
    for package in _PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    found = [each for each in _below(Section) if each is not Text and each.__module__.startswith("builder.")]
    return sorted(found, key=lambda each: (each.__module__, each.__name__))


def _below(kind: type[Section]) -> Iterator[type[Section]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


def _title(section: type[Section]) -> str:
    module = section.__module__.rpartition(".")[2].replace("_", "-")
    return f"{module}: {section.__name__.lstrip('_')}"


def _about(kind: type[Any]) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split())


def _keys(keys: Mapping[str, str]) -> Iterator[str]:
    yield from ["| key | meaning |", "| --- | --- |"]
    yield from (f"| `{name}` | {text} |" for name, text in keys.items())


def _fields(kind: type[Any]) -> Iterator[str]:
    yield from ["| key | value |", "| --- | --- |"]
    own = OWN_FORM.get(kind.__name__, {})
    yield from (f"| `{name}` | {text} |" for name, text in own.items())
    replaced = kind.__name__ in ("ExplainedFamilies", "RefreshSection")
    for name, hint in () if replaced else _hints(kind).items():
        yield f"| `{name}` | {_words(hint)} |"


def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind) if not each.name.startswith("_")}


def _words(hint: Any, depth: int = 0) -> str:
    """Return the JSON form of a type, in words."""
    plain = {str: "string", Path: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    if hint in plain:
        return plain[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f'`"{each}"`' for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_words(each, depth) for each in arguments))
    if origin is not None and issubclass(origin, Mapping):
        return f"object of {_words(arguments[1], depth)}"
    if origin in (list, tuple, set, frozenset) or (isinstance(origin, type) and issubclass(origin, typing.Iterable)):
        return f"list of {_words(arguments[0], depth)}" if arguments else "list"
    if dataclasses.is_dataclass(hint) and depth < 3:
        inner = ", ".join(
            f"`{name}` ({_words(each, depth + 1)})" for name, each in _hints(typing.cast("type[Any]", hint)).items()
        )
        return f"object: {inner}"
    return "value"
