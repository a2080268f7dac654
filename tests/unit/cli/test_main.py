"""The outcome of a verb: messages, the JSON document, and the exit status."""

from __future__ import annotations

import errno
import io
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from builder import __main__
from builder.cli import main as cli
from builder.cli import parser
from builder.errors import (
    BuilderError,
    BusyError,
    ColdError,
    EngineLostError,
    Interrupted,
    PreflightError,
    Problem,
    TasksError,
)
from builder.report.results import ProvenBy, TaskResult
from builder.run import warm
from builder.run.container_executor import ContainerExecutor
from builder.task import Task
from tests.unit.cli.bench import Act, Bench


def warm_tasks(**more: Any) -> Act:
    def act(executor: ContainerExecutor, tasks: tuple[Task, ...]) -> None:
        executor.context.report.tasks = [TaskResult(task.label, task.model, "", "warm", **more) for task in tasks]

    return act


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ColdError("1 of 2 tasks cold"), 10, "error: 1 of 2 tasks cold. Exit 10."),
        (BusyError("in use!"), 15, "error: in use! Exit 15."),
        (EngineLostError("gone", notes=["the last line"]), 16, "error: gone. Exit 16.\nlast line:\n  │ the last line"),
        (EngineLostError("gone", notes=["1", "2"]), 16, "error: gone. Exit 16.\nlast lines:\n  │ 1\n  │ 2"),
        (Interrupted(signal.SIGTERM), 143, "error: interrupted by SIGTERM. Exit 143."),
        (KeyboardInterrupt(), 130, "error: interrupted by SIGINT. Exit 130."),
        (BuilderError("odd"), 1, "error: odd. Exit 1."),
    ],
)
def test_error_is_one_sentence_and_one_status(bench: Bench, error: BaseException, status: int, said: str) -> None:
    bench.fail(error)
    assert bench.run("check") == status
    assert bench.said() == said + "\n"


def test_problems_are_listed_one_per_line(bench: Bench) -> None:
    problems = [Problem("disk", "it is full.", "Empty it."), Problem("GPUs", "none.")]
    bench.fail(PreflightError("this machine can't run it", problems))
    assert bench.run("check") == 12
    assert bench.said() == (
        "error: this machine can't run it (2 problems):\n"
        "  disk  it is full. Empty it.\n"
        "  GPUs  none.\n"
        "To see the program work without GPUs (from a checkout): make demo. Exit 12.\n"
    )


def test_defect_is_one_sentence_and_traceback_with_verbose(bench: Bench) -> None:
    bench.fail(ZeroDivisionError("division by zero"))
    assert bench.run("check", "--json") == 1
    captured = bench.capsys.readouterr()
    assert "a defect in warm-cache: ZeroDivisionError: division by zero." in captured.err
    assert "Traceback" not in captured.err
    assert json.loads(captured.out)["exit"] == 1
    assert bench.run("check", "-v", "--json") == 1
    assert "Traceback (most recent call last)" in bench.said()


