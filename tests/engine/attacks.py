"""The table of attacks in README.md, made of the tests' marks.

A test of an attack, wherever it is below tests/, or one of its parameters, carries
``@pytest.mark.attack(ATTACK, by=…, holds=…)``: a row of the table. tests/project/test_fault_table.py asserts that
README.md has exactly these rows. ``python3 -m tests.engine.attacks`` writes them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE / "README.md"
#: Who attacks, and what that is.
BY = {
    "view": "a job with a view",
    "env": "a job with the mounts and variables that `env` prints",
    "runner container": "a job in a container that outlives it",
    "manifest": "a manifest of a pull request",
    "other user": "another user of the machine",
    "image": "a serving image, or what a manifest builds on one",
    "registry": "a registry, or whoever can write to one",
}
HEADING = "## Attacks\n"
HEAD = f"""\
{HEADING}
After every one of them: what others see is unchanged, the builder ends with the documented exit status, and what was
refused is named. *By* is who attacks: {"; ".join(f"*{name}*: {text}" for name, text in BY.items())}.

This table is made of the tests' `attack` marks, wherever they are below `tests/`, and a test keeps it from drifting. To
write it again: `python3 -m tests.engine.attacks`.

"""
COLUMNS = ("attack", "by", "what holds", "test")


@dataclass(frozen=True)
class Attack:
    """One attack, as its test's mark says it."""

    name: str
    by: str
    holds: str
    test: str

    @property
    def cells(self) -> list[str]:
        return [self.name, self.by, self.holds, f"`{self.test}`"]


def attacks() -> list[Attack]:
    """Of all tests, by the attacker, then in the order of the files and of the tests in them."""
    found = []
    for path in sorted(HERE.parent.rglob("test_*.py")):
        if "mark.attack(" not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(HERE.parents[1]).with_suffix("").parts)
        for test, value in vars(importlib.import_module(name)).items():
            if getattr(value, "__module__", name) == name:
                found += list(_attacks(f"{path.stem}.{test}", getattr(value, "pytestmark", ())))
    order = list(BY)
    return sorted(found, key=lambda attack: order.index(attack.by))


def _attacks(test: str, marks: Iterable[Any]) -> Iterator[Attack]:
    for mark in marks:
        if mark.name == "attack":
            assert mark.kwargs["by"] in BY, f"{test}: by is one of {', '.join(BY)}"
            yield Attack(mark.args[0], mark.kwargs["by"], mark.kwargs["holds"], test)
        elif mark.name == "parametrize":
            for case in mark.args[1]:
                yield from _attacks(f"{test}[{getattr(case, 'id', None)}]", getattr(case, "marks", ()))


def section(found: Iterable[Attack]) -> str:
    """Return the part of README.md about attacks."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(attack.cells for attack in found)]
    return HEAD + "".join(map(line, rows))


def line(cells: Collection[str]) -> str:
    """Return a row of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def cells(text: str) -> list[list[str]]:
    """Return the rows of the one table in this text, without its head."""
    lines = [row for row in text.splitlines() if row.startswith("| ")]
    found = [re.split(r"(?<!\\)\|", row)[1:-1] for row in lines[2:]]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in found]


def main() -> None:
    """Write the attacks into README.md."""
    before, _, _ = TABLE.read_text(encoding="utf-8").partition(HEADING)
    TABLE.write_text(f"{before.rstrip()}\n\n{section(attacks())}", encoding="utf-8")


if __name__ == "__main__":
    main()
