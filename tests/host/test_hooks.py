"""The operator's hooks as real processes: environment, output, failures, timeouts, and the pending release."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from builder.host import hooks
from builder.host.deadlines import Deadline, poll
from builder.host.hooks import Hooks


class Printed(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture
def printed() -> Printed:
    return Printed()


def run(printed: Printed, *lines: str, timeout: float = 20, **more: Any) -> hooks.HookFailure | None:
    return hooks.run(Hooks(lines, "r1", timeout), dict(os.environ), printed, **more)


def test_run_shows_both_streams_and_names_the_run(printed: Printed) -> None:
    assert run(printed, "echo to $WARM_CACHE_RUN; echo err >&2", "printf 'no newline'") is None
    assert printed == ["$ echo to $WARM_CACHE_RUN; echo err >&2", "to r1", "err", "$ printf 'no newline'", "no newline"]


def test_run_failure_ends_it_with_the_last_line(printed: Printed) -> None:
    failure = run(printed, "echo first; echo last >&2; exit 3", "echo never")
    assert failure is not None
    assert failure.text == "'echo first; echo last >&2; exit 3' ended with status 3: last"
    assert failure.tail == ("first", "last")
    assert "never" not in printed


def test_run_keep_going_runs_all_lines(printed: Printed) -> None:
    failure = run(printed, "exit 1", "echo still", keep_going=True)
    assert failure is not None and failure.text == "'exit 1' ended with status 1, without output"
    assert printed[-1] == "still"


def test_run_timeout_ends_the_whole_group(printed: Printed, tmp_path: Path) -> None:
    began = time.monotonic()
    failure = run(
        printed, f"trap '' TERM; (trap '' TERM; sleep 600 & echo $! > {tmp_path}/pid; wait) ; true", timeout=0.5
    )
    assert failure is not None and "did not end within" in failure.text
    assert time.monotonic() - began < 10
    # SIGKILL has been sent; a process with other things to do may take a moment to end.
    assert poll(lambda: has_ended((tmp_path / "pid").read_text().strip()), Deadline(10), 0.01)


def has_ended(pid: str) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return " Z " in Path("/proc", pid, "stat").read_text()
    except OSError:
        return True


def test_run_background_process_is_not_waited_for(printed: Printed) -> None:
    began = time.monotonic()
    assert run(printed, "sleep 30 & echo started") is None
    assert printed[-1] == "started" and time.monotonic() - began < 10


KILLED = """
import sys
from builder.host import hooks
hooks.run(hooks.Hooks((sys.argv[1],), "r1", 600), {"PATH": "/usr/bin:/bin"}, lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "], ids=["heeds SIGTERM", "refuses SIGTERM"])
def test_run_killed_builder_ends_its_command(stubborn: str) -> None:
    line = f"{stubborn}sleep 600 & echo it is $! of $$; wait"
    builder = subprocess.Popen([sys.executable, "-c", KILLED, line], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout is not None
        line = next(text for text in builder.stdout if text.startswith("it is"))
        pids = [int(word) for word in line.split() if word.isdecimal()]
        (group,) = {os.getpgid(pid) for pid in pids}
    finally:
        builder.kill()
        builder.communicate()
    assert poll(lambda: in_group(group) == [], Deadline(10), every=0.05), "the guard is in the group as well"


def in_group(group: int) -> list[str]:
    """Names of the running processes of a group."""
    stats = [path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    fields = [text.rpartition(")") for text in stats]
    return [name for name, _, rest in fields if rest.split()[2] == str(group) and rest.split()[0] != "Z"]


def test_run_guard_ends_with_its_command(printed: Printed) -> None:
    assert run(printed, "echo $$") is None
    assert poll(lambda: in_group(int(printed[-1])) == [], Deadline(10), every=0.05)


def test_run_command_has_empty_stdin(printed: Printed) -> None:
    assert run(printed, "cat; echo done") is None
    assert printed[-1] == "done"


def test_run_flood_and_endless_lines_are_cut(printed: Printed) -> None:
    assert run(printed, "head -c 3000000 /dev/zero; seq 20000; head -c 20 /dev/urandom; exit 0") is None
    assert "20000" in printed and max(map(len, printed)) < 3 * 8192


def test_run_hurried_interrupts_it(printed: Printed) -> None:
    hurry = threading.Event()
    threading.Timer(0.2, hurry.set).start()
    failure = run(printed, "sleep 600", hurried=hurry.is_set)
    assert failure is not None and failure.text == "'sleep 600' was interrupted"


def test_run_missing_directory_runs_in_root(printed: Printed, tmp_path: Path) -> None:
    assert hooks.run(Hooks(("pwd",), "r1", 20, str(tmp_path / "gone")), dict(os.environ), printed) is None
    assert printed[-1] == "/"


# --- the pending release ---------------------------------------------------------------------------------------------


def record(tmp_path: Path, *lines: str) -> Path:
    hooks.record_pending_release(tmp_path, Hooks(lines, "dead", 20, str(tmp_path)))
    return tmp_path / hooks.PENDING_RELEASE


def test_pending_release_runs_as_the_run_that_recorded_it(printed: Printed, tmp_path: Path) -> None:
    pending = record(tmp_path, "echo $WARM_CACHE_RUN $PWD")
    assert hooks.run_pending_release(tmp_path, dict(os.environ), printed) is None
    assert printed[-1] == f"dead {tmp_path}" and not pending.exists()
    assert hooks.run_pending_release(tmp_path, dict(os.environ), printed) is None
    assert len(printed) == 2


def test_pending_release_failure_keeps_the_record(printed: Printed, tmp_path: Path) -> None:
    pending = record(tmp_path, f"test -e {tmp_path}/ready")
    assert hooks.run_pending_release(tmp_path, dict(os.environ), printed) is not None
    assert pending.exists()
    (tmp_path / "ready").touch()
    assert hooks.run_pending_release(tmp_path, dict(os.environ), printed) is None
    assert not pending.exists()


def test_pending_release_concurrent_sweeps_run_it_once(tmp_path: Path) -> None:
    record(tmp_path, f"echo ran >> {tmp_path}/ran; sleep 0.3")
    threads = [
        threading.Thread(target=hooks.run_pending_release, args=(tmp_path, dict(os.environ), Printed()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (tmp_path / "ran").read_text() == "ran\n"
