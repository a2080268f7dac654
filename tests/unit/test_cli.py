"""The command line: what is said about wrong ones, what wins over what, and the one status that comes out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import cli, verbs
from builder.container import Cancel
from builder.errors import BuilderError, BusyError, ColdError, EngineLostError, Interrupted, PreflightError, Problem
from builder.session import Session
from builder.warmup.task import Task

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = """
schema = 1
[image]
ref = "tiny:1"
[cache]
root = "/data/cache"
[gpus]
count = 0
[run]
budget = "30m"
[[task]]
model = "org/one"
recipe = "command"
argv = ["true"]
success = "x"
[[task]]
model = "org/two"
recipe = "command"
argv = ["true"]
success = "x"
"""

Act = Callable[[Session, tuple[Task, ...]], None]


class NoEngine:
    """Answers nothing: what these tests do never asks."""

    def __init__(self, url: str | None, timeout: float = 60.0) -> None:
        self.url = url

    def connect(self) -> None:
        return None

    def close(self) -> None:
        return None


class Bench:
    """One manifest; `check` does what the test says."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = place / "manifest.toml"
        self.path.write_text(MANIFEST)
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        self.sessions: list[Session] = []
        self.tasks: list[str] = []
        monkeypatch.setattr(cli, "Engine", NoEngine)
        self.act(lambda session, tasks: None)

    def act(self, act: Act) -> None:
        def recorded(session: Session, tasks: tuple[Task, ...]) -> None:
            self.sessions.append(session)
            self.tasks = [task.model for task in tasks]
            act(session, tasks)

        self.monkeypatch.setattr(verbs, "check", recorded)

    def fail(self, error: BaseException) -> None:
        def act(_session: Session, _tasks: tuple[Task, ...]) -> None:
            raise error

        self.act(act)

    def run(self, *argv: str, manifest: bool = True, **environ: str) -> int:
        given = ["--manifest", str(self.path)] if manifest else []
        return cli.main([argv[0], *given, *argv[1:]], environ=environ)

    def said(self) -> str:
        return self.capsys.readouterr().err


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, monkeypatch, capsys)


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["wram"], ["check", "--no-such"], ["env", "--format", "yaml"], ["check", "--on"]])
def test_argparse_refuses_with_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv, environ={}) == 2
    assert "usage: warm-cache" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [[], *([verb] for verb in cli.VERBS)])
def test_every_verb_explains_itself(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*verb, "--help"], environ={}) == 0
    shown = capsys.readouterr().out
    assert "example: " in shown
    assert "exit status: 0 warm" in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "which manifest? Pass --manifest FILE or --profile NAME (h200, stand-in)"),
        (["--profile", "h100"], "there is no profile 'h100'"),
        (["--manifest", "a", "--profile", "h200"], "--manifest a and --profile h200 exclude each other"),
        (["--manifest", "/no/such/file"], "No such file or directory"),
    ],
)
def test_a_manifest_is_needed(bench: Bench, argv: list[str], said: str) -> None:
    assert bench.run("check", *argv, manifest=False) == 2
    shown = bench.said()
    assert said in shown
    assert shown.endswith("Exit 2.\n")


def test_all_of_a_manifests_problems_at_once(bench: Bench) -> None:
    bench.path.write_text(MANIFEST.replace("count = 0", 'cout = 0\ncount = "x"').replace('ref = "tiny:1"', 'rfe = "x"'))
    assert bench.run("check", "--json") == 2
    captured = bench.capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["exit"], document["verb"], document["tasks"]) == (2, "check", [])
    places = [problem["place"] for problem in document["error"]["problems"]]
    assert len(places) >= 3
    assert all(place.startswith(str(bench.path)) for place in places)
    assert f"({len(places)} problems):" in captured.err


def test_only_what_is_asked_for(bench: Bench) -> None:
    assert bench.run("check", "--only", "org/two") == 0
    assert bench.tasks == ["org/two"]
    assert bench.run("check", "--only", "three") == 2
    assert "no task of " in bench.said()


# --- what wins -------------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment_and_that_over_the_manifest(bench: Bench) -> None:
    def cache(*flags: str, environment: str = "") -> str:
        assert bench.run("check", *flags, WARM_CACHE_CACHE=environment) == 0
        return str(bench.sessions[-1].manifest.cache.root)

    assert cache() == "/data/cache"
    assert cache(environment="/from/environment") == "/from/environment"
    assert cache("--cache", "/from/flag", environment="/from/environment") == "/from/flag"


def test_one_way_to_name_a_manifest_wins_over_the_other_in_the_environment(bench: Bench) -> None:
    assert bench.run("check", WARM_CACHE_PROFILE="h200") == 0
    assert bench.sessions[-1].manifest.path == str(bench.path)
    assert bench.run("check", manifest=False, WARM_CACHE_MANIFEST=str(bench.path)) == 0
    flags = ("--profile", "stand-in", "--cache", "/c")
    assert bench.run("check", *flags, manifest=False, WARM_CACHE_MANIFEST=str(bench.path)) == 0
    assert bench.sessions[-1].manifest.path == "stand-in.toml"


