"""The repository: its top level, a docker/ folder that hides no docker-py, an in-container program that runs alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from builder.engine.images import AGENT_FILES

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT / "builder"

#: Everything at the top of the repository that is not a dot-file.
TOP_LEVEL = {"docker", "builder", "tests", "Makefile", "pyproject.toml", "README.md", "CHANGELOG.md"}


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


def test_agent_files_run_alone(tmp_path: Path) -> None:
    """With nothing but itself beside it, as in the warm-up image: no site-packages, no host side."""
    for pattern in AGENT_FILES:
        for path in BUILDER.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    paths = [path for pattern in AGENT_FILES for path in BUILDER.glob(pattern) if path.suffix == ".py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    modules = [name for name in names if not name.endswith(("__init__", "__main__"))]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_cli_loads_no_third_party_package() -> None:
    heavy = ("docker", "requests", "rich", "psutil", "tenacity", "pynvml")
    loaded = python_in_root(f"import sys, builder.cli.main; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_importing_engine_loads_no_docker_py() -> None:
    heavy = ("docker", "requests", "tenacity")
    modules = "builder.engine.client, builder.engine.container"
    loaded = python_in_root(f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_check_imports_no_protocol() -> None:
    """A warm check reads files: it needs neither the job nor the events, nor what runs a container."""
    names = ("events", "job", "typed_json", "agent.__main__", "engine.container", "engine.log_pump")
    code = "import sys, builder.cli.main, builder.cli.commands.check"
    loaded = python_in_root(f"{code}; print([m for m in {names} if f'builder.{{m}}' in sys.modules])")
    assert loaded == "[]"


class TestDockerFolder:
    def test_docker_folder_is_no_package(self) -> None:
        found = [path for path in (ROOT / "docker").rglob("__init__.py") if ".demo" not in path.parts]
        assert found == []

    def test_docker_py_wins_from_the_repository_root(self) -> None:
        where = python_in_root("import docker; print(docker.from_env.__module__, docker.__file__)")
        module, file = where.split(" ", 1)
        assert module.startswith("docker.")
        assert Path(file).name == "__init__.py"
        assert ROOT / "docker" not in Path(file).parents

    def test_docker_folder_names_hide_no_docker_py_module(self) -> None:
        parts = python_in_root(
            "import docker, pkgutil; print(*[m.name for m in pkgutil.iter_modules(docker.__path__)])"
        )
        names = {path.name.split(".")[0] for path in (ROOT / "docker").iterdir()}
        assert names.isdisjoint(parts.split())

    def test_dockerfile_begins_with_base_argument(self) -> None:
        lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
        instructions = [line for line in lines if line and line[0].isupper()]
        assert instructions[:3] == [
            "ARG SERVING_IMAGE=scratch",
            "ARG BUILDER_BASE=python:3.12-slim",
            "FROM ${SERVING_IMAGE} AS warm-up",
        ]


def test_top_level_is_as_prescribed() -> None:
    if shutil.which("git") and (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        names = {line.split("/")[0] for line in done.stdout.splitlines()}
    else:
        names = {path.name for path in ROOT.iterdir()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL
