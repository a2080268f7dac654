"""Whether code that was running may launch: by the names that it can reach."""

from __future__ import annotations

import types

import pytest

from builder.agent.launch_reach import may_launch

SOURCE = """
import functools

def popen_launch_server(model): ...
def measure(): return len("x")
def starts(): return popen_launch_server("m")

def wrapping(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)
    return call

@wrapping
def wrapped(): return starts()

class Kit:
    def evaluate(self): return measure()
    def start(self): return starts()

class Server:
    def __init__(self): self.process = starts()

def uses_nothing(): return measure()
def uses_function(): return starts()
def uses_wrapped(): return wrapped()
def uses_method(kit): return kit.start()
def uses_other_method(kit): return kit.evaluate()
def uses_class(): return Server()
def uses_lambda(): return (lambda: starts())()
def uses_comprehension(kits): return [kit.start() for kit in kits]
def uses_subprocess(): return subprocess.run(["x"])
def repeats(): return repeats()
"""


@pytest.fixture(scope="module")
def module() -> types.ModuleType:
    made = types.ModuleType("made")
    exec(SOURCE, vars(made))
    return made


@pytest.mark.parametrize(
    "name",
    [
        "uses_function",
        "uses_wrapped",
        "uses_method",
        "uses_class",
        "uses_lambda",
        "uses_comprehension",
        "uses_subprocess",
    ],
)
def test_may_launch_follows_names(module: types.ModuleType, name: str) -> None:
    assert may_launch([vars(module)[name].__code__], [module])


@pytest.mark.parametrize("name", ["uses_nothing", "uses_other_method", "repeats", "measure"])
def test_may_launch_false_where_no_name_leads_to_a_launcher(module: types.ModuleType, name: str) -> None:
    assert not may_launch([vars(module)[name].__code__], [module])


def test_may_launch_true_where_one_of_several_does(module: types.ModuleType) -> None:
    codes = [vars(module)[name].__code__ for name in ("uses_nothing", "uses_function")]
    assert may_launch(codes, [module])
