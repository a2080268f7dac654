"""What names stand for while Python sources are read: classes in use, functions, environments, what cannot be told."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from builder.manifest.testfiles import Class, Module, NotUnderstoodError


@dataclass(frozen=True)
class Unknown:
    """A value that cannot be told, and where that began."""

    place: str
    why: str


class LeftError(Exception):
    """break, continue, raise, or a test that skips itself."""


@dataclass(frozen=True)
class Missing(Unknown):
    """An attribute that is in none of the files."""


#: Variables that were set, by name.
Env = dict[str, "str | Unknown | None"]


@dataclass(frozen=True)
class Function:
    """defaults: of its parameters, made where it is defined. around: names of the function that it is defined in."""

    node: ast.FunctionDef
    module: Module
    defaults: Mapping[str, Any] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)
    owner: Class | None = None
    bound: Target | None = None


@dataclass(eq=False)
class Target:
    """A test class in use, or an object of one, and what methods set on it."""

    cls: Class
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Super:
    target: Target
    after: Class


@dataclass(frozen=True)
class Dotted:
    """A name of a module that is in none of the files, as it is written."""

    name: str
    place: str


@dataclass
class Frame:
    """Where a statement stands. env: what was set around a launch, shared by
    all that one test does."""

    module: Module
    names: dict[str, Any]
    env: Env
    owner: Class | None = None
    depth: int = 0


@dataclass(frozen=True)
class Method:
    """Of a string, list, table or environment."""

    holder: Any
    name: str


@dataclass(eq=False)
class Environment:
    """os.environ, or a copy: env is what was set in it. None: it was removed. Unknown: what cannot be told."""

    env: Env

    def call(self, name: str, arguments: list[Any], place: str) -> Any:
        if name == "copy":
            return Environment(dict(self.env))
        if name in ("update", "setdefault") and arguments:
            more = env_of(arguments[0] if name == "update" else dict([arguments[:2]]), place)
            self.env.update(more if name == "update" else {each: more[each] for each in more if each not in self.env})
            return None
        if name == "pop" and arguments:
            self.env[str(arguments[0])] = None
            return None
        raise NotUnderstoodError(place, f"os.environ.{name}()")


class ChainedNames(dict[str, Any]):
    """The names of a class body or a comprehension, over those around it. New ones go into `own`."""

    def __init__(self, own: dict[str, Any], around: Mapping[str, Any]) -> None:
        super().__init__(around)
        self._own = own

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._own[name] = value


def env_of(value: Any, place: str) -> Env:
    if value is None:
        return {}
    if isinstance(value, Environment):
        return dict(value.env)
    if isinstance(value, dict):
        for name, text in value.items():
            if isinstance(text, (Unknown, Dotted)):
                why = text.why if isinstance(text, Unknown) else f"the value of {name}"
                raise NotUnderstoodError(text.place, why)
        return {str(name): text_of(text) for name, text in value.items()}
    raise NotUnderstoodError(place, "an environment that cannot be told")


def text_of(value: Any) -> str:
    """As an environment variable has it; sglang reads 1 and True alike."""
    return {True: "1", False: "0"}[value] if isinstance(value, bool) else str(value)
