"""What contributors read and run is what there is: hooks, dependencies, links, the changelog."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from builder import __version__
from tests.actions import load

ROOT = Path(__file__).resolve().parents[2]
FOR_CONTRIBUTORS = [ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").glob("*.md"))]


def test_contributing_names_private_methods_of_docker_py() -> None:
    """pyproject.toml excludes docker-py 8, because private methods of it are used (decisions.md)."""
    api_client = importlib.import_module("docker").APIClient
    source = (ROOT / "builder" / "engine" / "connection.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\b(?:api|_api|client)\.(_[a-z][a-z_]*)\(", source))
    assert used == {"_url", "_set_auth_headers", "_get_raw_response_socket"}
    assert all(callable(getattr(api_client, name)) for name in used)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    """The same commands in the same order, on the whole tree, in the environment that make set up."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    commands = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    for hook in repository["hooks"]:
        assert (hook["language"], hook["pass_filenames"], hook["always_run"]) == ("system", False, True)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in FOR_CONTRIBUTORS])
def test_links_and_make_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target = (path.parent / link).resolve()
        assert link.startswith("https://") or target.exists(), link
    for name in re.findall(r"`(tests/[\w./]+|builder/[\w./]+\.py)`", text):
        assert (ROOT / name).exists(), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in re.findall(r"`make ([a-z -]+)", text):
        assert set(words.split()) <= targets, words


def test_changelog_has_the_version() -> None:
    """The version is either released, with a heading and a date, or what the text calls unreleased."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])
    assert __version__ in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
