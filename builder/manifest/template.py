"""A manifest to begin with, made of the declared keys: what is needed is set, the rest is there as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from builder.manifest.fields import Key, keys_of
from builder.manifest.load import SCHEMA, profile_text
from builder.manifest.schema import SCHEMA_FILE, sections
from builder.manifest.task_keys import Defaults, TaskTable
from builder.manifest.values import as_toml, toml

#: Keys that are set, with their values: section → key → TOML.
_SET: Mapping[str, Mapping[str, str]] = {
    "image": {"ref": '"lmsysorg/sglang:v0.5.23"'},
    "cache": {"root": '"/data/sglang-jit"'},
    "models": {"store": '"/data/huggingface"'},
    "gpus": {"count": "8", "name": '"H200"'},
    "run": {"budget": '"55m"'},
    "defaults": {"timeout": '"20m"'},
    "task": {"model": '"deepseek-ai/DeepSeek-V3-0324"', "argv": '["--tp", "8", "--trust-remote-code"]'},
}
_WIDTH = 100


def schema_line() -> str:
    """Return the first line of a manifest, by which editors complete and check the rest."""
    return f"#:schema {SCHEMA_FILE.as_uri()}"


def template() -> str:
    """Return a manifest with every key and its meaning; what is a comment has its default."""
    lines = [
        schema_line(),
        "# What warm-cache compiles, for which image, and where. A key in a comment shows its default, or an example",
        "# where it has none. All keys with their values: warm-cache help manifest",
        f"schema = {SCHEMA}",
    ]
    for name, section in sections().items():
        lines += ["", f"[{name}]", *_keys(name, section, keys_of(section))]
    lines += ["", "# For all tasks that do not set the key themselves.", "[defaults]"]
    lines += _keys("defaults", Defaults, keys_of(Defaults))
    own = {name: key for name, key in keys_of(TaskTable).items() if name not in keys_of(Defaults)}
    lines += ["", "# One for each model. All keys of [defaults] may stand here, too.", "[[task]]"]
    return "\n".join([*lines, *_keys("task", TaskTable, own), ""])


def of_profile(name: str) -> str:
    """Return a packaged profile as a manifest to change. Raises UsageError where there is none of this name."""
    return f"{schema_line()}\n{profile_text(name)}"


def _keys(name: str, table: type[Any], keys: Mapping[str, Key]) -> Iterator[str]:
    for key, declared in keys.items():
        yield from textwrap.wrap(declared.text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        if key in _SET.get(name, {}):
            yield f"{key} = {_SET[name][key]}"
            continue
        default = getattr(table, key)
        has_none = default in (None, "", ()) or declared.default or declared.required
        yield f"# {key} = {declared.example if has_none else toml(as_toml(declared.kind, default))}"
