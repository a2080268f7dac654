"""The command line: what is said about wrong ones, what wins over what, and the one status that comes out."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder import __main__
from builder.cli import invocation, parser
from builder.cli import main as cli
from builder.cli import options as words
from builder.cli.commands import check
from builder.cli.options import ManifestArgs
from builder.cli.signals import Signals
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
from builder.host.cancel import Cancel
from builder.report.results import TaskResult
from builder.run import warm
from builder.run.container_executor import ContainerExecutor
from builder.task import Task

ROOT = Path(__file__).resolve().parents[3]
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


def shell(words: str, place: Path) -> subprocess.CompletedProcess[str]:
    """The program with these words, as a shell understands them."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"exec {sys.executable} -m builder {words}"
    return subprocess.run(["sh", "-c", command], cwd=place, env=environ, capture_output=True, text=True, timeout=30)


Act = Callable[[ContainerExecutor, tuple[Task, ...]], None]


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
        self.executors: list[ContainerExecutor] = []
        self.tasks: list[str] = []
        monkeypatch.setattr(invocation, "Engine", NoEngine)
        self.act(lambda executor, tasks: None)

    def act(self, act: Act) -> None:
        def recorded(executor: ContainerExecutor, _on_cold: str | None) -> None:
            self.executors.append(executor)
            self.tasks = [task.model for task in executor.context.manifest.tasks]
            act(executor, executor.context.manifest.tasks)

        self.monkeypatch.setattr(check, "check", recorded)

    def fail(self, error: BaseException) -> None:
        def act(_executor: ContainerExecutor, _tasks: tuple[Task, ...]) -> None:
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
def test_wrong_arguments_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv, environ={}) == 2
    assert "usage: warm-cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "usage: warm-cache VERB [option ...]\nerror: which verb? One of warm, check"),
        (["chekc"], "usage: warm-cache VERB [option ...]\nerror: there is no verb 'chekc'; did you mean 'check'?"),
        (["zzz"], "error: there is no verb 'zzz'; known: audit, "),
        (["--strict"], "error: --strict comes after the verb, which is one of warm, check"),
        (["--jsno"], "error: there is no option '--jsno'; see: warm-cache --help."),
        (["warm", "--bugdet", "5m"], "error: there is no option '--bugdet'; did you mean --budget? Exit 2."),
        (["warm", "--bugdet=5m"], "error: there is no option '--bugdet'; did you mean --budget? Exit 2."),
        (["check", "--zzz"], "error: there is no option '--zzz'; see: warm-cache check --help. Exit 2."),
        (["check", "--force"], "error: --force is no option of check, but of warm. Exit 2."),
        (["check", "all"], "usage: warm-cache check [option ...]\nerror: check takes no argument 'all'. Exit 2."),
        (["check", "--cache"], "error: --cache needs a value. Exit 2."),
        (["check", "--strict=1"], "error: --strict takes no value. Exit 2."),
        (["env", "--format", "yaml"], "error: --format is 'yaml': one of docker, shell, github, json is wanted. Exit"),
        (["hold", "pytest"], "error: hold takes no argument 'pytest'; the command follows after two dashes. Exit 2."),
    ],
)
def test_wrong_arguments_print_usage_of_verb_and_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv, environ={}) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("usage: warm-cache ")
    assert captured.err.count("\n") == 2
    assert captured.out == ""


@pytest.mark.parametrize("argv", [[], ["wram"], ["check", "--no-such"], ["env", "--format", "yaml"], ["check", "--on"]])
@pytest.mark.parametrize("environ", [{}, {"WARM_CACHE_JSON": "1"}])
def test_wrong_arguments_with_json_are_one_document(
    argv: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv if environ else [*argv, "--json"], environ=environ) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["exit"] == 2
    assert document["verb"] == (argv[0] if argv and argv[0] in words.VERBS else None)
    assert f"error: {document['error']['message']}" in captured.err


