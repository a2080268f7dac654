"""What may make a class or function of a Python source another one than it reads: decorators, metaclasses and such."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from builder.manifest.testfiles import Class

_SKIPS = tuple(f"{module}{name}" for module in ("unittest.", "") for name in ("skip", "skipIf", "skipUnless"))
#: Decorators that leave a class as it is, and what a function does.
_ON_CLASSES = (*_SKIPS, "dataclass", "dataclasses.dataclass", "final")
_ON_FUNCTIONS = (
    *_SKIPS,
    *("classmethod", "staticmethod", "abstractmethod", "abc.abstractmethod", "override", "final"),
    *("unittest.expectedFailure", "expectedFailure"),
)
#: Methods of a class that may change what its attributes are.
_MAGIC = ("__new__", "__init_subclass__", "__getattribute__", "__getattr__")


def of_class(cls: Class) -> str:
    """The first one of a test class and its bases, for people; "" where there is none."""
    decorator = _decorator(cls.node, _ON_CLASSES)
    for each in cls.order():
        odd = [*(name for name in _MAGIC if name in each.body), *(word.arg or "**" for word in each.node.keywords)]
        decorator = decorator or next((f"{name} of {each.name}" for name in odd), "")
    return decorator


def of_function(node: ast.FunctionDef) -> str:
    """Its decorator that is not known; "" where all are."""
    return _decorator(node, _ON_FUNCTIONS)


def _decorator(node: ast.ClassDef | ast.FunctionDef, harmless: Sequence[str]) -> str:
    names = (ast.unparse(each.func if isinstance(each, ast.Call) else each) for each in node.decorator_list)
    strange = (name for name in names if not name.startswith("pytest.mark.") and name not in harmless)
    return next((f"the decorator {name}" for name in strange), "")
