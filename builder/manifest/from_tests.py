"""import-tests: which servers sglang's registered tests launch, and which of them a manifest's tasks cover.

A launch is covered by a task of the same model with the same flags and at least the same environment. What is compared
is what the flags mean, not how they are spelt: ``--tp=8`` and ``--tensor-parallel-size 8``, an option and its beginning
(argparse takes both), JSON however it is spaced.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.errors import ColdError, UsageError
from builder.manifest.load import Manifest
from builder.manifest.reading import Launch, Reader
from builder.manifest.testfiles import Class, Files, Module, NotUnderstoodError
from builder.run.call import Call
from builder.sglang_args import SPELLING
from builder.task import Task
from builder.text import counted, printable

#: Recipes that start a server with a task's argv, so that the two can be compared.
_SERVERS = ("compile-deep-gemm", "serve")
#: Flags that say where a server listens and who may ask, and nothing about kernels.
_ELSEWHERE = ("--model", "--model-path", "--host", "--port", "--api-key", "--device")
#: What sglang reads as true, and as false.
_TRUE, _FALSE = ("1", "true", "yes", "y", "on", "t"), ("0", "false", "no", "n", "off", "f")
_HEAD = """\
# What the tests in {what} launch, as
# `warm-cache import-tests` read them. Pass --image and --cache, or add [image] ref and [cache] root here. What the CI's
# workflow sets for all of its tests is in none of them: it belongs into [defaults] env
# (SGLANG_JIT_DEEPGEMM_FAST_WARMUP = "1").
schema = 1

[gpus]
count = {gpus}

[defaults]
recipe = "compile-deep-gemm"
timeout = "20m"
silence = "10m"
"""

Flags = Mapping[str, str]


@dataclass(frozen=True)
class Compared:
    """One launch against the tasks. task: label of the one that covers it, or of the nearest one; None where none has
    its model. differences: what the nearest one has otherwise; none where it covers the launch.
    """

    launch: Launch
    task: str | None
    differences: tuple[str, ...]

    @property
    def covered(self) -> bool:
        return self.task is not None and not self.differences


@dataclass(frozen=True)
class Found:
    """What was read. passed_over: how many files are not for this machine, or not for the suite that was asked for."""

    launches: tuple[Launch, ...]
    problems: tuple[tuple[str, str], ...]
    files: int
    passed_over: int


def import_tests(call: Call) -> None:
    """Prints a manifest, or the comparison with the one that is named. Raises ColdError where no task covers a launch,
    or something is not understood; UsageError where nothing is launched at all: a suite that was misspelt, say.
    """
    found = read(call.said.paths, call.said.suite)
    if not found.launches and not found.problems:
        passed = f"; {found.passed_over} of them not for this suite or machine" if found.passed_over else ""
        raise UsageError(f"no test in {counted(found.files, 'file')} launches a server{passed}")
    manifest = call.manifest() if call.names_a_manifest else None
    extra: dict[str, Any] = {
        "launches": [_told(launch) for launch in found.launches],
        "not_understood": [{"place": place, "why": why} for place, why in found.problems],
    }
    compared: list[Compared] = []
    unneeded: list[str] = []
    if manifest is None:
        call.report.text = as_manifest(found.launches, call.said.paths)
    else:
        compared, unneeded = compare(found.launches, manifest.tasks)
        extra["launches"] = [
            {**_told(each.launch), "covered": each.covered, "task": each.task, "differences": list(each.differences)}
            for each in compared
        ]
        extra["unneeded"] = unneeded
        call.report.text = as_text(found, compared, unneeded, manifest)
    call.report.extra |= extra
    for place, why in found.problems if manifest is None else ():
        call.console.say(f"not understood: {place}: {why}")
    cold = [each for each in compared if not each.covered]
    parts = [f"{len(cold)} of {len(compared)} launches covered by no task"] if cold else []
    if found.problems:
        parts.append(f"{counted(len(found.problems), 'construct')} not understood")
    if parts:
        raise ColdError("; ".join(parts))


def read(paths: Sequence[str], suite: str | None) -> Found:
    """What the tests of these files, or of all below these folders, launch. Raises UsageError."""
    files = Files(paths)
    reader = Reader(files)
    modules = files.given()
    passed_over = 0
    for module in modules:
        if not _registered(module, suite):
            passed_over += 1
            continue
        reader.module(module)
        for value in list(module.names.values()):
            if isinstance(value, Class) and value.module is module and not reader.skipped(value.node, module):
                _read_test(reader, value)
    return Found(tuple(reader.launches), tuple(reader.problems), len(modules), passed_over)


def _read_test(reader: Reader, cls: Class) -> None:
    """One class, if it is a test: a base of tests has none of its own."""
    try:
        names = dict.fromkeys(name for each in reversed(cls.order()) for name in each.body)
        methods = [name for name in names if name.startswith("test")]
        if methods or cls.all_unknown():
            reader.test(cls, methods)
    except NotUnderstoodError as error:
        reader.problems.setdefault((error.place, error.why))
    except RecursionError:
        reader.problems.setdefault((cls.place, f"{cls.name}: it is nested too deep"))


def _registered(module: Module, suite: str | None) -> bool:
    """Whether a file is one of CUDA's, and of this suite. One that registers nothing is taken as it is."""
    calls = [
        node.value
        for node in module.tree.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    ]
    found = [(call.func.id, {each.arg: each.value for each in call.keywords}) for call in calls]  # type: ignore[attr-defined]
    registrations = [each for each in found if re.fullmatch(r"register_\w+_ci", each[0])]
    mine = [keywords for name, keywords in registrations if name == "register_cuda_ci" and "disabled" not in keywords]
    if not registrations:
        return suite is None
    words = [
        word.value
        for keywords in mine
        for name in ("suite", "runner_config", "stage")
        if isinstance(word := keywords.get(name), ast.Constant)
    ]
    return bool(mine) and (suite is None or any(fnmatch.fnmatchcase(str(word), f"*{suite}*") for word in words))


