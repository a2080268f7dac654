"""Python files that are read and never executed: modules, what they import from one another, their classes.

Nothing here runs a line of them. What a file imports is looked for among the files that were given and, where those lie
in a checkout of sglang, below its ``python`` folder, so that fixtures need not be named one by one.
"""

from __future__ import annotations

import ast
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.errors import Problem, UsageError

_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RecursionError,
    MemoryError,
)  # the last two for what is nested too deep
#: Bytes; no source that people wrote is longer.
_LARGEST = 16 << 20
#: Folders that hold no tests, however many files are below them.
_SKIPPED = {"__pycache__", ".git", "node_modules"}


class NotUnderstoodError(Exception):
    """A construct that is not read. place: ``FILE:LINE``."""

    def __init__(self, place: str, why: str) -> None:
        super().__init__(why)
        self.place, self.why = place, why


class MissingError(NotUnderstoodError):
    """An attribute that none of the files gives a class."""


@dataclass(eq=False)
class Module:
    """One file. names: its globals, filled by who reads it."""

    path: Path
    name: str
    tree: ast.Module
    given: bool
    names: dict[str, Any] = field(default_factory=dict)
    read: bool = False

    def place(self, node: ast.AST) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}"


@dataclass(frozen=True, eq=False)
class Class:
    """A class of a module. bases: those that are known. unknown: names of the others. body: what its body binds."""

    name: str
    node: ast.ClassDef
    module: Module
    bases: tuple[Class, ...]
    unknown: tuple[str, ...]
    body: dict[str, Any]

    @property
    def place(self) -> str:
        return self.module.place(self.node)

    def order(self) -> list[Class]:
        """Where Python looks for an attribute, as far as the classes are known. Raises NotUnderstoodError."""
        stand_ins: dict[int, Any] = {}
        classes: dict[Any, Class] = {}

        def made(cls: Class) -> Any:
            if id(cls) not in stand_ins:
                stand_in = type(cls.name, tuple(made(base) for base in cls.bases), {})
                stand_ins[id(cls)], classes[stand_in] = stand_in, cls
            return stand_ins[id(cls)]

        try:
            return [classes[each] for each in made(self).__mro__ if each is not object]
        except TypeError:
            raise NotUnderstoodError(self.place, f"{self.name}: its bases have no common order") from None

    def all_unknown(self) -> list[str]:
        """Names of bases, at any height, that are in none of the files."""
        return list(dict.fromkeys([*self.unknown, *(name for base in self.bases for name in base.all_unknown())]))


class Files:
    """The files that were given, and those that they import. Raises UsageError for what cannot be read."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._modules: dict[Path, Module] = {}
        problems = []
        for given in paths:
            path = Path(given)
            found = sorted(_below(path)) if path.is_dir() else [path]
            if not found:
                problems.append(Problem(given, "no Python file is below it."))
            for file in found:
                try:
                    self._load(file, str(file), given=True)
                except _UNREADABLE as error:
                    problems.append(Problem(str(file), f"{_why(error)}."))
        if problems:
            raise UsageError("not all of these can be read", problems)

    def given(self) -> list[Module]:
        """In the order of their paths."""
        return [module for _, module in sorted(self._modules.items()) if module.given]

    def imported(self, by: Module, name: str) -> Module | None:
        """The module of this dotted name: of a given file that ends in it, or of one in the same checkout."""
        parts = name.split(".")
        file = Path(*parts).with_suffix(".py")
        for path, module in self._modules.items():
            if path.parts[-len(parts) :] == file.parts or (module.given and path.name == file.name):
                return module
        for folder in by.path.parents:
            for path in (folder / "python" / file, folder / file):
                if path.is_file():
                    try:
                        return self._load(path, os.path.relpath(path), given=False)
                    except _UNREADABLE:
                        return None
        return None

    def _load(self, file: Path, name: str, *, given: bool) -> Module:
        path = Path(os.path.realpath(file))  # of a link that leads to itself, itself
        if path not in self._modules:
            seen = path.stat()
            if not stat.S_ISREG(seen.st_mode):
                raise OSError(errno.EINVAL, "it is no file")
            if seen.st_size > _LARGEST:
                raise OSError(errno.EFBIG, f"it is larger than {_LARGEST >> 20} MiB")
            tree = ast.parse(path.read_bytes(), filename=name)
            self._modules[path] = Module(path, name, tree, given)
        return self._modules[path]


def _why(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it is not Python: {str(error) or 'it is nested too deep'}"


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        if not _SKIPPED & set(path.relative_to(folder).parts):
            yield path