@pytest.mark.parametrize("verb", [[], *([verb] for verb in words.VERBS)])
def test_help_of_every_verb_is_printed(
    verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([*verb, "--help"], environ={}) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "example: " in shown
    assert ("exit status: 0 warm" in shown) == (not verb)
    assert "exit status:" in shown
    if verb:
        known = words.VERBS[verb[0]]
        assert known.details, "what it reads, and what it writes"
        assert all(f"{code} " in shown.partition("exit status: ")[2].replace("\n", " ") for code in known.exits)


@pytest.mark.parametrize("verb", words.VERBS)
def test_examples_of_verbs_are_parsed(verb: str) -> None:
    typed = words.VERBS[verb].example.replace("$(", "").replace(")", "").partition("warm-cache ")[2].split()
    if verb == "env":
        typed = typed[: typed.index("lmsysorg/sglang:v0.5.23")]
    line = parser.parse(typed, {})
    assert line.verb == verb
    assert words.VERBS[verb].needs == "nothing" or (
        isinstance(line.args, ManifestArgs) and (line.args.profile or line.args.cache)
    )


@pytest.mark.parametrize("name", words.VERBS)
def test_args_have_one_field_per_option_and_argument(name: str) -> None:
    verb = words.VERBS[name]
    cls = getattr(parser.module(name), name.title().replace("-", "") + "Args")
    fields = {field.name for field in dataclasses.fields(cls)}
    options = {option.replace("-", "_") for option in verb.options} | {each.name for each in verb.arguments}
    assert options <= fields
    assert fields - options <= {"sources", "json", "models", "command"}
    assert cls.__dataclass_params__.frozen


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["--help", "check --manifest /no/such/file --json"])
def test_stdout_full_keeps_exit_status(tmp_path: Path, words: str) -> None:
    done = shell(f"{words} >/dev/full", tmp_path)
    assert done.returncode == (0 if words == "--help" else 2)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert ("the JSON document could not be written: No space left on device" in done.stderr) == ("--json" in words)


@pytest.mark.parametrize("option", ["cache", "log-dir", "models"])
def test_relative_path_without_working_directory_is_refused(bench: Bench, tmp_path: Path, option: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before = Path.cwd()
    os.chdir(gone)
    gone.rmdir()
    try:
        assert cli.main(["warm", "--manifest", str(bench.path), f"--{option}", "here"], environ={}) == 2
        assert cli.main(["warm", "--manifest", "m.toml"], environ={}) == 2
    finally:
        os.chdir(before)
    shown = bench.said()
    assert f"error: --{option}: " in shown
    assert "is relative to a directory that was removed (No such file or directory). Exit 2." in shown


@pytest.mark.parametrize("option", ["cache", "manifest", "log-dir"])
def test_option_not_utf8_is_refused(bench: Bench, option: str) -> None:
    assert bench.run("warm", f"--{option}", os.fsdecode(b"/a\xff"), manifest=option != "manifest") == 2
    assert f"error: --{option}: '/a\\udcff' is not valid UTF-8, and cannot be used. Exit 2." in bench.said()


@pytest.mark.parametrize("root", ["/", "//", "/tmp/.."])
def test_cache_slash_is_refused(bench: Bench, root: str) -> None:
    assert bench.run("check", "--cache", root) == 2
    assert "error: --cache: expected a directory for the cache alone, found '/" in bench.said()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "which manifest? Pass --manifest FILE or --profile NAME (h100-4, h200, stand-in)"),
        (["--profile", "h20"], "error: --profile: there is no profile 'h20'; did you mean 'h200'? Exit 2."),
        (["--manifest", "a", "--profile", "h200"], "--manifest a and --profile h200 exclude each other"),
        (["--manifest", "/no/such/file"], "error: --manifest /no/such/file: No such file or directory. Name a file"),
    ],
)
def test_manifest_missing_is_usage_error(bench: Bench, argv: list[str], said: str) -> None:
    assert bench.run("check", *argv, manifest=False) == 2
    shown = bench.said()
    assert said in shown
    assert shown.endswith("Exit 2.\n")


