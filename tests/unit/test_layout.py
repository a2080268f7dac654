"""The shape of the repository, kept by tests: imports go one way, borders hold, docker/ never hides docker-py."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder import errors
from builder.engine.images import AGENT_FILES

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT / "builder"

MOST_LINES = 500
#: Modules that may be longer, with their reason.
LONGER: dict[str, str] = {}

#: Everything at the top of the repository that is not a dot-file.
TOP_LEVEL = {"docker", "builder", "tests", "Makefile", "pyproject.toml", "README.md"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_in_root(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
    "registry": "host cache",
    "run": "cache host manifest engine report registry",
    "cli": "cache host manifest engine report registry run",
}

#: Modules with imports against the arrows, still to be mended.
NOT_YET = {
    "builder.cache.toolchain", "builder.cache.view_records", "builder.host.hooks", "builder.manifest.from_tests",
    "builder.manifest.sections", "builder.report.audit", "builder.run.here",
    "builder.run.prune", "builder.run.refresh", "builder.run.views",
}  # fmt: skip


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
    assert bool(strayed) == (dotted(path) in NOT_YET), f"{path} imports {strayed}"


@pytest.mark.parametrize("path", named([path for path in ALONE if path != BUILDER / "__main__.py"]))
def test_the_in_container_program_needs_only_the_standard_library(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top == "builder" or top in sys.stdlib_module_names, f"{path.name} imports {name}"
        assert top != "tomllib", "the serving image may have Python 3.10"


def test_the_in_container_program_runs_alone(tmp_path: Path) -> None:
    """With nothing but itself beside it, as in the warm-up image: no site-packages, no host side."""
    for pattern in AGENT_FILES:
        for path in BUILDER.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    modules = [dotted(path) for path in ALONE if path.stem not in ("__init__", "__main__")]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", named(MODULES))
def test_modules_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    name = path.relative_to(BUILDER).as_posix()
    assert (lines > MOST_LINES) == (name in LONGER), f"{name} has {lines} lines"


def test_docker_py_is_used_at_one_border() -> None:
    users = {dotted(path) for path in MODULES for name in imports(path) if name.split(".")[0] == "docker"}
    assert users == {"builder.engine.client"}


def test_only_the_command_line_prints() -> None:
    printing = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                printing.add(dotted(path))
    assert printing <= {"builder.cli.main", "builder.agent.__main__"}


def test_importing_the_command_line_is_cheap() -> None:
    heavy = ("docker", "requests", "rich", "psutil", "tenacity", "pynvml")
    loaded = python_in_root(f"import sys, builder.cli.main; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


class TestDockerFolder:
    def test_it_is_no_package(self) -> None:
        found = [path for path in (ROOT / "docker").rglob("__init__.py") if ".demo" not in path.parts]
        assert found == []

    def test_docker_py_wins_from_the_repository_root(self) -> None:
        where = python_in_root("import docker; print(docker.from_env.__module__, docker.__file__)")
        module, file = where.split(" ", 1)
        assert module.startswith("docker.")
        assert Path(file).name == "__init__.py"
        assert ROOT / "docker" not in Path(file).parents

    def test_nothing_in_it_is_named_like_a_part_of_docker_py(self) -> None:
        parts = python_in_root(
            "import docker, pkgutil; print(*[m.name for m in pkgutil.iter_modules(docker.__path__)])"
        )
        names = {path.name.split(".")[0] for path in (ROOT / "docker").iterdir()}
        assert names.isdisjoint(parts.split())

    def test_the_dockerfile_is_what_the_builder_expects(self) -> None:
        lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
        instructions = [line for line in lines if line and line[0].isupper()]
        assert instructions[:2] == ["ARG SERVING_IMAGE", "FROM ${SERVING_IMAGE}"]


def test_the_top_level_is_as_prescribed() -> None:
    if shutil.which("git") and (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        names = {line.split("/")[0] for line in done.stdout.splitlines()}
    else:
        names = {path.name for path in ROOT.iterdir()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def leaves(cls: type[errors.BuilderError] = errors.BuilderError) -> Iterator[type[errors.BuilderError]]:
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from leaves(child)


def test_every_way_to_fail_has_an_exit_status_of_its_own() -> None:
    statuses: dict[int, str] = {}
    for cls in leaves():
        if cls in (errors.ProblemsError, errors.EngineRefusedError, errors.EngineTimeoutError):
            continue  # a base, and two ways to lose the engine
        assert cls.exit_code not in statuses, f"{cls.__name__} and {statuses[cls.exit_code]} share {cls.exit_code}"
        statuses[cls.exit_code] = cls.__name__
    assert set(statuses) == {1, 2, 10, 11, 12, 13, 14, 15, 16, 17, 130}
    assert errors.EngineRefusedError.exit_code == errors.EngineLostError.exit_code


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__
    for cls in leaves():
        if cls is not errors.ProblemsError:
            assert cls.__name__ in errors.__doc__
