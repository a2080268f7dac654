"""Which modules test files get from the launch recorder: the checkout's test code for real, everything else unknown.

Real are the test files, what they import from the same folder, ``sglang.test`` and ``sglang.srt.environ`` (standard
library alone). They are compiled without assertions, whose values are unknown here. Standard library only.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from builder.agent import launch_unknown

#: What is run for real below ``python/`` of a checkout.
_REAL = ("sglang.test", "sglang.srt.environ")
_LARGEST = 16 << 20  # bytes; no source that people wrote is longer


class Modules(importlib.abc.MetaPathFinder):
    """Finds modules for one test file. on_load: called with every real module after it has run.

    real: the real modules; read, absent: paths that were read, and that were looked for in vain.
    """

    def __init__(self, checkout: str, folder: str, on_load: Callable[[types.ModuleType], None]) -> None:
        self.checkout, self._folder, self._on_load = os.path.realpath(checkout), folder, on_load
        self.real: list[types.ModuleType] = []
        self.read: dict[str, None] = {}
        self.absent: dict[str, None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return where this module comes from; None for the standard library."""
        top = fullname.partition(".")[0]
        file = self._locate(fullname)
        if file is not None:
            return self.spec(fullname, file)
        if top in sys.stdlib_module_names:
            return None
        return importlib.machinery.ModuleSpec(fullname, _UnknownLoader(self._place(fullname)), is_package=True)

    def spec(self, name: str, file: str) -> importlib.machinery.ModuleSpec:
        """Return the spec of a real module in this file."""
        package = [os.path.dirname(file)] if os.path.basename(file) == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(
            name, file, loader=_SourceLoader(self), submodule_search_locations=package
        )
        assert spec is not None
        return spec

    def load(self, name: str, file: str) -> types.ModuleType:
        """Run this file as a module and return it. Raises what it raises."""
        spec = self.spec(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return module

    def source(self, file: str) -> bytes:
        """Return a source file's text. Raises ImportError where it is none, or outside of the checkout."""
        if not os.path.realpath(file).startswith(self.checkout + os.sep):
            raise ImportError(f"{file} leads out of the checkout")
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ImportError(f"{file} is larger than {_LARGEST >> 20} MiB")
        self.read[file] = None
        return data

    def loaded(self, module: types.ModuleType) -> None:
        self.real.append(module)
        self._on_load(module)

    def _locate(self, name: str) -> str | None:
        parts = name.split(".")
        if any(name == real or name.startswith(real + ".") for real in _REAL):
            return self._file(os.path.join(self.checkout, "python", *parts))
        if parts[0] == "sglang":
            return None
        if parts[0] == "test":
            return self._file(os.path.join(self.checkout, *parts))
        if parts[0] in sys.stdlib_module_names:
            return None
        parent = sys.modules.get(".".join(parts[:-1])) if len(parts) > 1 else None
        if parent is not None and isinstance(getattr(parent.__spec__, "loader", None), _UnknownLoader):
            return None
        return self._file(os.path.join(self._folder, *parts))

    def _file(self, stem: str) -> str | None:
        for candidate in (os.path.join(stem, "__init__.py"), f"{stem}.py"):
            if os.path.isfile(candidate):
                return candidate
            self.absent[candidate] = None
        return None

    def _place(self, name: str) -> str | None:
        """Return the file of a module of the checkout that is not run."""
        if name.partition(".")[0] != "sglang":
            return None
        stem = os.path.join(self.checkout, "python", *name.split("."))
        return next((each for each in (os.path.join(stem, "__init__.py"), f"{stem}.py") if os.path.isfile(each)), None)


class _SourceLoader(importlib.abc.Loader):
    """Runs a source file; writes no bytecode."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        assert module.__spec__ is not None
        assert module.__spec__.origin is not None
        file = module.__spec__.origin
        code = compile(self._modules.source(file), file, "exec", dont_inherit=True, optimize=1)
        exec(code, vars(module))  # noqa: S102 - running them is what the recorder is for
        self._modules.loaded(module)

    def get_source(self, _name: str) -> None:
        return None


class UnknownModule(types.ModuleType):
    """A module that is not run: every name can be imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return []
        if name.startswith("__") and name.endswith("__") and name != "__version__":
            raise AttributeError(name)
        value = launch_unknown.attribute(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return launch_unknown.Unknown(f"{self.__name__}()")


class _UnknownLoader(importlib.abc.Loader):
    def __init__(self, place: str | None) -> None:
        self._place = place

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        known = launch_unknown.answer(spec.name)
        if isinstance(known, types.ModuleType):
            return known
        module = UnknownModule(spec.name)
        if self._place is not None:
            module.__file__ = self._place
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        return None
