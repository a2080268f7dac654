"""The generated pages of the reference are current."""

from __future__ import annotations

from builder import errors
from builder.cli.reference import COMMANDS, METRICS, STATUSES, commands, exit_statuses, metrics_page
from builder.cli.statuses import MEANS, REMEDIES

REMEDY = "run: python3 -m builder.cli.reference"


def test_pages_are_what_the_program_generates() -> None:
    assert COMMANDS.read_text(encoding="utf-8") == commands(), REMEDY
    assert STATUSES.read_text(encoding="utf-8") == exit_statuses(), REMEDY
    assert METRICS.read_text(encoding="utf-8") == metrics_page(), REMEDY


def test_every_status_of_an_error_has_a_meaning_and_a_remedy() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    found = {each.exit_code for each in classes if issubclass(each, errors.BuilderError)}
    assert found - {errors.Interrupted.exit_code} == set(MEANS) - {0}
    assert set(REMEDIES) == {*MEANS, errors.Interrupted.exit_code}