def test_manifest_problems_are_listed_at_once(bench: Bench) -> None:
    bench.path.write_text(MANIFEST.replace("count = 0", 'cout = 0\ncount = "x"').replace('ref = "tiny:1"', 'rfe = "x"'))
    assert bench.run("check", "--json") == 2
    captured = bench.capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["exit"], document["verb"], document["tasks"]) == (2, "check", [])
    places = [problem["place"] for problem in document["error"]["problems"]]
    assert len(places) >= 3
    assert all(place.startswith(str(bench.path)) for place in places)
    assert f"({len(places)} problems):" in captured.err
    assert all(line.endswith((".", "?")) for line in captured.err.splitlines()[1:])


def test_json_of_early_error_has_manifest_facts(bench: Bench) -> None:
    assert bench.run("check", "--only", "three", "--json") == 2
    document = json.loads(bench.capsys.readouterr().out)
    assert document["image"]["ref"] == "tiny:1"
    assert document["cache"] == "/data/cache"
    bench.fail(EngineLostError("gone"))
    assert bench.run("check", "--cache", "volume:jit", "--json") == 16
    assert json.loads(bench.capsys.readouterr().out)["cache"] == "volume jit"


def test_only_selects_tasks(bench: Bench) -> None:
    assert bench.run("check", "--only", "org/two") == 0
    assert bench.tasks == ["org/two"]
    assert bench.run("check", "--only", "three") == 2
    assert "no task of " in bench.said()


# --- what wins -------------------------------------------------------------------------------------------------------


def test_option_precedence_flag_environment_manifest(bench: Bench) -> None:
    def cache(*flags: str, environment: str = "") -> str:
        assert bench.run("check", *flags, WARM_CACHE_CACHE=environment) == 0
        return str(bench.executors[-1].context.manifest.cache.root)

    assert cache() == "/data/cache"
    assert cache(environment="/from/environment") == "/from/environment"
    assert cache("--cache", "/from/flag", environment="/from/environment") == "/from/flag"


def test_manifest_flag_wins_over_profile_variable(bench: Bench) -> None:
    assert bench.run("check", WARM_CACHE_PROFILE="h200") == 0
    assert bench.executors[-1].context.manifest.path == str(bench.path)
    assert bench.run("check", manifest=False, WARM_CACHE_MANIFEST=str(bench.path)) == 0
    flags = ("--profile", "stand-in", "--cache", "/c")
    assert bench.run("check", *flags, manifest=False, WARM_CACHE_MANIFEST=str(bench.path)) == 0
    assert bench.executors[-1].context.manifest.path == "stand-in.toml"


@pytest.mark.parametrize(
    ("value", "strict"),
    [
        *((word, True) for word in ("1", "true", "YES", "on", "y")),
        *((word, False) for word in ("0", "false", "No", "off", "n", "", " ")),
    ],
)
def test_switch_variables_are_parsed(bench: Bench, value: str, strict: bool) -> None:
    assert bench.run("check", WARM_CACHE_STRICT=value) == 0
    assert bench.executors[-1].context.options.strict is strict


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WARM_CACHE_STRICT": "maybe"}, "WARM_CACHE_STRICT: a switch is 1 (true, yes, on) or 0 (false, no, off)"),
        ({"WARM_CACHE_CACHE": "volume:-"}, "WARM_CACHE_CACHE: expected a volume name, found '-'. Exit 2."),
        ({"WARM_CACHE_ONLY": "three"}, "WARM_CACHE_ONLY: no task of "),
        ({"WARM_CACHE_IMAGE": "a b"}, "WARM_CACHE_IMAGE: expected an image reference"),
    ],
)
def test_bad_value_of_variable_names_the_variable(bench: Bench, environ: dict[str, str], said: str) -> None:
    assert cli.main(["check", "--manifest", str(bench.path)], environ=environ) == 2
    shown = bench.said()
    assert shown.startswith(f"error: {said}")
    assert shown.count("\n") == 1
    assert "--" not in shown and str(bench.path) not in shown.replace("no task of " + str(bench.path), "")


