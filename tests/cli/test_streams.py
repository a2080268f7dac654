"""The program as a process: streams that are closed or full, and Ctrl-C while it loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def shell(words: str, place: Path) -> subprocess.CompletedProcess[str]:
    """The program with these words, as a shell understands them."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"exec {sys.executable} -m builder {words}"
    return subprocess.run(["sh", "-c", command], cwd=place, env=environ, capture_output=True, text=True, timeout=30)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["--help", "check --manifest /no/such/file --json"])
def test_stdout_full_keeps_exit_status(tmp_path: Path, words: str) -> None:
    done = shell(f"{words} >/dev/full", tmp_path)
    assert done.returncode == (0 if words == "--help" else 2)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert ("the JSON document could not be written: No space left on device" in done.stderr) == ("--json" in words)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_keep_exit_status(tmp_path: Path, closed: str) -> None:
    done = shell(f"check --manifest /no/such/file --json {closed}", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = shell(f"--help {closed}", tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from builder.__main__ import main
sys.argv[1:] = ["--version"]
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["builder.cli.main", "argparse", "builder.run.container_executor"])
def test_ctrl_c_during_imports_prints_no_traceback(module: str) -> None:
    code = INTERRUPTED_IMPORT.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
