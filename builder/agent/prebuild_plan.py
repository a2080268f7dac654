"""Plan pass: names the kernels of each shape, and the M that makes each, without compiling them.

A compiler in nvcc's place copies one small cubin, and the Ms of a shape are swept one after the other, so that each new
entry shows which M made it. The cubin holds the symbol `PLAN_ONLY`. Under a planned name it would be found and believed
by DeepGEMM: so the plan pass runs where no cache root is mounted, and every check of entries refuses that symbol.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.agent.prebuild_forks import (
    Answers,
    ModelWalk,
    Sweep,
    WorkerRequest,
    compile_one,
    describe_end,
    fork,
    last_lines,
    m_list,
    use_cache,
)
from builder.cache.entries import PLAN_ONLY

#: Seconds for one small kernel, on a machine under load.
_COMPILER = 300.0

#: In nvcc's place: its own version text, and for every kernel the same cubin.
_COPY = """#!/bin/sh
case " $* " in *' --version '*) exec {nvcc} --version;; esac
while [ $# -gt 0 ]; do
  case $1 in --output-file | -o) out=$2;; --output-file=*) out=${{1#*=}};; esac
  shift
done
exec cp {cubin} "$out"
"""


@dataclass(frozen=True)
class _SweepFork:
    """A fork that answers by one JSON document."""

    pid: int
    log: Path
    sweep: Sweep
    folder: Path


class PlanPass:
    """One plan pass: first the shapes of models, then the kernels of all shapes."""

    def __init__(self, request: WorkerRequest, answers: Answers, compile_utils: Any) -> None:
        self._request, self._answers, self._utils = request, answers, compile_utils
        self._scratch = Path(request.scratch)
        self._children: dict[int, _SweepFork] = {}  # by the descriptor of their answer

    def run(self) -> None:
        """Answer `planned` or `unplanned` for each sweep, and `walked` or `unwalked` for each model."""
        logging.disable(logging.CRITICAL)
        try:
            compiler = self._copying_compiler()
        except (OSError, subprocess.SubprocessError) as error:
            self._answers.write(unable=f"the compiler cannot be run: {error}")
            return
        waiting = list(enumerate(dict.fromkeys([*map(_hashable, self._request.sweeps), *self._walk()])))
        while waiting or self._children:
            while waiting and len(self._children) < self._request.workers:
                number, sweep = waiting.pop(0)
                self._start(number, Sweep(sweep[0], list(sweep[1]), *sweep[2:]), compiler)
            for reader in select.select(list(self._children), [], [])[0]:
                self._finish(reader)

    def walk(self) -> None:
        """Answer `walked` or `unwalked` for each model, and plan nothing."""
        logging.disable(logging.CRITICAL)
        for _ in self._walk():
            pass

    def _start(self, number: int, sweep: Sweep, compiler: Path) -> None:
        folder, log = self._scratch / f"plan-{number}", self._scratch / f"plan-{number}.log"
        reader, writer = os.pipe()
        pid = fork(lambda: self._sweep(sweep, folder, writer, compiler), log)
        os.close(writer)
        self._children[reader] = _SweepFork(pid, log, sweep, folder)

    def _sweep(self, sweep: Sweep, folder: Path, writer: int, compiler: Path) -> None:
        """Find the M of each kernel. Runs in a fork."""
        cache = use_cache(folder, compiler)
        seen: set[str] = set()
        found: list[tuple[str, int]] = []
        for m in m_list(self._utils, sweep):
            if failed := compile_one(self._utils, sweep.problem, m):
                raise RuntimeError(f"M={m}: {failed}")
            names = {path.name for path in cache.iterdir()} - seen if cache.is_dir() else set()
            seen |= names
            found += [(name, m) for name in sorted(names)]
        with os.fdopen(writer, "w", encoding="ascii") as answer:
            json.dump(found, answer)

    def _finish(self, reader: int) -> None:
        child = self._children.pop(reader)
        with os.fdopen(reader, encoding="ascii") as answer:
            text = answer.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        shutil.rmtree(child.folder, ignore_errors=True)
        kernels = json.loads(text) if text and not status else []
        if kernels:
            self._answers.write(planned=vars(child.sweep), kernels=kernels)
            return
        why = describe_end(status, child.log) if status < 0 else last_lines(child.log)
        self._answers.write(unplanned=vars(child.sweep), why=why or "no kernel was asked for")

    def _walk(self) -> Iterator[tuple[Any, ...]]:
        """Yield the sweeps of each model. Each is walked in a new fork, as many at once as there are workers."""
        waiting = list(enumerate(self._request.models))
        walking: dict[int, tuple[int, Path, ModelWalk]] = {}  # by the descriptor of their answer
        while waiting or walking:
            while waiting and len(walking) < self._request.workers:
                number, model = waiting.pop(0)
                log = self._scratch / f"walk-{number}.log"
                reader, writer = os.pipe()
                pid = fork(functools.partial(_walk_model, model, writer), log)
                os.close(writer)
                walking[reader] = pid, log, model
            for reader in select.select(list(walking), [], [])[0]:
                yield from self._walked(reader, *walking.pop(reader))

    def _walked(self, reader: int, pid: int, log: Path, model: ModelWalk) -> Iterator[tuple[Any, ...]]:
        """Yield the sweeps of a model whose fork has begun to answer."""
        with os.fdopen(reader, encoding="ascii") as answer:
            text = answer.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status or not text:
            why = describe_end(status, log) if status < 0 else last_lines(log)
            self._answers.write(unwalked=model.label, why=why or "the walk gave no answer")
            return
        found = json.loads(text)
        if found["problems"]:
            place, problem = next(iter(found["problems"].items()))
            self._answers.write(unwalked=model.label, why=f"{place}: {problem}")
            return
        sweeps = [
            Sweep((shape[0], *shape[1:]), model.m_values, found["chunked_prefill_size"]) for shape in found["shapes"]
        ]
        rows = [vars(each) for each in sweeps]
        self._answers.write(walked=model.label, classes=found["classes"], modules=found["modules"], sweeps=rows)
        yield from map(_hashable, sweeps)

    def _copying_compiler(self) -> Path:
        """Make the marked cubin and the program that copies it. Returns the program's path."""
        nvcc = self._request.nvcc
        source, cubin = self._scratch / "plan_only.cu", self._scratch / "plan_only.cubin"
        source.write_text(f'extern "C" __global__ void {PLAN_ONLY}() {{}}\n')
        architecture = f"--gpu-architecture={self._request.architecture}"
        subprocess.run(
            [nvcc, "--cubin", architecture, str(source), "-o", str(cubin)],
            check=True,
            timeout=_COMPILER,
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        )
        if PLAN_ONLY.encode() not in cubin.read_bytes():
            raise OSError("its output does not hold the mark of the plan pass")
        program = self._scratch / "bin" / "nvcc"
        program.parent.mkdir()
        program.write_text(_COPY.format(nvcc=shlex.quote(nvcc), cubin=shlex.quote(str(cubin))))
        program.chmod(0o755)
        return program


def _hashable(sweep: Sweep) -> tuple[object, ...]:
    return sweep.problem, tuple(sweep.m_values), sweep.chunked_prefill_size, sweep.every


def _walk_model(model: ModelWalk, writer: int) -> None:
    """Write the shapes of one model. Runs in a fork."""
    from builder.agent import model_walk

    found = model_walk.walk(model.argv)
    with os.fdopen(writer, "w", encoding="ascii") as answer:
        json.dump(found, answer)
