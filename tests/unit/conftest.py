"""Fixtures of the in-container program's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.program import Program, assemble

collect_ignore = ["fixtures"]  # test files to be read, not run


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the fake sglang, made once."""
    return assemble(tmp_path_factory.mktemp("tiny") / "site")


@pytest.fixture
def program(tmp_path: Path, site: Path) -> Program:
    return Program(tmp_path, site)