@pytest.mark.parametrize(("value", "strict"), [("1", True), ("yes", True), ("0", False), ("no", False), ("", False)])
def test_switches_in_the_environment(bench: Bench, value: str, strict: bool) -> None:
    assert bench.run("check", WARM_CACHE_STRICT=value) == 0
    assert bench.sessions[-1].options.strict is strict


def test_a_list_in_the_environment(bench: Bench) -> None:
    assert bench.run("check", WARM_CACHE_ONLY="org/two,org/one") == 0
    assert bench.tasks == ["org/one", "org/two"]


def test_a_choice_in_the_environment_is_checked(bench: Bench) -> None:
    assert bench.run("env", WARM_CACHE_FORMAT="yaml") == 2
    assert "WARM_CACHE_FORMAT is 'yaml': one of docker, shell, github, json is wanted" in bench.said()


def test_where_logs_and_leases_go(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.run("check", XDG_RUNTIME_DIR="run", XDG_STATE_HOME=str(tmp_path / "state")) == 0
    options = bench.sessions[-1].options
    assert options.state_dir == tmp_path / "run", "a mount's source is absolute"
    assert options.log_dir.parent == tmp_path / "state" / "warm-cache" / "logs"


# --- the status ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ColdError("1 of 2 tasks cold"), 10, "error: 1 of 2 tasks cold. Exit 10."),
        (BusyError("in use!"), 15, "error: in use! Exit 15."),
        (EngineLostError("gone", notes=["the last line"]), 16, "error: gone. Exit 16.\nlast lines:\n  │ the last line"),
        (Interrupted(signal.SIGTERM), 143, "error: interrupted by SIGTERM. Exit 143."),
        (KeyboardInterrupt(), 130, "error: interrupted by SIGINT. Exit 130."),
        (BuilderError("odd"), 1, "error: odd. Exit 1."),
    ],
)
def test_an_error_is_one_sentence_and_one_status(bench: Bench, error: BaseException, status: int, said: str) -> None:
    bench.fail(error)
    assert bench.run("check") == status
    assert bench.said() == said + "\n"


def test_problems_stand_under_each_other(bench: Bench) -> None:
    problems = [Problem("disk", "it is full.", "Empty it."), Problem("GPUs", "none.")]
    bench.fail(PreflightError("this machine can't run it", problems))
    assert bench.run("check") == 12
    assert bench.said() == (
        "error: this machine can't run it (2 problems):\n"
        "  disk  it is full. Empty it.\n"
        "  GPUs  none.\n"
        "To see the program work without GPUs: make demo. Exit 12.\n"
    )


def test_a_defect_is_a_sentence_and_its_traceback_is_for_those_who_ask(bench: Bench) -> None:
    bench.fail(ZeroDivisionError("division by zero"))
    assert bench.run("check", "--json") == 1
    captured = bench.capsys.readouterr()
    assert "a defect in warm-cache: ZeroDivisionError: division by zero." in captured.err
    assert "Traceback" not in captured.err
    assert json.loads(captured.out)["exit"] == 1
    assert bench.run("check", "-v", "--json") == 1
    assert "Traceback (most recent call last)" in bench.said()


def test_warnings_are_said_whatever_happens(bench: Bench) -> None:
    def act(session: Session, _tasks: tuple[Task, ...]) -> None:
        session.report.warnings.append("removing the container failed")
        raise ColdError("cold")

    bench.act(act)
    assert bench.run("check", "--json") == 10
    captured = bench.capsys.readouterr()
    assert captured.err == "warning: removing the container failed\nerror: cold. Exit 10.\n"
    assert json.loads(captured.out)["warnings"] == ["removing the container failed"]


def test_in_github_actions_the_error_is_an_annotation(bench: Bench) -> None:
    bench.fail(ColdError("100% cold\nreally"))
    assert bench.run("check", GITHUB_ACTIONS="true") == 10
    assert "::error title=warm-cache::100%25 cold%0Areally\n" in bench.capsys.readouterr().out


# --- signals and streams ---------------------------------------------------------------------------------------------


def test_signals_are_handled_only_meanwhile() -> None:
    known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)
    before = [signal.getsignal(number) for number in known]
    cancel = Cancel()
    with cli._signals(cancel):
        assert signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert cancel.signum == signal.SIGTERM
        with cancel.shield():
            os.kill(os.getpid(), signal.SIGINT)
        assert cancel.times == 2
    assert [signal.getsignal(number) for number in known] == before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._signals(Cancel()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_old_terminal_sees_what_it_can(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    bench.fail(ColdError("8 × H200 are cold"))
    assert bench.run("check") == 10
    stream.flush()
    assert stream.buffer.getvalue() == b"error: 8 \\xd7 H200 are cold. Exit 10.\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_defect(tmp_path: Path, closed: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"exec {sys.executable} -m builder check --manifest /no/such/file --json {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
