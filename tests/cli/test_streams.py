"""The program as a process: streams that are closed or full, and Ctrl-C while it loads."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


#: The program, whose patience with a stream that nobody reads is 0.5 s in place of 60.
IMPATIENT = """
import sys
from builder.cli import main as cli
from builder.__main__ import main
from builder.report import console
cli.READER = cli.PATIENCE = console.PATIENCE = 0.5
sys.exit(main())
"""


def full_pipe() -> tuple[int, int]:
    """Return the ends of a pipe that takes not one byte more."""
    reader, end = os.pipe()
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"x" * 4096)
    os.set_blocking(end, True)
    return reader, end


def impatient(words: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPATIENT, *words]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, text=True, timeout=20, check=False, **streams)


def test_stdout_that_nobody_reads_is_no_success() -> None:
    reader, end = full_pipe()
    done = impatient(["completion", "bash"], stdout=end, stderr=subprocess.PIPE)
    assert done.returncode == 12
    assert done.stderr == "error: the result could not be written: nobody reads it. Exit 12.\n"
    os.close(reader)
    os.close(end)


def test_stderr_that_nobody_reads_keeps_exit_status() -> None:
    reader, end = full_pipe()
    done = impatient(["check", "--manifest", "/no/such/file", "--json"], stdout=subprocess.PIPE, stderr=end)
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit"] == 2
    os.close(reader)
    os.close(end)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_result_on_full_disk_is_no_success(tmp_path: Path) -> None:
    done = shell("completion bash >/dev/full", tmp_path)
    assert done.returncode == 12
    assert done.stderr == "error: the result could not be written: No space left on device. Exit 12.\n"
    assert shell("completion bash | head -c 10; exit ${PIPESTATUS:-0}", tmp_path).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("stdout", "status"), [(">/dev/full", 12), (">&-", 12), ("| true", 0)], ids=["full", "closed", "pipe"]
)
def test_explanation_that_is_not_delivered_is_no_success(tmp_path: Path, stdout: str, status: int) -> None:
    done = shell(f"explain --here --cache {tmp_path / 'none'} {stdout}", tmp_path)
    assert done.returncode == status
    assert ("error: the result could not be written: " in done.stderr) == (status == 12)


def test_slow_reader_gets_the_whole_result(tmp_path: Path) -> None:
    done = shell("completion bash | (sleep 1; cat)", tmp_path)
    assert done.stdout == shell("completion bash", tmp_path).stdout


def test_files_of_github_that_hang_are_warnings(tmp_path: Path) -> None:
    """A FIFO without a reader stands for a file system that hangs."""
    for name in ("out", "summary"):
        os.mkfifo(tmp_path / name)
    environ = {
        **os.environ,
        "GITHUB_ACTIONS": "true",
        "GITHUB_OUTPUT": str(tmp_path / "out"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    code = IMPATIENT.replace("sys.exit", "from builder.report import github\ngithub.TIMEOUT = 0.2\nsys.exit")
    command = [sys.executable, "-c", code, "check", "--manifest", "/no/such/file"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        assert f"warning: {name} could not be written: it took nothing in time" in done.stdout
