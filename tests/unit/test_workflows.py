"""What GitHub would refuse, or run otherwise than it reads: the action and the workflows, linted."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.cli.options import OPTIONS, VERBS
from tests.actions import ACTION, WORKFLOWS, Context, Expression, entries, load

FILES = [ACTION, *sorted(WORKFLOWS.glob("*.yml"))]
BIN = Path(sys.executable).parent


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.name) for path in paths]


def steps(path: Path) -> Iterator[dict[str, Any]]:
    document = load(path)
    if "runs" in document:
        yield from document["runs"]["steps"]
    for job in document.get("jobs", {}).values():
        yield from job["steps"]


@pytest.mark.parametrize("path", named(FILES))
def test_it_is_what_github_reads(path: Path) -> None:
    """By the schemas that GitHub's editors use, out of the linter's own wheel."""
    schema = "vendor.github-actions" if path == ACTION else "vendor.github-workflows"
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", schema, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", named(FILES))
def test_its_scripts_are_good_shell(path: Path) -> None:
    scripts = [step["run"] for step in steps(path) if "run" in step]
    for script in scripts:
        done = subprocess.run(
            [BIN / "shellcheck", "--shell=bash", "--enable=avoid-nullary-conditions", "-"],
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout
        assert "${{" not in script, "what an expression gives must not become part of a script"


@pytest.mark.parametrize("path", named(FILES))
def test_foreign_actions_and_expressions_are_known(path: Path) -> None:
    for step in steps(path):
        if "uses" in step:
            assert step["uses"].startswith("./") or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            if step["uses"].startswith("./"):
                assert set(step["with"]) <= set(load(ACTION)["inputs"])


def test_what_the_action_passes_on_is_what_the_program_knows() -> None:
    text = ACTION.read_text(encoding="utf-8")
    options = set(re.findall(r"given ([a-z-]+) ", text))
    assert {"manifest", "on-cold", "budget", "when-idle"} <= options
    assert options <= set(OPTIONS)
    assert set(re.findall(r"bin/warm-cache\" ([a-z]+) ", text)) <= set(VERBS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("vars.A == '' && 'h200' || ''", "h200"),
        ("vars.B != ''", True),
        ("startsWith(github.event_name, 'pull_request') && 'check' || 'warm'", "check"),
        ("!(vars.B == 'b') || 'it''s'", "it's"),
    ],
)
def test_expressions_mean_what_the_runner_makes_of_them(text: str, value: object) -> None:
    names = Context({"vars.B": "b", "github.event_name": "pull_request_target"})
    assert Expression(names, {}).value(text) == value


def test_an_unknown_name_in_an_expression_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"inputs\.modus"):
        Expression(Context(), {}).value("inputs.modus == 'check'")


def test_a_file_of_outputs_holds_entries_and_nothing_else() -> None:
    assert entries("a=b=c\nd<<end-1\nx\ny=z\nend-1\n") == {"a": "b=c", "d": "x\ny=z"}
    with pytest.raises(AssertionError, match="not an entry"):
        entries("a=1\nplain text\n")
