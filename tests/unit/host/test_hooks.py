"""The operator's commands: what they get, how they fail, and that what is owed is paid once, by whoever lives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from builder.engine import lease
from builder.host import hooks
from builder.host.deadlines import Deadline, poll
from builder.host.hooks import Hooks
from tests.fakes import FakeEngine


class Said(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture
def said() -> Said:
    return Said()


def run(said: Said, *lines: str, timeout: float = 20, **more: Any) -> hooks.Failure | None:
    return hooks.run(Hooks(lines, "r1", timeout), dict(os.environ), said, **more)


def test_both_streams_are_shown_and_the_run_is_named(said: Said) -> None:
    assert run(said, "echo to $WARM_CACHE_RUN; echo err >&2", "printf 'no newline'") is None
    assert said == ["$ echo to $WARM_CACHE_RUN; echo err >&2", "to r1", "err", "$ printf 'no newline'", "no newline"]


def test_a_failure_is_the_end_and_says_what_it_heard_last(said: Said) -> None:
    failure = run(said, "echo first; echo last >&2; exit 3", "echo never")
    assert failure is not None
    assert failure.text == "'echo first; echo last >&2; exit 3' ended with status 3: last"
    assert failure.tail == ("first", "last")
    assert "never" not in said


def test_a_release_does_all_it_can(said: Said) -> None:
    failure = run(said, "exit 1", "echo still", all_of_them=True)
    assert failure is not None and failure.text == "'exit 1' ended with status 1, and said nothing"
    assert said[-1] == "still"


def test_a_command_that_takes_too_long_goes_with_its_children(said: Said, tmp_path: Path) -> None:
    began = time.monotonic()
    failure = run(said, f"trap '' TERM; (trap '' TERM; sleep 600 & echo $! > {tmp_path}/pid; wait) ; true", timeout=0.5)
    assert failure is not None and "did not end within" in failure.text
    assert time.monotonic() - began < 10
    # SIGKILL has been sent; a process with other things to do gets round to dying in its own time.
    assert poll(lambda: is_over((tmp_path / "pid").read_text().strip()), Deadline(10), 0.01)


def is_over(pid: str) -> bool:
    """Whether a process is gone, or dead and only not buried."""
    try:
        return " Z " in Path("/proc", pid, "stat").read_text()
    except OSError:
        return True


def test_what_it_leaves_in_the_background_holds_nobody_up(said: Said) -> None:
    began = time.monotonic()
    assert run(said, "sleep 30 & echo started") is None
    assert said[-1] == "started" and time.monotonic() - began < 10


KILLED = """
import sys
from builder.host import hooks
hooks.run(hooks.Hooks((sys.argv[1],), "r1", 600), {"PATH": "/usr/bin:/bin"}, lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "], ids=["heeds SIGTERM", "refuses SIGTERM"])
def test_a_command_does_not_outlive_a_builder_that_is_killed(stubborn: str) -> None:
    line = f"{stubborn}sleep 600 & echo it is $! of $$; wait"
    builder = subprocess.Popen([sys.executable, "-c", KILLED, line], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout is not None
        said = next(text for text in builder.stdout if text.startswith("it is"))
        pids = [int(word) for word in said.split() if word.isdecimal()]
        (group,) = {os.getpgid(pid) for pid in pids}
    finally:
        builder.kill()
        builder.communicate()
    assert poll(lambda: in_group(group) == [], Deadline(10), every=0.05), "the guard is in the group as well"


def in_group(group: int) -> list[str]:
    """Commands of a process group that run."""
    stats = [path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    fields = [text.rpartition(")") for text in stats]
    return [name for name, _, rest in fields if rest.split()[2] == str(group) and rest.split()[0] != "Z"]


def test_a_guard_ends_with_its_command(said: Said) -> None:
    assert run(said, "echo $$") is None
    assert poll(lambda: in_group(int(said[-1])) == [], Deadline(10), every=0.05)


def test_it_reads_nothing(said: Said) -> None:
    assert run(said, "cat; echo done") is None
    assert said[-1] == "done"


def test_a_flood_and_endless_lines_are_survived(said: Said) -> None:
    assert run(said, "head -c 3000000 /dev/zero; seq 20000; head -c 20 /dev/urandom; exit 0") is None
    assert "20000" in said and max(map(len, said)) < 3 * 8192


def test_somebody_in_a_hurry_ends_it(said: Said) -> None:
    hurry = threading.Event()
    threading.Timer(0.2, hurry.set).start()
    failure = run(said, "sleep 600", hurried=hurry.is_set)
    assert failure is not None and failure.text == "'sleep 600' was interrupted"


def test_a_place_that_is_gone_is_no_reason_to_fail(said: Said, tmp_path: Path) -> None:
    assert hooks.run(Hooks(("pwd",), "r1", 20, str(tmp_path / "gone")), dict(os.environ), said) is None
    assert said[-1] == "/"


# --- what is owed ----------------------------------------------------------------------------------------------------


def owed(tmp_path: Path, *lines: str) -> Path:
    hooks.owe(tmp_path, Hooks(lines, "dead", 20, str(tmp_path)))
    return tmp_path / lease.DEBT


def test_a_debt_is_paid_in_the_name_of_who_owed_it(said: Said, tmp_path: Path) -> None:
    debt = owed(tmp_path, "echo $WARM_CACHE_RUN $PWD")
    assert hooks.settle(tmp_path, dict(os.environ), said) is None
    assert said[-1] == f"dead {tmp_path}" and not debt.exists()
    assert hooks.settle(tmp_path, dict(os.environ), said) is None
    assert len(said) == 2


def test_a_debt_stays_until_it_is_paid(said: Said, tmp_path: Path) -> None:
    debt = owed(tmp_path, f"test -e {tmp_path}/ready")
    assert hooks.settle(tmp_path, dict(os.environ), said) is not None
    assert debt.exists()
    (tmp_path / "ready").touch()
    assert hooks.settle(tmp_path, dict(os.environ), said) is None
    assert not debt.exists()


def test_two_who_come_at_once_pay_once(tmp_path: Path) -> None:
    owed(tmp_path, f"echo paid >> {tmp_path}/paid; sleep 0.3")
    threads = [threading.Thread(target=hooks.settle, args=(tmp_path, dict(os.environ), Said())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (tmp_path / "paid").read_text() == "paid\n"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"lines": 3}', "[" * 100_000, '{"lines":[],"run_id":"x","timeout":"soon"}', "\x00"]
)
def test_a_debt_that_nobody_can_read_is_none(said: Said, tmp_path: Path, text: str) -> None:
    (tmp_path / lease.DEBT).write_text(text)
    assert hooks.settle(tmp_path, dict(os.environ), said) is None
    assert said == [] and not (tmp_path / lease.DEBT).exists()


class TestBesideTheLease:
    """A lease's directory with a debt outlives its owner, however that ends, until a sweep has paid."""

    def test_a_living_owner_pays_for_itself(self, tmp_path: Path) -> None:
        with lease.Lease(tmp_path, run_id="r1") as held:
            owed(held.path.parent, "true")
            lease.sweep(FakeEngine(), tmp_path, settle=lambda directory: pytest.fail("swept a living owner"))

    def test_a_dead_owners_debt_is_paid_by_the_next_sweep(self, tmp_path: Path) -> None:
        with lease.Lease(tmp_path, run_id="r1") as held:
            debt = owed(held.path.parent, "true")
        assert debt.exists() and held.path.exists()
        seen: list[Path] = []

        def look(directory: Path) -> bool:
            seen.append(directory)
            return False

        lease.sweep(FakeEngine(), tmp_path, settle=look)
        assert seen == [debt.parent] and debt.exists(), "it was not paid, and stays"
        lease.sweep(FakeEngine(), tmp_path, settle=lambda directory: hooks.settle(directory, {}, Said()) is None)
        assert not debt.parent.exists()

    def test_nobody_who_cannot_pay_removes_it(self, tmp_path: Path) -> None:
        with lease.Lease(tmp_path, run_id="r1") as held:
            debt = owed(held.path.parent, "true")
        lease.sweep(FakeEngine(), tmp_path)
        assert debt.exists()

    def test_without_a_debt_nothing_is_asked(self, tmp_path: Path) -> None:
        with lease.Lease(tmp_path, run_id="r1") as held:
            held.keep = True
        lease.sweep(FakeEngine(), tmp_path, settle=lambda directory: pytest.fail("there is no debt"))
        assert not held.path.parent.exists()
