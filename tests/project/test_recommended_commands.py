"""Commands that messages, help and documents recommend: their verbs and options exist. tests/engine runs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from builder.cli.verbs import VERBS
from tests.commands import COMMAND, DOCUMENTS, OPTION, ROOT, messages


def problems(text: str) -> Iterator[str]:
    """What is wrong with the commands in a text. A word that is no verb is prose, unless options follow it."""
    for name, rest in COMMAND.findall(text.replace("\\\n", " ")):
        options = OPTION.findall(rest)
        if name not in VERBS:
            if options:
                yield f"warm-cache {name}{rest}: there is no such verb"
            continue
        known = {*VERBS[name].options, "help", "version"}
        yield from (f"warm-cache {name}: there is no --{option}" for option in options if option not in known)


def test_commands_in_messages_exist() -> None:
    texts = [(path, text) for path in (ROOT / "builder").rglob("*.py") for text in messages(path)]
    assert sum(bool(COMMAND.search(text)) for _, text in texts) > 20
    assert [f"{path.name}: {problem}" for path, text in texts for problem in problems(text)] == []


def test_commands_in_documents_exist() -> None:
    texts = [(path, path.read_text(encoding="utf-8")) for path in DOCUMENTS if path.is_file()]
    assert sum(bool(COMMAND.search(text)) for _, text in texts) > 5
    assert [f"{path.name}: {problem}" for path, text in texts for problem in problems(text)] == []


@pytest.mark.parametrize(
    "command", ["warm-cache chek --json", "run: warm-cache prune --kep 3", "`warm-cache hold --x`"]
)
def test_command_that_does_not_exist_is_found(command: str) -> None:
    assert list(problems(command))
