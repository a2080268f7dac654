"""A damaged record of a pending release is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.host import hooks


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"lines": 3}', "[" * 100_000, '{"lines":[],"run_id":"x","timeout":"soon"}', "\x00"]
)
def test_pending_release_damaged_record_is_removed(tmp_path: Path, text: str) -> None:
    printed: list[str] = []
    (tmp_path / hooks.PENDING_RELEASE).write_text(text)
    assert hooks.run_pending_release(tmp_path, {}, printed.append) is None
    assert printed == [] and not (tmp_path / hooks.PENDING_RELEASE).exists()
