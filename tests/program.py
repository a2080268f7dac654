"""The in-container program, run on this machine as a process of its own, with the tiny stand-in's fake sglang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from builder import events
from builder.cache import memos
from builder.cache.toolchain import Record
from builder.events import Event, Verdict
from builder.job import JOB_VARIABLE, Job
from builder.task import ServingImage, Task

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "docker" / "stand-in" / "tiny"
NONCE = "4f0e2d6c"

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Result:
    """What a run left: exit status, both streams, and the events among them."""

    status: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def events(self) -> list[Event]:
        return [event for line in self.stdout.split(b"\n") if (event := events.decode(line, NONCE))]

    @property
    def log(self) -> bytes:
        """stdout without the events."""
        return b"".join(
            line for line in self.stdout.splitlines(keepends=True) if events.decode(line.rstrip(b"\n"), NONCE) is None
        )

    @property
    def verdict(self) -> Verdict:
        return self.all(Verdict)[-1]

    @property
    def marker(self) -> str:
        """The marker's path below the root."""
        path = self.verdict.marker
        assert path is not None, self.verdict
        return path

    def all(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if type(event) is kind]


class Running:
    """A run that has not ended. Its streams go to files, so that nothing has to be drained."""

    def __init__(self, program: Program, job: Job, environ: Mapping[str, str], stdin: int) -> None:
        self._files = [program.place / f"stdout-{time.monotonic_ns()}", program.place / f"stderr-{time.monotonic_ns()}"]
        self._begun = time.monotonic()
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "builder.agent"],
                cwd=program.place,
                env={**program.environ, JOB_VARIABLE: job.to_json(), **environ},
                stdin=stdin,
                stdout=out,
                stderr=err,
            )

    @property
    def stdout(self) -> bytes:
        return self._files[0].read_bytes()

    def has(self, kind: type[Event]) -> bool:
        return any(isinstance(event, kind) for event in Result(0, self.stdout, b"", 0.0).events)

    def end(self, seconds: float = 30) -> Result:
        """Waits for the end; kills what does not end by itself, and fails."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            if self.process.stdin:
                self.process.stdin.close()
        return Result(status, self.stdout, self._files[1].read_bytes(), time.monotonic() - self._begun)


class Program:
    """place: a folder of the test's own. site: the fake packages. The cache root is ``place/jit``."""

    def __init__(self, place: Path, site: Path) -> None:
        self.place, self.root = place, place / "jit"
        self.model = place / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text('{"num_hidden_layers": 61}')
        (self.model / "model.safetensors").write_bytes(b"not really")
        self.environ = {
            "PATH": f"{TINY}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{site}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(place),
            "CUDA_HOME": str(place),
        }

    def record(self) -> Record:
        """What the root remembers of the image and of this machine."""
        return next(record for memo in memos.known_images(self.root) for record in memos.records(self.root, memo))

    def task(self, play: str = "", **fields: Any) -> Task:
        known: dict[str, Any] = {
            "label": "tiny-tp8",
            "model": str(self.model),
            "recipe": "compile-deep-gemm",
            "argv": ("--tp", "8"),
            "env": {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1", "TINY_PLAY": play},
        }
        return Task(**{**known, **fields})

    def command(self, code: str, *arguments: str, **fields: Any) -> Task:
        """A task of recipe `command` that runs this python code and claims nothing."""
        argv = (sys.executable, "-c", code, *arguments)
        return self.task(**{"recipe": "command", "argv": argv, "families": (), **fields})

    def start(
        self,
        task: Task | None,
        *,
        environ: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        **job: Any,
    ) -> Running:
        known: dict[str, Any] = {
            "mode": "run",
            "nonce": NONCE,
            "mount": str(self.root),
            "image": ServingImage("sha256:0f1e"),
            "workdir": str(self.place),
            "grace": 2.0,
        }
        return Running(self, Job(**{**known, "task": task, **job}), environ or {}, stdin)

    def run(self, task: Task | None, **options: Any) -> Result:
        return self.start(task, **options).end()


def assemble(destination: Path, python: Sequence[str] = (sys.executable,)) -> Path:
    """The fake packages, made as an image gets them."""
    subprocess.run([*python, str(TINY / "assemble.py"), str(destination)], check=True, timeout=60)
    return destination
