"""Tests in pytest's style under the launch recorder: functions, classes without a base, marks and simple fixtures.

It is no pytest: only what test files of sglang use. Standard library only.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from builder.agent.launch_unknown import MARK, Unknown
from builder.recording import State

#: Parameter sets of one function that are run; its launches rarely differ in more.
_MOST_SETS = 16


class Session(Protocol):
    """What functions report to."""

    def running(self, test: str, kind: type | None) -> None: ...
    def described(self, error: BaseException) -> str: ...
    def problem(self, state: State, test: str, location: str, why: str) -> None: ...
    def location_of(self, error: BaseException) -> str: ...
    def location_of_definition(self, value: object) -> str: ...
    def arm(self) -> None: ...
    def disarm(self) -> None: ...


def module() -> types.ModuleType:
    """Return what stands in the place of pytest."""
    pytest = types.ModuleType("pytest")
    pytest.__path__ = []

    class Mark:
        def __init__(
            self, name: str = "", arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
        ) -> None:
            self.name, self.args, self.kwargs = name, arguments, named or {}

        def __getattr__(self, name: str) -> Mark:
            if name.startswith("__"):
                raise AttributeError(name)
            return Mark(name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            decorates = bool(self.args or self.kwargs) or self.name not in ("skipif", "parametrize")
            if decorates and len(args) == 1 and not kwargs and isinstance(args[0], (type, types.FunctionType)):
                value: Any = args[0]
                value.pytestmark = [*vars(value).get("pytestmark", ()), self]
                return value
            return Mark(self.name, args, kwargs)

    class Raises:
        value = Unknown("exception")

        def __enter__(self) -> Raises:
            return self

        def __exit__(self, kind: type[BaseException] | None, *_error: object) -> bool:
            return kind is not None and issubclass(kind, Exception)

    def fixture(*args: Any, **kwargs: Any) -> Any:
        def mark(function: Any) -> Any:
            function.recorded_fixture = kwargs
            return function

        return mark(args[0]) if args and callable(args[0]) else mark

    def skip(reason: str = "", *_args: Any, **kwargs: Any) -> None:
        raise unittest.SkipTest(reason or kwargs.get("msg", ""))

    def param(*values: Any, **kwargs: Any) -> tuple[Any, ...]:
        return values

    contents = {"fixture": fixture, "skip": skip, "param": param, "mark": Mark(), "raises": lambda *_a, **_k: Raises()}
    contents |= {"fail": lambda *_args, **_kwargs: None, "warns": contents["raises"]}
    contents |= {"importorskip": lambda name, *_args, **_kwargs: importlib.import_module(name)}
    vars(pytest).update(contents, __getattr__=lambda name: Unknown(f"pytest.{name}"))
    return pytest


def run(module: types.ModuleType, path: str, session: Session) -> None:
    """Run the functions and plain classes of a test file."""
    fixtures = {name: value for name, value in vars(module).items() if hasattr(value, "recorded_fixture")}
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and name.startswith("test") and value.__code__.co_filename == path:
            _run(name, value, value, [module, value], fixtures, session)
        elif isinstance(value, type) and name.startswith("Test") and value.__module__ == module.__name__:
            if issubclass(value, unittest.TestCase) or isinstance(vars(value).get("__test__"), bool):
                continue
            for method, function in inspect.getmembers(value, inspect.isfunction):
                if method.startswith("test"):
                    own = fixtures | {
                        each: bound for each, bound in inspect.getmembers(value) if hasattr(bound, "recorded_fixture")
                    }
                    call = _bound(value, function)
                    _run(f"{name}.{method}", function, call, [module, value, function], own, session)


def _bound(kind: type, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**kwargs: Any) -> Any:
        instance = kind()
        before = getattr(instance, "setup_method", None)
        if before is not None:
            before(*([None] * len(inspect.signature(before).parameters)))
        return function(instance, **kwargs)

    return call


def _run(
    test: str, function: Any, call: Callable[..., Any], marked: list[Any], fixtures: dict[str, Any], session: Session
) -> None:
    session.running(test, next((each for each in marked if isinstance(each, type)), None))
    place = session.location_of_definition(function)
    marks = [mark for each in marked for mark in _marks(each)]
    reason = next((why for mark in marks if (why := _skip_reason(mark)) is not None), None)
    if reason is not None:
        session.problem("skipped", test, place, reason)
        return
    for arguments in itertools.islice(_sets(marks), _MOST_SETS):
        session.arm()
        try:
            wanted = [each for each in inspect.signature(function).parameters if each not in ("self", *arguments)]
            values = {each: _value(fixtures[each], fixtures) if each in fixtures else _builtin(each) for each in wanted}
            result = call(**arguments, **values)
            if inspect.iscoroutine(result):
                import asyncio

                asyncio.run(result)
        except unittest.SkipTest as skip:
            session.problem("not-understood" if MARK.search(str(skip)) else "skipped", test, place, str(skip))
        except BaseException as error:  # noqa: BLE001 - a test may raise anything
            session.problem("failed", test, session.location_of(error), session.described(error))
        finally:
            session.disarm()


def _marks(value: Any) -> list[Any]:
    marks = vars(value).get("pytestmark", ())
    return [mark for mark in (marks if isinstance(marks, (list, tuple)) else [marks]) if hasattr(mark, "kwargs")]


def _skip_reason(mark: Any) -> str | None:
    if mark.name == "skip" or (mark.name == "skipif" and mark.args and bool(mark.args[0])):
        return str(mark.kwargs.get("reason", ""))
    return None


def _sets(marks: list[Any]) -> Iterator[dict[str, Any]]:
    axes = []
    for mark in marks:
        if mark.name == "parametrize" and len(mark.args) > 1:
            names = mark.args[0]
            names = [each.strip() for each in names.split(",")] if isinstance(names, str) else list(names)
            axes.append([_assigned(names, each) for each in mark.args[1]])
    for chosen in itertools.product(*axes):
        yield {name: value for each in chosen for name, value in each.items()}


def _assigned(names: list[str], values: Any) -> dict[str, Any]:
    if len(names) == 1:
        return {names[0]: values[0] if isinstance(values, tuple) and len(values) == 1 else values}
    return dict(zip(names, values, strict=False))


def _value(fixture: Any, fixtures: dict[str, Any]) -> Any:
    needs = {
        each: _value(fixtures[each], fixtures) if each in fixtures else _builtin(each)
        for each in inspect.signature(fixture).parameters
    }
    value = fixture(**needs)
    return next(value) if inspect.isgenerator(value) else value


def _builtin(name: str) -> Any:
    return Unknown(f"fixture {name}")
