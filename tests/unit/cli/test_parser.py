"""Command lines and variables: what is parsed, and what is reported about wrong ones."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from builder.cli import main as cli
from builder.cli import parser
from builder.cli import verbs as words
from builder.cli.options import ManifestArgs
from tests.unit.cli.bench import Bench


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
        (["env", "--format", "yaml"], "error: --format is 'yaml': one of docker, shell, github, json, kub"),
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
    assert ("exit status: 0 done (warm, check" in shown) == (not verb)
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


@pytest.mark.parametrize("option", ["cache", "manifest", "log-dir"])
def test_option_not_utf8_is_refused(bench: Bench, option: str) -> None:
    assert bench.run("warm", f"--{option}", os.fsdecode(b"/a\xff"), manifest=option != "manifest") == 2
    assert f"error: --{option}: '/a\\udcff' is not valid UTF-8, and cannot be used. Exit 2." in bench.said()


@pytest.mark.parametrize(
    ("value", "strict"),
    [
        *((word, True) for word in ("1", "true", "YES", "on", "y")),
        *((word, False) for word in ("0", "false", "No", "off", "n", "", " ")),
    ],
)
def test_switch_variables_are_parsed(bench: Bench, value: str, strict: bool) -> None:
    assert bench.run("check", WARM_CACHE_STRICT=value) == 0
    assert bench.executors[-1].context.options.wanted.strict is strict


def test_list_variable_is_split_at_commas(bench: Bench) -> None:
    assert bench.run("check", WARM_CACHE_ONLY="org/two,org/one") == 0
    assert bench.tasks == ["org/one", "org/two"]


def test_choice_variable_is_checked(bench: Bench) -> None:
    assert bench.run("env", WARM_CACHE_FORMAT="yaml") == 2
    assert "WARM_CACHE_FORMAT is 'yaml': one of docker, shell, github, json, kubernetes is wanted" in bench.said()


@pytest.mark.parametrize(
    ("name", "hint"), [("ONCOLD", "; did you mean WARM_CACHE_ON_COLD?"), ("FROBNICATE", ""), ("TEST_IMAGE", None)]
)
def test_variable_of_no_option_is_named(bench: Bench, name: str, hint: str | None) -> None:
    said = "" if hint is None else f"warning: WARM_CACHE_{name} is no option's variable, and is not read{hint}\n"
    for verb in ("check", "wram"):
        bench.run(verb, manifest=True, **{f"WARM_CACHE_{name}": "warn"})
        captured = bench.capsys.readouterr()
        assert ("WARM_CACHE_" in captured.out + captured.err) == bool(said)
        assert said in captured.out + captured.err


def test_help_names_what_the_verb_takes_and_means(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(verb: str) -> str:
        assert cli.main([verb, "--help"], environ={}) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "--cache DIR the cache root, where it is mounted here" in shown("audit")
    for verb in ("audit", "here-reset", "completion"):
        assert "16 the engine was lost" not in shown(verb)
    for verb in ("prune", "status", "sweep"):
        assert "0 done; 1 defect" in shown(verb) and "16 the engine was lost" in shown(verb)
    assert "0 all tasks are warm" in shown("warm")
    assert "or the result could not be written" in shown("status")
