"""The manifest that `init` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema

from builder.manifest.document import Document
from builder.manifest.fields import keys_of
from builder.manifest.load import load
from builder.manifest.schema import SCHEMA_FILE, schema, sections
from builder.manifest.task_keys import TaskTable
from builder.manifest.template import of_profile, template

_KEY = re.compile(r"# ([a-z_]+) = ")


def test_template_is_a_manifest_for_editors_too(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(template())
    assert len(load(path).tasks) == 1
    first = template().splitlines()[0]
    assert first == f"#:schema {SCHEMA_FILE.as_uri()}"
    assert max(map(len, template().splitlines()[1:])) <= 120


def test_template_has_every_key_and_its_comments_are_values() -> None:
    """Each commented key is one of its section with a value that the schema takes."""
    text = "\n".join(
        line[2:] if _KEY.match(line) else line for line in template().splitlines() if not line.startswith("#:")
    )
    data = Document.parse("m.toml", text.encode()).data
    for name, section in sections().items():
        assert set(data[name]) == set(keys_of(section))
    assert {*data["task"][0], *data["defaults"]} == set(keys_of(TaskTable))
    assert [error.message for error in jsonschema.Draft202012Validator(schema()).iter_errors(data)] == []
    json.dumps(data)


def test_profile_becomes_a_manifest_for_editors(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(of_profile("h200"))
    assert load(path).tasks == load(profile="h200").tasks