def test_bad_duration_names_its_option(bench: Bench) -> None:
    assert bench.run("warm", WARM_CACHE_BUDGET="foo") == 2
    assert bench.said().startswith("error: WARM_CACHE_BUDGET: expected a duration such as")
    assert bench.run("warm", "--budget", "foo", WARM_CACHE_BUDGET="5m") == 2
    assert bench.said().startswith("error: --budget: expected a duration such as")
    assert bench.run("warm", "--budget", "foo", "--json", WARM_CACHE_LOCK_TIMEOUT="bar") == 2
    captured = bench.capsys.readouterr()
    assert captured.err.startswith("error: options cannot be used as they are (2 problems):\n")
    places = {problem["place"] for problem in json.loads(captured.out)["error"]["problems"]}
    assert places == {"--budget", "WARM_CACHE_LOCK_TIMEOUT"}


def test_manifest_variable_is_read(bench: Bench) -> None:
    assert bench.run("check", manifest=False, WARM_CACHE_MANIFEST="/no/file") == 2
    assert bench.said().startswith("error: WARM_CACHE_MANIFEST /no/file: No such file or directory.")
    assert bench.run("check", manifest=False, WARM_CACHE_MANIFEST="/no/file", WARM_CACHE_PROFILE="h200") == 2
    assert "WARM_CACHE_MANIFEST /no/file and WARM_CACHE_PROFILE h200 exclude each other" in bench.said()


def test_list_variable_is_split_at_commas(bench: Bench) -> None:
    assert bench.run("check", WARM_CACHE_ONLY="org/two,org/one") == 0
    assert bench.tasks == ["org/one", "org/two"]


def test_choice_variable_is_checked(bench: Bench) -> None:
    assert bench.run("env", WARM_CACHE_FORMAT="yaml") == 2
    assert "WARM_CACHE_FORMAT is 'yaml': one of docker, shell, github, json is wanted" in bench.said()


