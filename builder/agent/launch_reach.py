"""What code of a checkout may still launch: by names, over everything that it can call.

A test that fails where a server's answer is measured has launched what it launches. Whether it has is decided from the
functions that were running when it failed: if neither they nor anything that they can reach by a name names a launcher,
nothing of the test is missing. Names are followed wherever they lead, so that the answer errs towards "may launch".
Standard library only.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence

#: Names of what starts a process or loads a model, in tests of sglang of 2026-08-22.
_LAUNCHERS = re.compile(
    r"\w*(popen|Popen|launch|subprocess|Engine|SRTRunner|run_bench|bench_one_batch|offline_throughput)\w*"
    r"|Runtime|Process|spawn|system|fork|run_(score|embeddings)_benchmark|run_and_check_memory_leak|run_mmlu_test"
    r"|run_mulit_request_test|run_combined_tests|create_subprocess_\w+|exec[lv]\w*"
)
#: Names that belong to unittest or to sglang's own test case around every test.
_FRAMEWORK = ("_callTestMethod", "setUp", "tearDown", "setUpClass", "tearDownClass", "retry")


def may_launch(running: Iterable[types.CodeType], modules: Iterable[types.ModuleType]) -> bool:
    """Return whether code that was running may launch. modules: those whose functions its names can mean."""
    functions = _functions(modules)
    waiting = [code for code in running if code.co_name not in _FRAMEWORK]
    seen: set[types.CodeType] = set()
    while waiting:
        code = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        for name in _names(code):
            if _LAUNCHERS.fullmatch(name):
                return True
            if name not in _FRAMEWORK:
                waiting += functions.get(name, ())
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield every name in this code, and in functions and classes within it."""
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _functions(modules: Iterable[types.ModuleType]) -> Mapping[str, Sequence[types.CodeType]]:
    """Return the code that a name can mean: a function, a method of any class, or all methods of a class."""
    found: dict[str, list[types.CodeType]] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, type):
                methods = [(each, code) for each, member in vars(value).items() for code in _codes(member)]
                found.setdefault(name, []).extend(code for _, code in methods)
                for each, code in methods:
                    found.setdefault(each, []).append(code)
            else:
                found.setdefault(name, []).extend(_codes(value))
    return found


def _codes(value: object) -> list[types.CodeType]:
    """Return the code of a function or property, and of what it wraps."""
    if isinstance(value, property):
        return [code for each in (value.fget, value.fset) for code in _codes(each)]
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    if not isinstance(function, types.FunctionType):
        return []
    wrapped = vars(function).get("__wrapped__")
    # What a decorator of sglang's wraps is in a cell of the function that takes its place.
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    inner = [each for each in (wrapped, *cells) if isinstance(each, types.FunctionType) and each is not function]
    return [function.__code__, *(each.__code__ for each in inner)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
