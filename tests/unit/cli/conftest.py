"""The bench of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.bench import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, monkeypatch, capsys)