def test_error_while_loading_a_verb_is_one_sentence(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many_files(verb: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(parser, "module", too_many_files)
    assert bench.run("check") == 12
    assert bench.said() == "error: this machine can't run it: Too many open files. Exit 12.\n"
    assert bench.run("check", "-v", "--json") == 12
    assert "Traceback (most recent call last)" in bench.said()


def test_warnings_are_printed_on_every_exit(bench: Bench) -> None:
    def act(executor: ContainerExecutor, _tasks: tuple[Task, ...]) -> None:
        executor.context.report.warnings.append("removing the container failed")
        raise ColdError("cold")

    bench.act(act)
    assert bench.run("check", "--json") == 10
    captured = bench.capsys.readouterr()
    assert captured.err == "warning: removing the container failed\nerror: cold. Exit 10.\n"
    assert json.loads(captured.out)["warnings"] == ["removing the container failed"]


def test_github_error_is_an_annotation(bench: Bench) -> None:
    bench.fail(ColdError("100% cold\nreally"))
    assert bench.run("check", GITHUB_ACTIONS="true") == 10
    assert "::error title=warm-cache::100%25 cold%0Areally\n" in bench.capsys.readouterr().out


def test_github_has_one_annotation_for_all_tasks(bench: Bench) -> None:
    def act(executor: ContainerExecutor, _tasks: tuple[Task, ...]) -> None:
        rows = (("a", "cold", ("triton",)), ("b", "cold", ("deep_gemm",)), ("c", "warm", ()))
        tasks = [TaskResult(name, "m", "k", state, f"why {name}", compiled_anew=anew) for name, state, anew in rows]
        executor.context.report.tasks = tasks
        raise ColdError("2 of 3 tasks cold")

    bench.act(act)
    assert bench.run("check", GITHUB_ACTIONS="true") == 10
    found = [line for line in bench.capsys.readouterr().out.splitlines() if line.startswith("::")]
    assert found == ["::error title=b cold::why b%0A2 of 3 tasks cold"]


def test_github_shows_problems_of_a_manifest_at_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.toml").write_text('schema = 1\n[image]\nref = 3\n[cache]\nroot = "/jit"\n[[task]]\nmodle = "m"\n')
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(tmp_path)}
    assert cli.main(["check", "--manifest", str(tmp_path / "m.toml")], environ=environ) == 2
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::")]
    assert any(line.startswith("::error file=m.toml,line=3,title=warm-cache::ref: expected a string") for line in found)
    assert all("file=m.toml,line=" in line for line in found)


def test_github_has_one_annotation_for_changed_kernel_sources(bench: Bench) -> None:
    """The costliest first, whatever the order of the tasks; a cold task says nothing of them."""

    def proven(families: str, rank: int) -> ProvenBy:
        text = f"3 kernel-relevant files differ: expect compilation in {families}"
        return ProvenBy("other", "changed", 60.0, f"proven by build A; {text}", text, rank)

    def act(executor: ContainerExecutor, _tasks: tuple[Task, ...]) -> None:
        report = executor.context.report
        report.set_tasks(
            [
                TaskResult("a", "org/a", "", "warm", proven_by=proven("triton", 10)),
                TaskResult("b", "org/b", "", "warm", proven_by=proven("deep_gemm, triton", 0)),
                TaskResult("c", "org/c", "", "warm", proven_by=proven("triton", 10)),
                TaskResult("d", "org/d", "", "cold", "no-marker", proven_by=proven("quack", 0)),
            ]
        )

    bench.act(act)
    bench.run("check", GITHUB_ACTIONS="true")
    (line,) = re.findall(r"::warning title=kernel sources changed::(.*)", bench.capsys.readouterr().out)
    differ = "3 kernel-relevant files differ: expect compilation in"
    assert line == f"b: {differ} deep_gemm, triton; a, c: {differ} triton"
    bench.run("check")
    assert "::warning" not in bench.capsys.readouterr().out


def test_github_error_text_is_no_command(bench: Bench) -> None:
    bench.fail(ColdError("##[error]no", notes=["x\n::error::no"]))
    assert bench.run("check", GITHUB_ACTIONS="true") == 10
    assert bench.said() == "error: ## [error]no. Exit 10.\nlast line:\n  │ x\n: :error::no\n"


def test_all_warm_prints_nothing_to_do(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(act: Act) -> str:
        monkeypatch.setattr(warm, "warm", lambda executor: act(executor, executor.context.manifest.tasks))
        bench.run("warm", "--create")
        return bench.capsys.readouterr().out

    def interrupted(executor: ContainerExecutor, tasks: tuple[Task, ...]) -> None:
        warm_tasks()(executor, tasks)
        raise Interrupted(signal.SIGTERM)

    assert said(warm_tasks()) == "warm-cache: 2 of 2 tasks warm for toolchain None (tiny:1). Nothing to do.\n"
    claimed = warm_tasks(entries={"triton": 1, "deep_gemm": 2})
    assert "(tiny:1). Vouched for: deep_gemm, triton. Nothing to do.\n" in said(claimed)
    for act in (interrupted, warm_tasks(seconds=1.0)):
        shown = said(act)
        assert "Nothing to do" not in shown
        assert shown.startswith("task ") and "2 warm in 0.0 s." in shown


def test_all_warm_names_tasks_that_claim_nothing(bench: Bench) -> None:
    bench.act(warm_tasks(proof="nothing-claimed"))
    assert bench.run("check") == 0
    assert "nothing-claimed, so that nothing on disk is vouched for" in bench.capsys.readouterr().out


def test_failed_task_log_is_named_below_table(bench: Bench) -> None:
    def act(executor: ContainerExecutor, _tasks: tuple[Task, ...]) -> None:
        executor.context.report.tasks = [
            TaskResult("one", "org/one", "", "failed", "crash", log="/logs/one.log"),
            TaskResult("two", "org/two", "", "warmed", log="/logs/two.log"),
        ]
        raise TasksError("1 failed of 2 tasks")

    bench.act(act)
    assert bench.run("check") == 11
    shown = bench.capsys.readouterr().out
    assert "\nlog of one: /logs/one.log\n1 warmed, 1 failed in " in shown
    assert "two.log" not in shown


def test_signal_exit_status_wins(bench: Bench) -> None:
    def act(executor: ContainerExecutor, _tasks: tuple[Task, ...]) -> None:
        executor.context.cancel.set(signal.SIGTERM)
        raise EngineLostError("the engine was lost")

    bench.act(act)
    assert bench.run("check") == 143
    captured = bench.capsys.readouterr()
    assert captured.out == "warning: the engine was lost\n"
    assert captured.err == "error: interrupted by SIGTERM. Exit 143.\n"


def test_ascii_terminal_gets_escaped_text(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    bench.fail(ColdError("8 × H200 are cold"))
    assert bench.run("check") == 10
    stream.flush()
    assert stream.buffer.getvalue() == b"error: 8 \\xd7 H200 are cold. Exit 10.\n"


def test_ctrl_c_before_run_prints_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert __main__.main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigint_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def main() -> int:
        seen.append(signal.getsignal(signal.SIGINT))
        return 7

    monkeypatch.setattr(cli, "main", main)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert __main__.main() == 7
        assert seen == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("place", "advised"), [("disk", False), ("cache", False), ("GPUs", True), ("engine", True)])
def test_demo_is_advised_only_without_gpus_or_engine(bench: Bench, place: str, advised: bool) -> None:
    bench.fail(PreflightError("this machine can't run it", [Problem(place, "it is not there.")]))
    assert bench.run("check") == 12
    assert ("make demo" in bench.said()) == advised


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("argv", "shows"),
    [
        (["explain"], True),
        (["status"], True),
        (["verify"], True),
        (["doctor"], True),
        (["prune", "--dry-run"], True),
        (["prune"], False),
        (["warm"], False),
    ],
)
def test_result_that_cannot_be_shown_is_no_success(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, argv: list[str], shows: bool
) -> None:
    module = parser.module(argv[0])
    monkeypatch.setattr(module, "run", lambda _args, invocation: invocation.console.say("the result"))
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert bench.run(*argv) == (12 if shows else 0)
    why = "the result could not be written: No space left on device"
    assert bench.said() == (f"error: {why}. Exit 12.\n" if shows else "")


def test_text_is_written_ahead_of_what_is_wrong_with_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_args: Any, invocation: Any) -> None:
        invocation.report.text = "the report"
        raise ColdError("1 of 2 launches covered by no task")

    monkeypatch.setattr(parser.module("import-tests"), "run", run)
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert bench.run("import-tests", "test") == 10
    assert both.getvalue() == "the report\nerror: 1 of 2 launches covered by no task. Exit 10.\n"


def test_problem_list_on_a_narrow_terminal_cuts_no_word(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "docker pull lmsysorg/sglang:v0.5.23"
    bench.fail(
        PreflightError("no", [Problem("image", "it is not on this engine.", f"Run: {command}"), Problem("a", "b")])
    )
    monkeypatch.setenv("COLUMNS", "40")
    bench.run("check")
    assert f"  image  it is not on this engine. Run: {command}.\n" in bench.said(), "a pipe gets whole lines"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bench.run("check")
    lines = bench.said().splitlines()
    assert max(map(len, lines[:-2])) <= 40
    assert any("lmsysorg/sglang:v0.5.23" in line for line in lines)