# Comparing


def compare(launches: Sequence[Launch], tasks: Sequence[Task]) -> tuple[list[Compared], list[str]]:
    """Every launch with its nearest task, and labels of the tasks that cover none."""
    servers = [task for task in tasks if task.recipe in _SERVERS]
    needed: set[str] = set()
    compared = []
    for launch in launches:
        near = [(differences(launch, task), task.label) for task in servers if task.model == launch.model]
        needed |= {label for different, label in near if not different}
        nearest = min(near, key=lambda pair: len(pair[0]), default=None)
        compared.append(Compared(launch, nearest[1] if nearest else None, nearest[0] if nearest else ()))
    return compared, [task.label for task in servers if task.label not in needed]


def differences(launch: Launch, task: Task) -> tuple[str, ...]:
    """What the task has otherwise than the launch, flag by flag, then variable by variable; empty: it covers it."""
    wanted, given = flags_of(launch.argv), flags_of(task.argv)
    given = {_same_option(name, wanted): value for name, value in given.items()}
    told = []
    for name in sorted(wanted.keys() | given.keys()):
        want, have = wanted.get(name), given.get(name)
        if have is None:
            told.append(f"{name} {want}".rstrip() + " is missing")
        elif want is None:
            told.append(f"{name} {have}".rstrip() + " is not in the test")
        elif want != have:
            told.append(f"{name} is {have or 'without value'}, in the test {want or 'without value'}")
    for variable, value in launch.env:
        have = task.env.get(variable)
        if have is None:
            told.append(f"{variable}={value} is missing")
        elif _switch(have) != _switch(value):
            told.append(f"{variable} is {have}, in the test {value}")
    return tuple(told)


