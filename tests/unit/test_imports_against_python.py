"""What is read from a test, against what Python makes of the same lines: the same launches, or not understood."""

from __future__ import annotations

import os
import sys
import textwrap
import types
import unittest
from pathlib import Path
from typing import Any

import pytest

from builder.manifest import from_tests

BODIES = r"""
os.environ.setdefault("SG_X", "2"); os.environ.setdefault("SG_X", "3")
with self.subTest(): os.environ["SG_X"] = "1"
a = ["--a"]; b = copy.copy(a); b.append("--b")
a = {"k": ["--a"]}; b = copy.deepcopy(a); b["k"].append("--b"); a = a["k"]
a = ["--b", "--a"]; a.sort(); a.reverse()
a = [str(~5), str(+5), str(-5)]
a = [str(i) for i in range(1500)]
i = 0\nfor i in range(1500): pass\na = [str(i)]
a = []\nfor x in ["--a"]: pass\nelse: a = [x]
def g(a=[]): a.append("--x"); return a\na = g(); g()
def f():\n    try: return ["--a"]\n    finally: a.append("--f")\na = ["--z"]\na = f() + a
x = "1"\ndef f(y=x): return y\nx = "2"\na = [f()]
a = ["--a"]\ndef inner(): a.append("--b")\ninner()
def inner():\n    nonlocal a\n    a = ["--b"]\na = ["--a"]\ninner()
"""
HONEST = r"""
a = ["--a"]\ntry: int("x"); a = ["--c"]\nexcept ValueError: a = ["--b"]
a = ["--a"]\ntry: raise ValueError\nexcept ValueError: a = ["--b"]
def f():\n    try: return [str(int("x"))]\n    except ValueError: return ["--b"]\na = f()
os.environ["SG_X"] = str(os.getpid())
os.environ[str(os.getppid())] = "1"
os.environ |= {"SG_X": "1"}
a = ["--a", "--b"]; a[os.getpid() % 2] = "--z"
b = a = ["--a"]\nif os.getpid(): b.append("--b")
self.a = ["--a"]; type(self).b = ["--b"]; self.__class__.a = ["--c"]; a = self.a
p = functools.partial(launch, M, "u"); p(1, other_args=["--p"]); a = []
self.addCleanup(launch, M, "u", 1, other_args=["--c"]); a = []
assert launch(M, "u", 1, other_args=[os.getpid()])
if (p := launch(M, "u", 1, other_args=[str(os.getpid())])): a = []
"""
CLASSES = r"""
class T(B):\n    def test_x(self):\n        if os.getpid(): self.go(["--a"])
class T(B):\n    def setUp(self): raise unittest.SkipTest("no")\n    def test_x(self): self.go(["--a"])
class T(B):\n    def setUp(self): self.skipTest("no")\n    def test_x(self): self.go(["--a"])
class T(B):\n    a = ["--b"]\n    def test_b(self): self.go(self.a)\n    def test_a(self): self.a = []; self.go(self.a)
class T(B):\n    def __init__(self, n): super().__init__(n); self.a = ["--i"]\n    def test_x(self): self.go(self.a)
class T(B):\n    def tearDown(self): self.go(["--t"])\n    def test_x(self): self.go(["--a"])
class T(B):\n    def test_z(self): self.go(["--z"])\n    def test_a(self): os.environ["SG_Q"] = "1"; self.go(["--a"])
class T(B):\n    a = ["--a"]\n    def test_x(self): setattr(self, "a", ["--s"]); self.go(self.a)
class T(B):\n    a = ["--a"]\n    def test_x(self): self.go(self.a)\nT.a = ["--late"]
class T(B):\n    a = ["--a"]\n    def test_x(self): T.a = ["--t"]; self.go(self.a)
class T(B):\n    @patch.dict(os.environ, {"SG_X": "1"})\n    def test_x(self): self.go(["--a"])
@patch.dict(os.environ, {"SG_X": "1"})\nclass T(B):\n    def test_x(self): self.go(["--a"])
A = []\ndef f():\n    global A\n    A = ["--b"]\nclass T(B):\n    def test_x(self): f(); self.go(A)
class T(B):\n    def f(self, *_): self.a = ["--f"]\n    a = []\n    def test_x(self): self.f(1); self.go(self.a)
class T(B):\n    a = []\n    def __getattr__(self, n): return 1\n    def test_x(self): self.go(self.a)
"""
HEAD = """\
import copy, functools, os, unittest
from unittest.mock import patch
from sglang.test.test_utils import popen_launch_server as launch
M = "m/x"
class B(unittest.TestCase):
    def go(self, a): launch(M, "u", 1, other_args=a)
"""

Told = tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]


def _lines(text: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in text.strip().splitlines()]


def _method(body: str) -> str:
    lines = ["a = []", body, 'launch(M, "u", 1, other_args=a)']
    return "class T(B):\n    def test_x(self):\n" + textwrap.indent("\n".join(lines), "        ") + "\n"


def _run(source: str, monkeypatch: pytest.MonkeyPatch) -> set[Told]:
    """What Python launches, with a launcher that only takes notes."""
    seen: set[Told] = set()

    def launch(model: str, *_: Any, other_args: Any = ()) -> object:
        env = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("SG_")))
        seen.add((model, tuple(map(str, other_args)), env))
        return object()

    module = types.ModuleType("sglang.test.test_utils")
    module.popen_launch_server = launch  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.test"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before, names = dict(os.environ), dict[str, Any]()
    try:
        exec(compile(source, "test_it.py", "exec"), names)
        test: type[unittest.TestCase] = names["T"]
        result = unittest.TestResult()
        unittest.TestSuite(test(name) for name in unittest.TestLoader().getTestCaseNames(test)).run(result)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not result.errors
    return seen


@pytest.mark.parametrize("source", [*map(_method, _lines(BODIES)), *_lines(CLASSES)])
def test_what_is_read_is_what_python_launches(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, understood = _read(tmp_path, HEAD + source)
    launched = _run(HEAD + source, monkeypatch)
    assert read == launched if understood else read <= launched


@pytest.mark.parametrize("source", [*map(_method, _lines(HONEST))])
def test_what_nobody_can_tell_without_running_it_is_said(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, understood = _read(tmp_path, HEAD + source)
    assert not understood
    assert read <= _run(HEAD + source, monkeypatch)


@pytest.mark.parametrize(
    "line",
    ["[x for x in 5]", '-"a"', '"abc"[::0]', "{[]: 1}", "{x: 1 for x in 5}", "+".join(["[0] * 99999"] * 99)],
)
def test_no_expression_is_more_than_not_understood(tmp_path: Path, line: str) -> None:
    _, understood = _read(tmp_path, HEAD + _method(f"a = {line}"))
    assert not understood


def test_nobody_waits_for_loops_in_loops(tmp_path: Path) -> None:
    loops = "0"
    for _ in range(6):
        loops = f"[{loops} for _ in range(999)]"
    _, understood = _read(tmp_path, HEAD + _method(f"a = {loops}"))
    assert not understood


def _read(tmp_path: Path, source: str) -> tuple[set[Told], bool]:
    path = tmp_path / "test_it.py"
    path.write_text(source)
    found = from_tests.read([str(path)], None)
    return {(each.model, each.argv, each.env) for each in found.launches}, not found.problems
