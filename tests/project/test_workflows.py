"""What GitHub would refuse, or run otherwise than it reads: the action and the workflows, linted."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.cli.options import OPTIONS
from builder.cli.verbs import VERBS
from tests.actions import ACTION, ROOT, WORKFLOWS, Context, Expression, entries, load

FILES = [ACTION, *sorted(WORKFLOWS.glob("*.yml"))]
FORMS = sorted(path for path in (ROOT / ".github").rglob("*.yml") if path not in FILES)
#: By the file's name, or its folder's.
SCHEMAS = {
    "action.yml": "github-actions",
    "workflows": "github-workflows",
    "dependabot.yml": "dependabot",
    "config.yml": "github-issue-config",
    "ISSUE_TEMPLATE": "github-issue-forms",
}
BIN = Path(sys.executable).parent


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.name) for path in paths]


def steps(path: Path) -> Iterator[dict[str, Any]]:
    document = load(path)
    if "runs" in document:
        yield from document["runs"]["steps"]
    for job in document.get("jobs", {}).values():
        yield from job["steps"]


@pytest.mark.parametrize("path", named([*FILES, *FORMS]))
def test_workflow_is_valid_by_schema(path: Path) -> None:
    """By the schemas that GitHub's editors use, out of the linter's own wheel."""
    schema = f"vendor.{SCHEMAS.get(path.name) or SCHEMAS[path.parent.name]}"
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", schema, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", named(FILES))
def test_workflow_scripts_pass_shellcheck(path: Path) -> None:
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
def test_workflow_actions_and_expressions_are_known(path: Path) -> None:
    for step in steps(path):
        if "uses" in step:
            assert step["uses"].startswith("./") or re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
            if step["uses"].startswith("./"):
                assert set(step["with"]) <= set(load(ACTION)["inputs"])


@pytest.mark.parametrize(
    "path",
    named(
        [
            *FILES,
            ROOT / "README.md",
            *sorted((ROOT / ".github").glob("*.md")),
            ROOT / "docker" / "README.md",
            *sorted((ROOT / "builder" / "docs").glob("*.md")),
        ]
    ),
)
def test_actions_pinned_by_commit(path: Path) -> None:
    """Local actions need no pin; examples for other repositories have the words COMMIT and VERSION in these places."""
    for found in re.finditer(r"\buses: +(\S+)(.*)", path.read_text(encoding="utf-8")):
        if not found[1].startswith("./"):
            assert re.fullmatch(r"[\w./-]+@([0-9a-f]{40}|COMMIT)", found[1]), f"not pinned: {found[0]}"
            assert re.fullmatch(r" # (v\d+\.\d+\.\d+|VERSION)", found[2]), f"no version: {found[0]}"


def test_one_commit_per_action() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    pins: dict[str, set[str]] = {}
    for action, pin in re.findall(r"\buses: +(actions/[a-z-]+)@(.+)", text):
        pins.setdefault(action, set()).add(pin)
    assert {action: len(found) for action, found in pins.items()} == dict.fromkeys(pins, 1)


def test_only_the_release_job_may_write() -> None:
    """And it checks nothing out, so that it runs nothing that came with a change."""
    granted = {}
    for path in sorted(WORKFLOWS.glob("*.yml")):
        document = load(path)
        assert document["permissions"] == {"contents": "read"}
        granted.update(
            {(path.name, name): job["permissions"] for name, job in document["jobs"].items() if "permissions" in job}
        )
    assert granted == {("release.yml", "release"): {"contents": "write"}}
    uses = [step["uses"] for step in load(WORKFLOWS / "release.yml")["jobs"]["release"]["steps"] if "uses" in step]
    assert [use.split("@")[0] for use in uses] == ["actions/download-artifact"]


def test_checkouts_keep_no_token() -> None:
    for path in WORKFLOWS.glob("*.yml"):
        for step in steps(path):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}, path.name


def test_action_options_exist_in_program() -> None:
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
def test_workflow_expressions_evaluate_as_on_runner(text: str, value: object) -> None:
    names = Context({"vars.B": "b", "github.event_name": "pull_request_target"})
    assert Expression(names, {}).value(text) == value


def test_workflow_unknown_name_is_error() -> None:
    with pytest.raises(KeyError, match=r"inputs\.modus"):
        Expression(Context(), {}).value("inputs.modus == 'check'")


def test_output_file_parses_entries_only() -> None:
    assert entries("a=b=c\nd<<end-1\nx\ny=z\nend-1\n") == {"a": "b=c", "d": "x\ny=z"}
    with pytest.raises(AssertionError, match="not an entry"):
        entries("a=1\nplain text\n")