def test_default_directories_of_logs_and_leases(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.run("check", XDG_RUNTIME_DIR="run", XDG_STATE_HOME=str(tmp_path / "state")) == 0
    options = bench.executors[-1].context.options
    assert options.state_dir == tmp_path / "run", "a mount's source is absolute"
    assert options.log_dir.parent == tmp_path / "state" / "warm-cache" / "logs"
    assert invocation.LOG_NAME.fullmatch(options.log_dir.name)
    assert options.log_dir.name.endswith(bench.executors[-1].context.run_id[:6])


def test_log_directory_keeps_newest_runs(bench: Bench, tmp_path: Path) -> None:
    logs = tmp_path / "warm-cache" / "logs"
    old = [f"20250101-{number:06d}-abcdef" for number in range(invocation.LOGS_KEPT + 3)]
    foreign = ["20240101-000000", "mine", "20240101-000000-abcdef.txt"]
    for name in (*old, *foreign):
        (logs / name).mkdir(parents=True)
        (logs / name / "task.log").touch()
    kept = tmp_path / "kept"
    kept.mkdir()
    (logs / "20230101-000000-abcdef").symlink_to(kept)

    assert bench.run("check", XDG_STATE_HOME=str(tmp_path)) == 0
    assert len(list(logs.iterdir())) == len(old) + len(foreign) + 1, "a run without logs removes none"
    bench.act(lambda executor, _tasks: executor.context.options.log_dir.mkdir(parents=True))
    assert bench.run("check", XDG_STATE_HOME=str(tmp_path)) == 0
    own = bench.executors[-1].context.options.log_dir.name
    left = {path.name for path in logs.iterdir() if not path.is_symlink()}
    assert left == {*old[4:], own, *foreign}
    assert kept.is_dir()


# --- the status ------------------------------------------------------------------------------------------------------


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


def test_github_error_text_is_no_command(bench: Bench) -> None:
    bench.fail(ColdError("##[error]no", notes=["x\n::error::no"]))
    assert bench.run("check", GITHUB_ACTIONS="true") == 10
    assert bench.said() == "error: ## [error]no. Exit 10.\nlast line:\n  │ x\n: :error::no\n"


def warm_tasks(**more: Any) -> Act:
    def act(executor: ContainerExecutor, tasks: tuple[Task, ...]) -> None:
        executor.context.report.tasks = [TaskResult(task.label, task.model, "", "warm", **more) for task in tasks]

    return act


def test_all_warm_prints_nothing_to_do(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(act: Act) -> str:
        monkeypatch.setattr(warm, "warm", lambda executor: act(executor, executor.context.manifest.tasks))
        bench.run("warm")
        return bench.capsys.readouterr().out

    def interrupted(executor: ContainerExecutor, tasks: tuple[Task, ...]) -> None:
        warm_tasks()(executor, tasks)
        raise Interrupted(signal.SIGTERM)

    assert said(warm_tasks()) == "warm-cache: 2 of 2 tasks warm for toolchain None (tiny:1). Nothing to do.\n"
    for act in (interrupted, warm_tasks(seconds=1.0)):
        shown = said(act)
        assert "Nothing to do" not in shown
        assert shown.startswith("task ") and "2 warm in 0.0 s." in shown


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


# --- signals and streams ---------------------------------------------------------------------------------------------


def test_signal_handlers_are_restored() -> None:
    known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)
    before = [signal.getsignal(number) for number in known]
    cancel = Cancel()
    signals = Signals(cancel)
    with signals.handled():
        assert signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert cancel.signum == signal.SIGTERM
        with cancel.shield():
            os.kill(os.getpid(), signal.SIGINT)
        assert cancel.requests == 2
    os.kill(os.getpid(), signal.SIGTERM)  # what it came to is told first
    assert cancel.requests == 2
    signals.restore()
    assert [signal.getsignal(number) for number in known] == before


def test_sighup_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals(Cancel())
        with signals.handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signals.restore()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ascii_terminal_gets_escaped_text(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    bench.fail(ColdError("8 × H200 are cold"))
    assert bench.run("check") == 10
    stream.flush()
    assert stream.buffer.getvalue() == b"error: 8 \\xd7 H200 are cold. Exit 10.\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_keep_exit_status(tmp_path: Path, closed: str) -> None:
    done = shell(f"check --manifest /no/such/file --json {closed}", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = shell(f"--help {closed}", tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


# --- the beginning ---------------------------------------------------------------------------------------------------

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


# --- completion ------------------------------------------------------------------------------------------------------


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    asked = f"COMP_WORDS=(warm-cache {' '.join(repr(word) for word in words)}); COMP_CWORD={len(words)}"
    offered = 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}\n_shtab_warm_cache\n{offered}"], capture_output=True, text=True, timeout=30
    )
    return done.stdout.split()


def test_completion_bash_completes_verbs_options_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"], environ={}) == 0
    script = capsys.readouterr().out
    assert "check" in completed(script, "ch")
    assert "--strict" in completed(script, "check", "--st")
    assert completed(script, "check", "--profile", "h20") == ["h200"]
    assert set(completed(script, "env", "--format", "")) == set(words.OPTIONS["format"]["choices"])


@pytest.mark.parametrize("shell_name", ["zsh", "fish", "tcsh"])
def test_completion_every_shell_gets_a_script(shell_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell_name], environ={}) == 0
    assert "warm-cache" in capsys.readouterr().out


def test_completion_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bsh"], environ={}) == 2
    assert "SHELL is 'bsh': did you mean 'bash'?" in capsys.readouterr().err
