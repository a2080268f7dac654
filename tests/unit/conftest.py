"""What units share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all examples, which write over each other's files."""
    return tmp_path_factory.mktemp("properties")
