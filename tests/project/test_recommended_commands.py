"""Commands that messages, help and documents recommend: their verbs and options exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.cli.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "docker/README.md")),
    *(ROOT / "builder").rglob("*.md"),
    *(ROOT / ".github").rglob("*.*"),
    *(ROOT / "docker" / "systemd").iterdir(),
]

#: The program, a word, and what may follow it on the line up to the end of the command.
_COMMAND = re.compile(r"warm-cache ([a-z]+(?:-[a-z]+)*)\b([^`'\"|;&#)\n]*)")
_OPTION = re.compile(r"(?<!\S)--([a-z][a-z-]*)")


def messages(path: Path) -> Iterator[str]:
    """Every text in the program, an f-string with its values left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values)


def problems(text: str) -> Iterator[str]:
    """What is wrong with the commands in a text. A word that is no verb is prose, unless options follow it."""
    for name, rest in _COMMAND.findall(text.replace("\\\n", " ")):
        options = _OPTION.findall(rest)
        if name not in VERBS:
            if options:
                yield f"warm-cache {name}{rest}: there is no such verb"
            continue
        known = {*VERBS[name].options, "help", "version"}
        yield from (f"warm-cache {name}: there is no --{option}" for option in options if option not in known)


def test_commands_in_messages_exist() -> None:
    texts = [(path, text) for path in (ROOT / "builder").rglob("*.py") for text in messages(path)]
    assert sum(bool(_COMMAND.search(text)) for _, text in texts) > 20
    assert [f"{path.name}: {problem}" for path, text in texts for problem in problems(text)] == []


def test_commands_in_documents_exist() -> None:
    texts = [(path, path.read_text(encoding="utf-8")) for path in DOCUMENTS if path.is_file()]
    assert sum(bool(_COMMAND.search(text)) for _, text in texts) > 5
    assert [f"{path.name}: {problem}" for path, text in texts for problem in problems(text)] == []


@pytest.mark.parametrize(
    "command", ["warm-cache chek --json", "run: warm-cache prune --kep 3", "`warm-cache hold --x`"]
)
def test_command_that_does_not_exist_is_found(command: str) -> None:
    assert list(problems(command))
