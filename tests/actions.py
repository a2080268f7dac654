"""A small GitHub runner: the steps of a workflow's job or of a composite action, as the runner would run them.

Expressions are evaluated strictly: an unknown input, step, output, variable or function is an error here, where the
real runner makes an empty string of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
ACTION = ROOT / ".github" / "actions" / "warm-cache" / "action.yml"

_TOKEN = re.compile(r"\s*('(?:[^']|'')*'|&&|\|\||[=!]=|[!(),]|[A-Za-z_][\w.-]*|$)")
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)


def load(path: Path) -> dict[str, Any]:
    """A workflow or an action, read as GitHub reads it."""
    found: dict[str, Any] = YAML(typ="safe").load(path)
    return found


class Expression:
    """What stands between ``${{`` and ``}}``, or behind ``if``. names: dotted contexts and their values."""

    def __init__(self, names: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> None:
        self._names = names
        self._functions: dict[str, Callable[..., Any]] = {
            "startsWith": lambda text, start: str(text).lower().startswith(str(start).lower()),
            **functions,
        }
        self._tokens: list[str] = []

    def value(self, text: str) -> Any:
        """Raises KeyError for what is not known, ValueError for what cannot be read."""
        self._tokens = self._split(text)
        result = self._either()
        if self._tokens:
            raise ValueError(f"{text!r}: {self._tokens[0]!r} is too much")
        return result

    def filled(self, text: str) -> str:
        """A text with all its expressions replaced."""
        return _EXPRESSION.sub(lambda found: _shown(self.value(found[1])), text)

    def condition(self, text: str | None) -> bool:
        """Of a step: success() is meant where no status function is named."""
        text = "success()" if text is None else str(text).strip()
        if text.startswith("${{"):
            text = text[3:-2]
        if not re.search(r"\b(always|success|failure|cancelled)\(", text):
            text = f"success() && ({text})"
        return bool(self.value(text))

    @staticmethod
    def _split(text: str) -> list[str]:
        tokens, at = [], 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if not found or not found[1]:
                raise ValueError(f"{text!r} cannot be read at {text[at:]!r}")
            tokens.append(found[1])
            at = found.end()
        return tokens

    def _take(self, *tokens: str) -> str:
        if self._tokens and self._tokens[0] in tokens:
            return self._tokens.pop(0)
        return ""

    def _either(self) -> Any:
        left = self._both()
        while self._take("||"):
            right = self._both()
            left = left or right
        return left

    def _both(self) -> Any:
        left = self._equal()
        while self._take("&&"):
            right = self._equal()
            left = left and right
        return left

    def _equal(self) -> Any:
        left = self._one()
        while sign := self._take("==", "!="):
            left = (str(left).lower() == str(self._one()).lower()) == (sign == "==")
        return left

    def _one(self) -> Any:
        if self._take("!"):
            return not self._one()
        if self._take("("):
            value = self._either()
            assert self._take(")"), "a bracket is missing"
            return value
        token = self._tokens.pop(0)
        if token.startswith("'"):
            return token[1:-1].replace("''", "'")
        if self._take("("):
            arguments = []
            while not self._take(")"):
                arguments.append(self._either())
                self._take(",")
            return self._functions[token](*arguments)
        return self._names[token]


class Context(dict[str, Any]):
    """``inputs.x`` and the like. Of ``vars`` and ``env`` what is not set is empty, as the runner has it."""

    def __missing__(self, name: str) -> str:
        if name.startswith(("vars.", "env.")):
            return ""
        raise KeyError(f"the expression names {name}, which is not there")


def _status_functions(good: bool) -> dict[str, Callable[[], bool]]:
    return {"always": lambda: True, "success": lambda: good, "failure": lambda: not good}


def _shown(value: Any) -> str:
    return {True: "true", False: "false", None: ""}.get(value, str(value)) if not isinstance(value, str) else value


@dataclass
class Step:
    """One step that has run. status: its exit status; None where it was not run."""

    name: str
    status: int | None
    out: str = ""


@dataclass
class Runner:
    """One job on one runner. environ: what the agent was started with; event: GITHUB_EVENT_NAME; uses: what stands for
    other people's actions. steps: all that ran, those of the actions among them.
    """

    place: Path
    environ: Mapping[str, str]
    event: str = "push"
    variables: Mapping[str, str] = field(default_factory=dict)
    on_step: Callable[[dict[str, Any]], None] = lambda step: None
    steps: list[Step] = field(default_factory=list)
    summary: str = ""

    def __post_init__(self) -> None:
        self.temp, self.workspace = self.place / "runner-temp", self.place / "workspace"
        self.temp.mkdir()
        self.workspace.mkdir()
        self._exported: dict[str, str] = {}
        self._paths: list[str] = []

    @property
    def log(self) -> str:
        return "".join(step.out for step in self.steps)

    def job(self, workflow: str, name: str) -> dict[str, dict[str, str]] | None:
        """The job of a workflow; outputs by step. None where its own condition skips it."""
        job = load(WORKFLOWS / workflow)["jobs"][name]
        names = self._names({})
        if not Expression(names, {"success": lambda: True}).condition(job.get("if")):
            return None
        values = Expression(names, {})
        assert values.filled(job["runs-on"])
        self._exported.update({key: values.filled(str(value)) for key, value in job.get("env", {}).items()})
        return self._run(job["steps"], {})[1]

    def action(self, **inputs: str) -> tuple[bool, dict[str, str]]:
        """The composite action with these inputs: whether it succeeded, and its outputs."""
        return self._action(ACTION, inputs)

    def _action(self, path: Path, inputs: Mapping[str, str]) -> tuple[bool, dict[str, str]]:
        action = load(path)
        declared = action["inputs"]
        assert set(inputs) <= set(declared), f"{set(inputs) - set(declared)} are no inputs"
        given = {f"inputs.{name}": inputs.get(name, spec.get("default", "")) for name, spec in declared.items()}
        given["github.action_path"] = str(path.parent)
        good, outputs = self._run(action["runs"]["steps"], given)
        ids = {step["id"] for step in action["runs"]["steps"] if "id" in step}
        values = Expression(self._names(given, outputs, ids), {})
        return good, {name: values.filled(spec["value"]) for name, spec in action["outputs"].items()}

    def _run(self, steps: list[dict[str, Any]], names: Mapping[str, str]) -> tuple[bool, dict[str, dict[str, str]]]:
        good, ids = True, {step["id"] for step in steps if "id" in step}
        outputs: dict[str, dict[str, str]] = {}
        for number, step in enumerate(steps):
            known = self._names(names, outputs, ids)
            values = Expression(known, _status_functions(good))
            title = step.get("name") or step.get("id") or step.get("uses") or f"step {number}"
            if not values.condition(step.get("if")):
                self.steps.append(Step(title, None))
                continue
            if "uses" in step:
                done, found = self._use(step, values)
            else:
                done, found = self._shell(title, step, values)
            if "id" in step:
                outputs[step["id"]] = found
            good = good and (done or step.get("continue-on-error") is True)
        return good, outputs

    def _use(self, step: dict[str, Any], values: Expression) -> tuple[bool, dict[str, str]]:
        inputs = {name: values.filled(str(value)) for name, value in step.get("with", {}).items()}
        if step["uses"].startswith("./"):
            return self._action(ROOT / step["uses"] / "action.yml", inputs)
        assert re.fullmatch(r"actions/checkout@[0-9a-f]{40}", step["uses"]), step["uses"]
        return True, {}

    def _shell(self, title: str, step: dict[str, Any], values: Expression) -> tuple[bool, dict[str, str]]:
        self.on_step(step)
        assert "${{" not in step["run"], "an expression in a script is an injection"
        files = {name: self.temp / f"{name.lower()}-{len(self.steps)}" for name in _FILES}
        for file in files.values():
            file.touch()
        script = self.temp / f"script-{len(self.steps)}.sh"
        script.write_text(step["run"])
        environ = {
            **self.environ,
            **self._exported,
            **{name: values.filled(str(value)) for name, value in step.get("env", {}).items()},
            **{name: str(path) for name, path in files.items()},
            "GITHUB_ACTIONS": "true",
            "GITHUB_EVENT_NAME": self.event,
            "GITHUB_WORKSPACE": str(self.workspace),
            "RUNNER_TEMP": str(self.temp),
            "PATH": os.pathsep.join([*reversed(self._paths), self.environ["PATH"]]),
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=200,
        )
        self.steps.append(Step(title, done.returncode, done.stdout))
        self._exported.update(entries(files["GITHUB_ENV"].read_text()))
        self._paths += files["GITHUB_PATH"].read_text().split()
        self.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        return done.returncode == 0, entries(files["GITHUB_OUTPUT"].read_text())

    def _names(
        self,
        names: Mapping[str, str],
        outputs: Mapping[str, Mapping[str, str]] | None = None,
        ids: set[str] | None = None,
    ) -> Context:
        known = Context(names)
        known["github.event_name"] = self.event
        known.update({f"vars.{name}": value for name, value in self.variables.items()})
        known.update({f"env.{name}": value for name, value in self._exported.items()})
        for step in ids or ():
            for output in ("state", "toolchain", "docker-args"):
                known[f"steps.{step}.outputs.{output}"] = (outputs or {}).get(step, {}).get(output, "")
        return known


_FILES = ("GITHUB_ENV", "GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_STEP_SUMMARY")


def entries(text: str) -> dict[str, str]:
    """What a file of variables or outputs says, in both of its forms; anything else in it fails."""
    found: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if heredoc := re.fullmatch(r"([A-Za-z_][\w-]*)<<(\S+)", line):
            value = []
            for inner in lines:
                if inner == heredoc[2]:
                    break
                value.append(inner)
            found[heredoc[1]] = "\n".join(value)
        else:
            named = re.fullmatch(r"([A-Za-z_][\w-]*)=(.*)", line)
            assert named, f"not an entry of the runner's file: {json.dumps(line)}"
            found[named[1]] = named[2]
    return found
