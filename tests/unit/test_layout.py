"""The shape of the repository, kept by tests: imports go one way, borders hold, docker/ never hides docker-py."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT / "builder"

#: A longer module keeps two promises.
MOST_LINES = 400


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from named_by(node)


def named_by(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        assert node.level == 0, "relative import"
        assert node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = sorted(path for path in BUILDER.rglob("*.py") if path.parent != BUILDER / "docs")
#: Modules that go into the warm-up image, and into a copied folder for ``--here`` with the rest.
ALONE = [path for path in MODULES if path.parent in (BUILDER, BUILDER / "cache", BUILDER / "agent")]


#: Package → the packages (or single modules) that it may import, beside the ground and itself.
ARROWS = {
    "ground": "",
    "cache": "",
    "agent": "cache",
    "host": "",
    "manifest": "cache.families",
    "engine": "host",
    "report": "host cache.findings",
    "fleet": "",
    "registry": "cache host",
    "run": "cache host manifest engine registry report",
    "cli": "cache host manifest engine registry report run fleet",
}

#: Modules that may import packages of others → these packages.
THIRD_PARTY = {
    "builder.engine.connection": "docker requests urllib3",
    "builder.engine.images": "docker requests",
    "builder.engine.errors": "requests urllib3",
    "builder.host.gpus": "psutil pynvml",
    "builder.host.deadlines": "tenacity",
    "builder.report.live": "rich",
    "builder.report.webhook": "requests",
    "builder.registry.credentials": "docker",
    "builder.registry.exchange": "requests",
    "builder.registry.failures": "requests",
    "builder.registry.transport": "requests tenacity urllib3",
    "builder.registry.keys": "cryptography",
    "builder.manifest.document": "tomli pip",
    "builder.cli.commands.completion": "shtab",
}


def package(name: str) -> str:
    """The package of a module of ours; the modules at the top are the ground."""
    folder = name.split(".")[1]
    return folder if (BUILDER / folder).is_dir() else "ground"


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


@pytest.mark.parametrize("path", named([path for path in MODULES if path != BUILDER / "__main__.py"]))
def test_imports_follow_the_arrows(path: Path) -> None:
    mine = package(dotted(path))
    allowed = {mine, "ground", *ARROWS[mine].split()}
    strayed = [
        name
        for name in imports(path)
        if name.startswith("builder.") and not {package(name), ".".join(name.split(".")[1:3])} & allowed
    ]
    assert strayed == []


@pytest.mark.parametrize("path", named([path for path in ALONE if path != BUILDER / "__main__.py"]))
def test_agent_and_cache_import_standard_library_only(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top == "builder" or top in sys.stdlib_module_names, f"{path.name} imports {name}"
        assert top != "tomllib", "the serving image may have Python 3.10"


@pytest.mark.parametrize("path", named(MODULES))
def test_modules_are_below_the_line_limit(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_classes_of_the_program_have_names_of_their_own() -> None:
    found: dict[str, list[str]] = {}
    for path in MODULES:
        for node in syntax(path).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(dotted(path))
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("path", named(MODULES))
def test_third_party_imports_are_listed_and_lazy(path: Path) -> None:
    """A copy of builder/ serves ``--here`` with the standard library alone."""
    ours = sys.stdlib_module_names | {"builder", "tomllib"}  # tomllib came with Python 3.11
    found = {name.split(".")[0] for name in imports(path)} - ours
    assert found <= set(THIRD_PARTY.get(dotted(path), "").split()), f"{path} imports {found}"
    tree = syntax(path)
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    eager = {name.split(".")[0] for node in top for name in named_by(node)} - ours
    assert not eager, f"{path} imports {eager} when it is imported itself"


@pytest.mark.parametrize("path", named(MODULES))
def test_print_is_called_by_main_modules_only(path: Path) -> None:
    calls = [node.func for node in ast.walk(syntax(path)) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert not prints or dotted(path) in ("builder.cli.main", "builder.agent.__main__")


#: Modules and functions that start processes.
STARTERS = {"subprocess", "multiprocessing", "pty", "psutil.Popen", "asyncio.subprocess"}
STARTERS |= {f"os.{name}" for name in vars(os) if name.startswith(("fork", "exec", "spawn", "posix_spawn", "popen"))}
STARTERS |= {"os.system", "concurrent.futures.ProcessPoolExecutor"}


@pytest.mark.parametrize("path", named(sorted((ROOT / "tests" / "unit").rglob("*.py"))))
def test_units_start_no_process(path: Path) -> None:
    """What starts one is in tests/agent, tests/cli, tests/host or tests/project, as are helpers that do."""
    used = set(imports(path))
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{node.value.id}.{node.attr}")
    assert [name for name in sorted(used) if name in STARTERS or name.split(".")[0] in STARTERS] == []
