"""Temporary directories of killed processes are removed by the next one, and those of living ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.host import temporary

HOLD = """
import sys
from builder.host import temporary
with temporary.directory("view") as path:
    (path / "index.json").write_text("1")
    print(path, flush=True)
    sys.stdin.read()
"""


def test_directory_of_a_killed_process_is_removed_and_of_a_living_one_stays(tmp_path: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    elsewhere = tmp_path / "kept"
    elsewhere.mkdir()
    link = tmp_path / "warm-cache-held-view-link"
    link.symlink_to(elsewhere)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        path = Path(process.stdout.readline().strip())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(tmp_path))
            patch.setattr("tempfile.tempdir", None)
            temporary.remove_orphans()
            assert (path / "index.json").exists()
            process.kill()
            process.wait()
            assert path.exists()
            with temporary.directory("ssh") as own:
                assert not path.exists()
                temporary.remove_orphans()
                assert own.is_dir()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["kept", link.name]
