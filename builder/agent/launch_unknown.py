"""Values that the launch recorder does not know: results of code that is not run, such as torch or a server's answer.

An `Unknown` takes every operation, so that a test runs on to its next launch. Where one becomes text it leaves a mark
with its name, so that a launch that depends on it can be told from one that is known. Standard library only.
"""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

#: What encloses the name of an unknown value in text: code points that no test uses.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
MARK = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")

#: Names that ask what machine or build this is. A branch on an unknown one of them would be a guess.
_PREDICATE = re.compile(r"_*(is|has|have|supports?|can|use)_\w+|\w+_(supported|available|enabled)")
_ERROR = re.compile(r"[A-Z]\w*(Error|Exception|Warning|Timeout|Interrupt|Exit|Expired)")
#: Names that Python looks for to learn what an object can do; an unknown value has none of them.
_DUNDER = re.compile(r"__\w+__")
_LONGEST_NAME = 120

MISSING: Any = object()

#: Called with the name of a predicate whenever a branch depends on one that is unknown.
on_guess: Callable[[str], None] = lambda _name: None  # noqa: E731 - replaced by the session
#: Finds what is known of a qualified name; returns `MISSING` where nothing is.
answer: Callable[[str], Any] = lambda _name: MISSING  # noqa: E731 - replaced by the session


class Unknown:
    """A value of which only the name is known, for example ``torch.randn()``. Every operation on it succeeds."""

    def __init__(self, name: str, truth: bool = True) -> None:
        object.__setattr__(self, "_unknown_name", name[-_LONGEST_NAME:])
        object.__setattr__(self, "_unknown_truth", truth)

    def __getattr__(self, name: str) -> Any:
        if _DUNDER.fullmatch(name):
            raise AttributeError(name)
        value = attribute(f"{self._unknown_name}.{name}")
        object.__setattr__(self, name, value)  # one object per name: `dtype is torch.float16` has to hold
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A decorator: what it decorates has to stay what it is, or a test would be lost.
        if len(args) == 1 and not kwargs and _is_definition(args[0]):
            return args[0]
        return Unknown(f"{self._unknown_name}({'…' if args or kwargs else ''})")

    def __mro_entries__(self, _bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (UnknownBase,)

    def __instancecheck__(self, _other: object) -> bool:
        return False

    def __subclasscheck__(self, _other: type) -> bool:
        return False

    def __str__(self) -> str:
        return f"{OPEN}{self._unknown_name}{CLOSE}"

    __repr__ = __fspath__ = __str__

    def __format__(self, _spec: str) -> str:
        return str(self)

    def __bool__(self) -> bool:
        last = self._unknown_name.removesuffix("()").rpartition(".")[2]
        if _PREDICATE.fullmatch(last):
            on_guess(self._unknown_name)
        return bool(self._unknown_truth)

    def __iter__(self) -> Iterator[Any]:
        """As many unknown values as are unpacked, else one: a launch for each of them is recorded, and is unknown."""
        return iter([Unknown(f"{self._unknown_name}[{index}]") for index in range(_unpacked(sys._getframe(1)))])

    def __next__(self) -> Any:
        return Unknown(f"{self._unknown_name}[0]")

    def __aiter__(self) -> Any:
        return _AsyncOnce(self)

    def __await__(self) -> Generator[Any, Any, Any]:
        yield  # other tasks of the loop get their turn
        return self

    def __getitem__(self, key: object) -> Any:
        return Unknown(f"{self._unknown_name}[{key!r:.40}]")

    def __setitem__(self, _key: object, _value: object) -> None:
        return None

    def __delitem__(self, _key: object) -> None:
        return None

    def __contains__(self, _item: object) -> bool:
        return False

    def __len__(self) -> int:
        return 1

    def __hash__(self) -> int:
        return hash(self._unknown_name)

    def _holds(self, _other: object) -> Any:
        return Unknown(f"{self._unknown_name} compared")

    def __ne__(self, _other: object) -> Any:
        return Unknown(f"{self._unknown_name} compared", truth=False)

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _holds

    def __int__(self) -> int:
        return 1

    __index__ = __int__

    def __float__(self) -> float:
        return 1.0

    def __complex__(self) -> complex:
        return 1 + 0j

    def __bytes__(self) -> bytes:
        return str(self).encode()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_error: object) -> None:
        return None

    def _same(self, *_others: object) -> Any:
        return Unknown(self._unknown_name)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _same
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _same
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = _same
    __rrshift__ = __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __trunc__ = __floor__ = __ceil__ = _same


class UnknownBase:
    """The base of a class whose written base is unknown: takes any arguments, and keeps named ones as attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()

    def __getattr__(self, name: str) -> Any:
        if _DUNDER.fullmatch(name):
            raise AttributeError(name)
        return Unknown(f"{type(self).__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Unknown(f"{type(self).__name__}()")


class UnknownError(Exception):
    """The base of exceptions of code that is not run; they take any arguments."""

    def __init__(self, *args: Any, **_kwargs: Any) -> None:
        super().__init__(*args)


class _AsyncOnce:
    """One unknown value, for ``async for``."""

    def __init__(self, value: Unknown) -> None:
        self._values = [value]

    async def __anext__(self) -> Any:
        if not self._values:
            raise StopAsyncIteration
        return self._values.pop()


def attribute(name: str) -> Any:
    """Return what an attribute of code that is not run is taken for: a fact, an exception class or an unknown value."""
    known = answer(name)
    if known is not MISSING:
        return known
    last = name.rpartition(".")[2]
    if _ERROR.fullmatch(last):
        return type(last, (UnknownError,), {"__module__": name.rpartition(".")[0]})
    return Unknown(name)


def _is_definition(value: object) -> bool:
    return isinstance(value, (type, staticmethod, classmethod)) or (
        hasattr(value, "__code__") and getattr(value, "__name__", "") != "<lambda>"
    )


def _unpacked(frame: Any) -> int:
    """Return how many values the instruction that asks for an iterator takes; 1 where it takes any number."""
    code, at = frame.f_code.co_code, frame.f_lasti
    if not 0 <= at < len(code) - 1:
        return 1
    name = dis.opname[code[at]]
    if name == "UNPACK_SEQUENCE":
        return int(code[at + 1])
    return int(code[at + 1]) + 1 if name == "UNPACK_EX" else 1
