"""The generated pages of the reference are current."""

from __future__ import annotations

import dataclasses
import json

from builder import errors
from builder.cli import json_page
from builder.cli.reference import COMMANDS, JSON, METRICS, STATUSES, commands, exit_statuses, metrics_page
from builder.cli.statuses import MEANS, REMEDIES
from builder.errors import PreflightError, Problem
from builder.report.results import Report, TaskResult

REMEDY = "run: python3 -m builder.cli.reference"


def test_pages_are_what_the_program_generates() -> None:
    assert COMMANDS.read_text(encoding="utf-8") == commands(), REMEDY
    assert STATUSES.read_text(encoding="utf-8") == exit_statuses(), REMEDY
    assert METRICS.read_text(encoding="utf-8") == metrics_page(), REMEDY
    assert JSON.read_text(encoding="utf-8") == json_page.page(), REMEDY


def test_every_status_of_an_error_has_a_meaning_and_a_remedy() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    found = {each.exit_code for each in classes if issubclass(each, errors.BuilderError)}
    assert found - {errors.Interrupted.exit_code} == set(MEANS) - {0}
    assert set(REMEDIES) == {*MEANS, errors.Interrupted.exit_code}


def test_every_key_of_a_document_has_a_meaning() -> None:
    report = Report("check", tasks=[TaskResult("a", "m", "k", "cold")])
    document = json.loads(report.document(12, PreflightError("no", [Problem("a", "b")])))
    assert set(document) == set(json_page.DOCUMENT)
    assert set(document["tasks"][0]) == set(json_page.TASK)


def test_every_section_of_a_document_has_its_keys_on_the_page() -> None:
    found = json_page.sections()
    assert len(found) > 20
    for section in found:
        assert dataclasses.is_dataclass(section)
        assert section.__doc__, f"{section.__name__} says nothing of what it adds"
    own = {section.__name__ for section in found if "to_json" in vars(section)}
    assert own == set(json_page.OWN_FORM), "the page shows fields, and these sections have other keys"
