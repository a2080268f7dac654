"""What the composite action installs is what pyproject.toml asks for, by hash."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement

from builder.manifest.document import Document
from tests.actions import ACTION, ROOT

LOCK = ACTION.parent / "requirements.txt"


def pins() -> dict[str, tuple[Requirement, list[str]]]:
    """Name → (pinned requirement, hashes)."""
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found = {}
    for text in re.split(r"\n(?=\S)", "\n".join(lines)):
        head, *hashes = [part.strip() for part in text.replace("\\\n", "\n").splitlines()]
        pin = Requirement(head)
        found[pin.name] = (pin, hashes)
    return found


def wanted() -> list[Requirement]:
    project = Document.parse("pyproject.toml", (ROOT / "pyproject.toml").read_bytes()).data["project"]
    return [Requirement(text) for text in project["dependencies"]]


@pytest.mark.parametrize("requirement", wanted(), ids=lambda requirement: requirement.name)
def test_lock_pins_a_version_that_the_project_takes(requirement: Requirement) -> None:
    pin, _ = pins()[requirement.name]
    (version,) = pin.specifier
    assert version.operator == "==" and requirement.specifier.contains(version.version, prereleases=True)
    # Of the Pythons that lack tomllib both say the same, in other words.
    assert (requirement.marker is None) == (pin.marker is None)


def test_lock_has_hashes_of_every_file_and_names_no_index() -> None:
    for name, (pin, hashes) in pins().items():
        assert str(pin.specifier).startswith("=="), name
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", text) for text in hashes), name
    assert "://" not in LOCK.read_text(encoding="utf-8")