def flags_of(argv: Iterable[str]) -> dict[str, str]:
    """Options of a server and their values, each in one spelling; of a repeated one the last, as with argparse."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            name = SPELLING.get(option, option)
            found[name] = [value] if equals else []
        elif name:
            found[name].append(word)
    ranks = found.pop("--attn-dp-size", None)
    if ranks not in (None, ["1"]):  # 0.5.23's word for both
        found |= {"--dp": ranks or [], "--enable-dp-attention": []}
    return {name: " ".join(map(_plain, values)) for name, values in found.items() if name not in _ELSEWHERE}


def _same_option(name: str, others: Flags) -> str:
    """The one of these options that argparse would take it for: one may be cut short where that is unambiguous."""
    if name in others:
        return name
    near = [other for other in others if len(other) > 5 and (name.startswith(other) or other.startswith(name))]
    return near[0] if len(near) == 1 else name


def _plain(value: str) -> str:
    """A value in one spelling: numbers, and JSON."""
    try:
        read = json.loads(value)
    except ValueError:
        return value
    return json.dumps(read, sort_keys=True)


def _switch(value: str) -> str:
    word = value.lower()
    return "1" if word in _TRUE else "0" if word in _FALSE else value


# Printing


def as_manifest(launches: Sequence[Launch], paths: Sequence[str]) -> str:
    """A manifest of these launches; what several tests share stands there once."""
    lines = [_HEAD.format(what=printable(" ".join(paths)), gpus=max(map(_gpus, launches), default=8)).rstrip()]
    told: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in launches:
        key = (launch.model, tuple(sorted(flags_of(launch.argv).items())), launch.env)
        told.setdefault(key, []).append(launch)
    for same in told.values():
        launch = same[0]
        lines += ["", *(f"# {each.place} {each.test}" for each in same), "[[task]]", f"model = {_toml(launch.model)}"]
        if _gpus(launch) != max(map(_gpus, launches)):
            lines.append(f"gpus = {_gpus(launch)}")
        if launch.env:
            lines.append("env = { " + ", ".join(f"{_key(name)} = {_toml(value)}" for name, value in launch.env) + " }")
        lines += ["argv = [", *(f"    {line}," for line in _argv_lines(launch.argv)), "]"]
    return "\n".join(lines)


def _argv_lines(argv: Sequence[str]) -> list[str]:
    """An option and its values on each line. A word that begins with @ would be the name of a group."""
    lines: list[list[str]] = []
    skip = False
    for word in argv:
        option = word.partition("=")[0]
        if word.startswith("--"):
            skip = option in _ELSEWHERE
            lines += [] if skip else [[]]
        if not skip:
            lines = lines or [[]]
            lines[-1].append(_toml(f"@{word}" if word.startswith("@") and word != "@" else word))
    return [", ".join(line) for line in lines]


def as_text(found: Found, compared: Sequence[Compared], unneeded: Sequence[str], manifest: Manifest) -> str:
    """The comparison for people."""
    cold = [each for each in compared if not each.covered]
    others = f"; {counted(found.passed_over, 'file')} not for this suite or machine" if found.passed_over else ""
    share = f"{len(compared) - len(cold)} of {len(compared)} launches"
    lines = [f"{share} in {counted(found.files, 'file')} are covered by {manifest.path}{others}"]
    for each in cold:
        lines.append(f"not covered: {each.launch.place} {each.launch.test}: {each.launch.model}")
        nearest = f"the nearest task is {each.task}:" if each.task else "no task has this model"
        lines += [f"  {nearest}", *(f"    {difference}" for difference in each.differences)]
    lines += [f"no test needs: {label}" for label in unneeded]
    lines += [f"not understood: {place}: {why}" for place, why in found.problems]
    return "\n".join(map(printable, lines))


def _told(launch: Launch) -> dict[str, Any]:
    return {
        "model": launch.model,
        "argv": list(launch.argv),
        "env": dict(launch.env),
        "test": launch.test,
        "place": launch.place,
    }


def _gpus(launch: Launch) -> int:
    flags = flags_of(launch.argv)
    sizes = [flags.get(name, "1") for name in ("--tp", "--pp")]
    return int(sizes[0]) * int(sizes[1]) if all(re.fullmatch(r"[0-9]{1,4}", size) for size in sizes) else 1


def _toml(text: str) -> str:
    """A TOML string; literal where that is easier to read."""
    if '"' in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)
