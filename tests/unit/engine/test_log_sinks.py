"""Log files of tasks."""

from __future__ import annotations

import stat
from pathlib import Path

from builder.engine.log_sinks import LogFile


def test_log_file_is_private_whatever_it_was(tmp_path: Path) -> None:
    before = tmp_path / "task.log"
    before.write_text("of an older version")
    before.chmod(0o644)
    file = LogFile(before)
    file.open()
    file.write("out", b"a\n")
    file.close()
    assert (before.read_text(), stat.S_IMODE(before.stat().st_mode)) == ("out| a\n", 0o600)
