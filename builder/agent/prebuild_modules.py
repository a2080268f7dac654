"""Modules of sglang's own JIT that a walk named: built without a GPU, and looked for again by a later process.

`build` runs in the process that imported sglang (`prebuild_forks`), `prebuild` in the in-container program. What a
module is asked for by are the arguments of sglang's ``load_jit``. A look-up under ``SGLANG_CRASH_ON_JIT_COMPILE=1``
tells whether a task will find it: nothing else is believed.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from builder import events
from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.agent.prebuild_forks import Answers, WorkerRequest, describe_end, fork, last_lines
from builder.cache import families, layout, toolchain
from builder.job import PrebuildRequest
from builder.text import counted

FAMILY = "sglang_jit"
#: Makes sglang raise where it would compile.
CRASH = "SGLANG_CRASH_ON_JIT_COMPILE"

#: Runs the process that imports sglang, and yields its answers.
Ask = Callable[[WorkerRequest, Mapping[str, str]], Iterator[dict[str, Any]]]


def build(request: WorkerRequest, answers: Answers) -> None:
    """Build the modules, then answer for each, by its number: `found`, or `unfound` with the reason."""
    scratch = Path(request.scratch)
    log = scratch / "modules.log"
    os.waitpid(fork(functools.partial(_build, request.modules, request.workers), log), 0)
    why = last_lines(log)
    for number, module in enumerate(request.modules):
        log = scratch / f"module-{number}.log"
        status = os.waitstatus_to_exitcode(os.waitpid(fork(functools.partial(_find, module), log), 0)[1])
        if status:
            last = describe_end(status, log) if status < 0 else last_lines(log)
            answers.write(unfound=number, why=why or last or "it was not found again")
        else:
            answers.write(found=number)


def _build(modules: list[str], workers: int) -> None:
    """Build those that are missing. Runs in a fork. Raises for the first that failed, after all have ended."""
    utils = importlib.import_module("sglang.kernels.jit.utils")
    utils.parallel_compile([functools.partial(_load, module) for module in modules], max_workers=workers)


def _find(module: str) -> None:
    """Load a module that has to be there. Runs in a fork."""
    os.environ[CRASH] = "1"
    _load(module)


def _load(module: str) -> None:
    args, options = json.loads(module)
    for name in options:
        if name.endswith("_wrappers") and options[name]:
            options[name] = [tuple(each) for each in options[name]]
    importlib.import_module("sglang.kernels.jit.utils").load_jit(*args, **options)


def prebuild(
    root: Path,
    place: str,
    request: PrebuildRequest,
    workers: int,
    record: toolchain.Record,
    environ: Mapping[str, str],
    ask: Ask,
    output: Output,
    guard: Guard,
) -> None:
    """Build the request's modules below the key that tasks look in, and report how many a later process finds.

    record: of this environment, with the simulated GPU. workers: that may compile at the same time.
    """
    key = toolchain.family_key(record, FAMILY)
    if request.jit_key and key != request.jit_key:
        why = f"{FAMILY}'s key is {key} on the simulated GPU, and {request.jit_key} where the tasks run"
        output.event(events.PrebuildProblem((), "modules", why))
        return
    layout.describe_family(root, FAMILY, key, toolchain.family_factors(record, FAMILY))
    lock = guard.acquire(layout.family_lock(root, FAMILY, key), exclusive=False)
    found: set[int] = set()
    try:
        environ = {**environ, **families.environment(str(root), {FAMILY: key})}
        output.event(events.Phase(f"prebuild: {counted(len(request.modules), 'module')} of sglang's own JIT"))
        asked = WorkerRequest("modules", -1, place, workers, modules=list(request.modules))
        for answer in ask(asked, environ):
            if "found" in answer:
                found.add(answer["found"])
            elif "unfound" in answer:
                name = " ".join(json.loads(request.modules[answer["unfound"]])[0])[:100]
                output.event(events.PrebuildProblem((name,), "modules", answer["why"]))
    finally:
        os.close(lock)
        output.event(events.ModulesPrebuilt(len(found)))
