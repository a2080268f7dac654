"""What tests launch, against the tasks of a manifest: which launches a task covers, and which tasks cover none.

A launch is covered by a task of the same model with the same flags and at least the same environment. What is compared
is what the flags mean, not how they are spelt: ``--tp=8`` and ``--tensor-parallel-size 8``, an option and its beginning
(argparse takes both), JSON however it is spaced. What no kernel depends on (`neutral`) is not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from builder import sglang_args
from builder.manifest import neutral
from builder.recording import Launch, Unrecorded
from builder.task import RECIPES, Task
from builder.text import printable

#: What sglang reads as true, and as false.
_TRUE, _FALSE = ("1", "true", "yes", "y", "on", "t"), ("0", "false", "no", "n", "off", "f")
#: An unknown value's name in its marks (`builder.agent.launch_unknown`).
_UNKNOWN = re.compile("\ue0f0([^\ue0f0\ue0f1]*)\ue0f1")
TEMPORARY = "TEMPORARY"
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


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return the launches of each test of a file once, however often it repeats them."""
    found: dict[object, Launch] = {}
    for launch in launches:
        found.setdefault(replace(launch, location=launch.location.rpartition(":")[0]), launch)
    return list(found.values())


def known(launches: Iterable[Launch]) -> tuple[list[Launch], list[Unrecorded]]:
    """Return the launches without unknown words that a kernel may depend on, and a problem for each other one."""
    found, problems = [], []
    for launch in launches:
        why = _unknown(launch)
        if why:
            problems.append(Unrecorded("not-understood", launch.test, launch.location, why))
        else:
            found.append(launch)
    return found, problems


def _unknown(launch: Launch) -> str:
    if name := _UNKNOWN.search(launch.model):
        return f"it launches a model that depends on {name[1]}, which is unknown"
    if not launch.model or launch.model == "None":
        return "it launches a server without a model"
    for option, value in flags_of(launch.argv).items():
        if name := _UNKNOWN.search(option + value):
            return f"{_UNKNOWN.sub('?', option)} of {launch.model} depends on {name[1]}, which is unknown"
    for variable, value in environment_of(launch):
        if name := _UNKNOWN.search(value):
            return f"{variable} of {launch.model} depends on {name[1]}, which is unknown"
    return ""


def environment_of(launch: Launch) -> list[tuple[str, str]]:
    """Return the variables of a launch that a kernel may depend on: no temporary path is one."""
    return [
        (name, value) for name, value in launch.env if not neutral.is_neutral_variable(name) and TEMPORARY not in value
    ]


# Comparing


def compare(launches: Sequence[Launch], tasks: Sequence[Task]) -> tuple[list[Compared], list[str]]:
    """Every launch with its nearest task, and labels of the tasks that cover none."""
    servers = [task for task in tasks if RECIPES[task.recipe].server]
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
    found = []
    for name in sorted(wanted.keys() | given.keys()):
        want, have = wanted.get(name), given.get(name)
        if want is not None and TEMPORARY in want:
            continue
        if have is None:
            found.append(f"{name} {want}".rstrip() + " is missing")
        elif want is None:
            found.append(f"{name} {have}".rstrip() + " is not in the test")
        elif want != have:
            found.append(f"{name} is {have or 'without value'}, in the test {want or 'without value'}")
    for variable, value in environment_of(launch):
        have = task.env.get(variable)
        if have is None:
            found.append(f"{variable}={value} is missing")
        elif _switch(have) != _switch(value):
            found.append(f"{variable} is {have}, in the test {value}")
    return tuple(found)


def flags_of(argv: Iterable[str]) -> dict[str, str]:
    """Options of a server and their values, each in one spelling; of a repeated one the last, as with argparse."""
    found = {option.name: option.values for option in sglang_args.split(neutral.with_newer_names(argv))[1]}
    ranks = found.pop(sglang_args.ATTENTION_DP[0], None)
    if ranks not in (None, ("1",)):  # of 0.5.23, for both
        found |= {sglang_args.DATA_PARALLEL[0]: ranks or (), sglang_args.DP_ATTENTION: ()}
    return {
        name: " ".join(map(_plain, values)) for name, values in found.items() if not neutral.is_neutral_option(name)
    }


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


def as_text(
    compared: Sequence[Compared],
    unneeded: Sequence[str],
    problems: Sequence[Unrecorded],
    others: Sequence[tuple[Launch, str]],
    manifest: str,
    counts: str,
) -> str:
    """The comparison for people. others: launches that no recipe warms; manifest: its path; counts: number of files."""
    cold = [each for each in compared if not each.covered]
    lines = [f"{len(compared) - len(cold)} of {len(compared)} launches in {counts} are covered by {manifest}"]
    for each in cold:
        lines.append(f"not covered: {each.launch.location} {each.launch.test}: {each.launch.model}")
        nearest = f"the nearest task is {each.task}:" if each.task else "no task has this model"
        lines += [f"  {nearest}", *(f"    {difference}" for difference in each.differences)]
    lines += [f"no test needs: {label}" for label in unneeded]
    lines += [not_warmable(launch, why) for launch, why in others]
    lines += map(describe, problems)
    return "\n".join(map(printable, lines))


def not_warmable(launch: Launch, why: str) -> str:
    """Return one line for a launch that no recipe warms."""
    return printable(f"no recipe warms: {launch.location} {launch.test}: {launch.model}: {why}")


def describe(problem: Unrecorded) -> str:
    """Return one line for a test of which not all launches are recorded."""
    name = f" {problem.test}" if problem.test else ""
    state = problem.state.replace("-", " ")
    return printable(_UNKNOWN.sub(r"\1", f"{state}: {problem.location}{name}: {problem.why or 'no reason is given'}"))
