"""Tasks of a manifest out of recorded launches: TOML for people, the same text for the same launches."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from builder import sglang_args
from builder.manifest import neutral, recipe_choice
from builder.manifest.from_tests import TEMPORARY, environment_of, flags_of
from builder.recording import Launch
from builder.text import counted, printable

_HEAD = """\
# What the tests in {what} launch, as
# `warm-cache import-tests` recorded it. Pass --image and --cache, or add [image] ref and [cache] root here. What the
# CI's workflow sets for all of its tests is in none of them: it belongs into [defaults] env
# (SGLANG_JIT_DEEPGEMM_FAST_WARMUP = "1").
schema = 1

[gpus]
count = {gpus}
name = "{gpu}"

[defaults]
timeout = "20m"
silence = "10m"
"""
#: The first words of the comment that names the source of tasks, and the rest of that comment.
NOTE = "# Recorded from"
_NOTE = re.compile(rf"^{NOTE} .*\n(?:#.*\n)*\n?", re.MULTILINE)
_WIDTH = 110


@dataclass(frozen=True)
class Source:
    """What launches were recorded from. commit: of the checkout, empty where it is unknown; suite: as it was given;
    gpu: of the machine that was answered for; files: how many test files were run.
    """

    commit: str
    suite: str
    gpu: str
    files: int

    def __str__(self) -> str:
        commit = f"sglang {self.commit[:12]}" if self.commit else "a checkout of sglang"
        return f"{commit}, suite {self.suite or 'any'}, GPU {self.gpu}"


def warmable(launches: Sequence[Launch], gpu: str) -> tuple[list[Launch], list[tuple[Launch, str]]]:
    """Return the launches that a recipe warms, and each other one with the reason."""
    found, others = [], []
    for launch in launches:
        recipe, why = recipe_choice.choose(launch, flags_of(launch.argv), gpu)
        if recipe is None:
            others.append((launch, why))
        else:
            found.append(launch)
    return found, others


def as_manifest(launches: Sequence[Launch], paths: Sequence[str], gpu: str) -> str:
    """A manifest of these launches; what several tests share stands there once."""
    gpus = max(map(_gpus, launches), default=8)
    lines = [_HEAD.format(what=printable(" ".join(paths)), gpus=gpus, gpu=gpu).rstrip()]
    return "\n".join([*lines, *(f"\n{block}" for block in as_tasks(launches, gpus, gpu))])


def note(launches: Sequence[Launch], source: Source) -> str:
    """Return the comment that names what tasks were made of, without an end of line."""
    covered, others = warmable(launches, source.gpu)
    tasks = counted(len(_same(covered)), "task")
    counts = f"{len(covered)} of {len(launches)} launches in {counted(source.files, 'file')} are covered"
    lines = [
        f"{NOTE[2:]} {printable(str(source))}: {counts} by {tasks}.",
        "What stands above is written by hand, and stays: `warm-cache import-tests --update FILE --anew`.",
    ]
    lines += dict.fromkeys(f"No recipe warms {_test(launch)}: {why}." for launch, why in others)
    return "\n".join(
        textwrap.fill(line, 120, initial_indent="# ", subsequent_indent="# ", break_long_words=False) for line in lines
    )


def without_note(text: str) -> str:
    """Return a manifest's text without that comment."""
    return _NOTE.sub("", text)


def as_tasks(launches: Sequence[Launch], gpus: int, gpu: str) -> list[str]:
    """Return a ``[[task]]`` for every launch that can be warmed; launches that are the same for kernels share one.

    gpus: the number that a task has by default. DeepGEMM's come first: they are what takes longest in a test.
    """
    blocks: list[tuple[bool, str]] = []
    for same in _same(warmable(launches, gpu)[0]):
        launch = same[0]
        recipe, why = recipe_choice.choose(launch, flags_of(launch.argv), gpu)
        tests = dict.fromkeys(f"# {_test(each)}" for each in same)
        lines = [*tests, "[[task]]", f"model = {_toml(launch.model)}", f'recipe = "{recipe}" # {printable(why)}']
        if _gpus(launch) != gpus:
            lines.append(f"gpus = {_gpus(launch)}")
        env = environment_of(launch)
        if env:
            lines.append("env = { " + ", ".join(f"{_key(name)} = {_toml(value)}" for name, value in env) + " }")
        lines += ["argv = [", *(f"    {line}," for line in _argv_lines(launch.argv)), "]"]
        blocks.append((recipe != recipe_choice.COMPILE, "\n".join(lines)))
    return [block for _, block in sorted(blocks, key=lambda pair: pair[0])]


def _same(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Return the launches in groups that are the same for kernels."""
    groups: dict[tuple[object, ...], list[Launch]] = {}
    for launch in launches:
        key = (launch.model, tuple(sorted(flags_of(launch.argv).items())), tuple(environment_of(launch)))
        groups.setdefault(key, []).append(launch)
    return list(groups.values())


def _test(launch: Launch) -> str:
    return f"{printable(launch.location)} {printable(launch.test)}"


def _argv_lines(argv: Sequence[str]) -> list[str]:
    """Options and their values, as many on a line as fit. A word that begins with @ would be the name of a group."""
    front, options, rest = sglang_args.split(neutral.with_newer_names(argv))
    kept = [option.words for option in options if not neutral.differs_from_run_to_run(option.name)]
    groups = [group for group in (front, *kept, rest) if group and not any(TEMPORARY in word for word in group)]
    lines: list[str] = []
    for group in groups:
        words = ", ".join(_toml(f"@{word}" if word.startswith("@") and word != "@" else word) for word in group)
        if lines and len(lines[-1]) + len(words) + 2 <= _WIDTH:
            lines[-1] += f", {words}"
        else:
            lines.append(words)
    return lines


def _gpus(launch: Launch) -> int:
    """Return how many GPUs a server takes: attention's data parallelism is within tensor parallelism."""
    flags = flags_of(launch.argv)
    options = ("--tp", "--pp") if sglang_args.DP_ATTENTION in flags else ("--tp", "--pp", "--dp")
    sizes = [flags.get(name, "1") for name in options]
    return math.prod(map(int, sizes)) if all(re.fullmatch(r"[1-9][0-9]{0,3}", size) for size in sizes) else 1


def _toml(text: str) -> str:
    """A TOML string; literal where that is easier to read."""
    if '"' in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)
