"""The files around the program say what is so: hooks, dependencies, what contributors read."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from tests.actions import load

ROOT = Path(__file__).resolve().parents[2]


def test_private_methods_of_docker_py() -> None:
    """pyproject.toml excludes docker-py 8, and README.md gives the number of private methods as the reason."""
    api_client = importlib.import_module("docker").APIClient
    source = (ROOT / "builder" / "engine" / "client.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\b(?:api|_api|client)\.(_[a-z][a-z_]*)\(", source))
    assert used == {"_url", "_set_auth_headers", "_get_raw_response_socket", "_raise_for_status"}
    assert all(callable(getattr(api_client, name)) for name in used)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    """Command by command; each hook looks at the whole tree, as make does, and brings no environment of its own."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    commands = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    for hook in repository["hooks"]:
        assert (hook["language"], hook["pass_filenames"], hook["always_run"]) == ("system", False, True)
