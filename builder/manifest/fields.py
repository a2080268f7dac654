"""The keys of a manifest's tables: each declared once, as a field of a dataclass, and read by one function.

The same fields are the source of the JSON Schema (`schema`) and of the reference page (`reference`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from builder.errors import Problem
from builder.manifest.document import Document, Table
from builder.manifest.values import Kind

S = TypeVar("S")  # a dataclass of keys
T = TypeVar("T")
D = TypeVar("D")  # a default, which may be None

_KEY = "key"
_KEYS: dict[type[Any], dict[str, Key]] = {}


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """Values of the command line or the environment that replace the manifest's; None: not given.

    cache: a directory, or ``volume:NAME``. timeout, silence: of every task. needs_cache: whether it is a problem that
    neither the manifest nor this names one; where it is none, the temporary directory stands for it.
    """

    image: str | None = None
    cache: str | None = None
    models: str | None = None
    budget: str | float | None = None
    timeout: str | float | None = None
    silence: str | float | None = None
    lock_timeout: str | float | None = None
    needs_cache: bool = True


class Key:
    """How one key is read and described.

    default: words for a default that is no constant. option: the option that replaces the value, without dashes;
    option_kind: how the option is read, None where one option replaces several keys. recipes: those that use the key;
    empty: all of them.
    """

    def __init__(
        self,
        kind: Kind[Any],
        text: str,
        example: str,
        *,
        default: str,
        option: str,
        option_kind: Kind[Any] | None,
        recipes: tuple[str, ...],
        required: bool,
    ) -> None:
        self.kind = kind
        self.text = text
        self.example = example
        self.default = default
        self.option = option
        self.option_kind = option_kind
        self.recipes = recipes
        self.required = required


def key(
    kind: Kind[T],
    default: D,
    text: str,
    example: str,
    *,
    default_text: str = "",
    option: str = "",
    option_kind: Kind[T] | None = None,
    shared_option: bool = False,
    recipes: tuple[str, ...] = (),
    required: bool = False,
) -> T | D:
    """Declare a dataclass field as a key.

    text: what the value means, one line with its unit. example: a value as TOML. shared_option: the option replaces
    several keys, so that the section itself reads it.
    """
    read_by = None if shared_option else option_kind or kind
    declared = Key(
        kind,
        text,
        example,
        default=default_text,
        option=option,
        option_kind=read_by,
        recipes=recipes,
        required=required,
    )
    return field(default=default, metadata={_KEY: declared})


def keys_of(table: type[Any]) -> dict[str, Key]:
    """Return the keys that a dataclass declares, in their order."""
    if table not in _KEYS:
        _KEYS[table] = {each.name: each.metadata[_KEY] for each in fields(table) if _KEY in each.metadata}
    return _KEYS[table]


class OverrideReader:
    """Reads the overrides like values of the manifest. The location of a problem is the option."""

    def __init__(self, document: Document, overrides: Overrides) -> None:
        self._document = document
        self._overrides = overrides
        self._read: dict[str, Any] = {}  # several tables ask for one option, and its problem is one

    @property
    def needs_cache(self) -> bool:
        return self._overrides.needs_cache

    def given(self, option: str) -> bool:
        return getattr(self._overrides, option) is not None

    def read(self, option: str, convert: Callable[[Any], T]) -> T | None:
        """Return the option's value; None where it was not given or is wrong."""
        if option not in self._read:
            self._read[option] = None
            if self.given(option):
                try:
                    self._read[option] = convert(getattr(self._overrides, option))
                except ValueError as error:
                    self._document.problems.append(Problem(f"--{option.replace('_', '-')}", f"{error}."))
        found: T | None = self._read[option]
        return found


def read(
    base: S, table: Table, overrides: OverrideReader, kinds: Mapping[str, Callable[[Any], Any]] | None = None
) -> S:
    """Return `base` with the values of this table and of the options. Problems are added to the document.

    base: its values stand for keys that are missing or wrong. kinds: converters in place of declared ones, by key.
    """
    values = {}
    for name, declared in keys_of(type(base)).items():
        find = table.require if declared.required else table.read
        value = find(name, (kinds or {}).get(name, declared.kind), getattr(base, name))
        if declared.option and declared.option_kind is not None:
            replaced = overrides.read(declared.option, declared.option_kind)
            value = value if replaced is None else replaced
        values[name] = value
    table.finish()
    return replace(base, **values)  # type: ignore[type-var]
