"""builder/docs/security.md says what every field of a manifest may do, and which list of the policy bounds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from builder.manifest import policy, schema
from builder.manifest.fields import keys_of
from builder.manifest.task_keys import TaskTable

PAGE = Path(policy.__file__).parents[1] / "docs" / "security.md"


def rows() -> dict[str, tuple[str, str]]:
    """Field → power, list of the policy."""
    text = PAGE.read_text(encoding="utf-8").partition("## What a manifest may do")[2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {field: (row[1], row[2]) for row in cells for field in re.findall(r"`(\[.+?\] \w+)`", row[0])}


def fields() -> list[str]:
    tables = {f"[{name}]": table for name, table in schema.sections().items()} | {"[[task]]": TaskTable}
    return [f"{title} {name}" for title, table in tables.items() for name in keys_of(table)]


def test_every_field_of_a_manifest_has_a_row() -> None:
    assert sorted(rows()) == sorted(fields())


@pytest.mark.parametrize("rule", policy.RULES, ids=lambda rule: f"{rule.section}-{rule.field}")
def test_row_names_the_list_that_bounds_the_field(rule: policy.PolicyRule) -> None:
    assert rows()[f"[{rule.section}] {rule.field}"][1] == f"`[{rule.section}] {rule.list}`"


def test_rows_without_a_rule_say_none() -> None:
    bounded = {f"[{rule.section}] {rule.field}" for rule in policy.RULES}
    assert {bound for field, (_, bound) in rows().items() if field not in bounded} == {"none"}


def test_example_is_a_policy_with_every_list() -> None:
    example = PAGE.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    found = policy.parse("example", example.encode())
    assert all(str(allowed.location) != "example:1" for allowed in found.lists.values())
