"""The verbs by which people learn: init, profiles, config, help, version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder import __version__
from builder.cli import help_texts
from builder.cli import main as cli
from builder.cli.verbs import VERBS
from builder.manifest.load import load, profiles
from tests.unit.cli.bench import Bench

Capture = pytest.CaptureFixture[str]


def test_init_writes_once_and_never_overwrites(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "m.toml"
    assert cli.main(["init", str(path)], environ={}) == 0
    assert "warm-cache doctor --manifest" in capsys.readouterr().err
    assert load(path).tasks
    path.write_text("mine")
    assert cli.main(["init", str(path)], environ={}) == 2
    assert "exists, and is left as it is" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert cli.main(["init", str(tmp_path / "no" / "m.toml")], environ={}) == 12
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_init_of_profile_to_stdout_is_the_profile(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["init", "-", "--profile", "stand-in"], environ={}) == 0
    path = tmp_path / "m.toml"
    path.write_text(capsys.readouterr().out)
    assert path.read_text().startswith("#:schema ")
    assert cli.main(["init", "-", "--profile", "stnd-in"], environ={}) == 2
    assert "did you mean 'stand-in'?" in capsys.readouterr().err


def test_profiles_are_listed_and_shown(capsys: Capture) -> None:
    assert cli.main(["profiles", "--json"], environ={}) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["profiles"]}
    assert list(found) == profiles()
    assert found["h200"]["gpus"] == 8 and found["h200"]["tasks"] == len(load(profile="h200").tasks)
    assert cli.main(["profiles"], environ={}) == 0
    assert "h200" in capsys.readouterr().out
    assert cli.main(["profiles", "show", "stand-in"], environ={}) == 0
    text = (Path(help_texts.PAGES).parent / "profiles" / "stand-in.toml").read_text()
    assert capsys.readouterr().out == text
    for words, said in (
        (["show"], "profiles show needs a NAME: the profile to print"),
        (["show", "h20"], "did you mean 'h200'?"),
        (["shwo"], "ACTION is 'shwo': did you mean 'show'?"),
    ):
        assert cli.main(["profiles", *words], environ={}) == 2
        assert said in capsys.readouterr().err


def test_config_names_flag_variable_line_and_default(bench: Bench) -> None:
    assert bench.run("config", "--budget", "40m", "--only", "org/one", WARM_CACHE_IMAGE="other:2") == 0
    out = bench.capsys.readouterr().out
    rows = {tuple(line.split()[:2]): line for line in out.splitlines()}
    assert '"other:2"' in rows["[image]", "ref"] and rows["[image]", "ref"].endswith("WARM_CACHE_IMAGE")
    assert '"40m"' in rows["[run]", "budget"] and rows["[run]", "budget"].endswith("--budget")
    assert rows["[cache]", "root"].endswith("manifest.toml:6")
    assert rows["[cache]", "keep"].endswith("default")
    assert "task one" in out and "task two" not in out


def test_config_of_wrong_manifest_lists_its_problems(bench: Bench) -> None:
    bench.path.write_text(bench.path.read_text().replace("budget", "bugdet"))
    assert bench.run("config") == 2
    assert "did you mean 'budget'?" in bench.said()


@pytest.mark.parametrize("name", VERBS)
def test_help_of_verb_is_its_help_page(name: str, capsys: Capture) -> None:
    assert cli.main(["help", name], environ={}) == 0
    shown = capsys.readouterr().out
    assert cli.main([name, "--help"], environ={}) == 0
    assert capsys.readouterr().out == shown


def test_help_of_action_and_program(capsys: Capture) -> None:
    assert cli.main(["help", "view", "audit"], environ={}) == 0
    shown = capsys.readouterr().out
    assert "--fail-on-jit" in shown and "--replace" not in shown
    assert cli.main(["help"], environ={}) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in VERBS)
    assert all(topic in text for topic in help_texts.topics())


def test_help_of_topic_is_the_page(capsys: Capture) -> None:
    assert {"manifest", "security"} <= set(help_texts.topics())
    for topic, path in help_texts.topics().items():
        assert topic not in VERBS, "a word is a verb or a topic"
        assert cli.main(["help", topic], environ={}) == 0
        assert capsys.readouterr().out == path.read_text(encoding="utf-8")
    assert cli.main(["help", "manifst"], environ={}) == 2
    assert "did you mean 'manifest'?" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in VERBS), ["view", "audit", "--help"]])
def test_help_fits_the_terminal(
    words: list[str], columns: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(words, environ={}) == 0
    lines = capsys.readouterr().out.splitlines()
    # A single word may be wider: it is a name to copy.
    wide = [line for line in lines if len(line) > min(80, columns) and len(line.split()) > 1]
    assert wide == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["view", "audit", "j", "--replace"], "--replace is no option of view audit, but of view create"),
        (["view", "--replace", "audit", "j"], "--replace is no option of view audit, but of view create"),
        (["view", "drop"], "view drop needs a JOB: the name of the view"),
        (["view", "list", "j"], "view list takes no argument 'j'"),
        (["view", "--json", "list", "j"], "view list takes no JOB, found 'j'"),
        (["view", "adit", "j"], "ACTION is 'adit': did you mean 'audit'?"),
        (["view"], "which ACTION? One of create, audit, promote, drop, list"),
    ],
)
def test_wrong_use_of_an_action_names_the_right_one(words: list[str], said: str, capsys: Capture) -> None:
    assert cli.main(words, environ={}) == 2
    assert said in capsys.readouterr().err


def test_version_is_one_line(capsys: Capture) -> None:
    assert cli.main(["version"], environ={}) == 0
    assert capsys.readouterr().out.startswith(f"warm-cache {__version__} (Python ")
    assert cli.main(["version", "--json"], environ={}) == 0
    assert json.loads(capsys.readouterr().out)["version"] == __version__
