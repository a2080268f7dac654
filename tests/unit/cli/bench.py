"""One manifest, and an engine that is never asked: `check` does what a test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder.cli import invocation
from builder.cli import main as cli
from builder.cli.commands import check
from builder.run.container_executor import ContainerExecutor
from builder.task import Task

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


Act = Callable[[ContainerExecutor, tuple[Task, ...]], None]


class NoEngine:
    """Answers nothing: what these tests do never asks."""

    def __init__(self, url: str | None, timeout: float = 60.0) -> None:
        self.url = url

    def connect(self) -> None:
        return None

    greet = connect

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
