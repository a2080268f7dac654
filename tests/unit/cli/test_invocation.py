"""The manifest, the options and the directories of an invocation, and which source of a value has precedence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from builder.cli import invocation
from builder.cli import main as cli
from builder.errors import (
    EngineLostError,
)
from tests.unit.cli.bench import MANIFEST, Bench


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


@pytest.mark.parametrize("root", ["/", "//", "/tmp/.."])
def test_cache_slash_is_refused(bench: Bench, root: str) -> None:
    assert bench.run("check", "--cache", root) == 2
    assert "error: --cache: expected a directory for the cache alone, found '/" in bench.said()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "which manifest? Pass --manifest FILE or --profile NAME (b200-8, h100-4, h200, stand-in)"),
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
