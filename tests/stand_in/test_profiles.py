"""Every command line of the packaged profiles is one that the real sglang understands."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest

from builder.agent.dummy_weights import task_of
from builder.agent.pass_context import model_argv
from builder.manifest.load import Overrides, load, profiles
from builder.task import Task

pytestmark = [pytest.mark.stand_in, pytest.mark.timeout(300)]

MODULES = {"compile-deep-gemm": "sglang.compile_deep_gemm", "serve": "sglang.launch_server"}

#: Parses what it is given as sglang's own two programs do, each command line on its own; says what was refused.
PARSE = r"""
import contextlib, io, json, sys
from sglang.compile_deep_gemm import CompileArgs
from sglang.srt.server_args import ServerArgs
import argparse

def parser(module):
    made = argparse.ArgumentParser(prog=module)
    ServerArgs.add_cli_args(made)
    if module == "sglang.compile_deep_gemm":
        CompileArgs.add_cli_args(made)
    return made

parsers = {}
answers = []
for module, argv in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsers.setdefault(module, parser(module)).parse_args(argv)
        answers.append("")
    except SystemExit:
        answers.append(said.getvalue().strip().splitlines()[-1])
print(json.dumps(answers))
"""


def refused(docker_host: str, image: str, tasks: dict[str, Task]) -> dict[str, str]:
    """What sglang's parser says against the command lines of these tasks; importing sglang takes seconds, so once."""
    lines = []
    for task in tasks.values():
        _, _, module, *argv = model_argv(task, MODULES[task.recipe])
        lines.append([module, argv])
    command = ["docker", "-H", docker_host, "run", "--rm", "-i", "--init", "--network", "none"]
    command += ["-e", "SGLANG_USE_CPU_ENGINE=1", image, "python3", "-c", PARSE]
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: answer for name, answer in zip(tasks, answers, strict=True) if answer}


def test_profiles_every_task_is_parsed_by_sglang(docker_host: str, stand_in_image: str) -> None:
    tasks = {
        f"{profile} {task.label}": task
        for profile in profiles()
        for task in load(profile=profile, overrides=Overrides(cache="/c")).tasks
        if task.recipe in MODULES
    }
    assert {name.split()[0] for name in tasks} >= {"h200", "h100-4"}
    # With dummy weights a recipe makes words of its own.
    tasks |= {f"{name} dummy": task_of(replace(task, layers=4), None) for name, task in tasks.items()}
    # What must be refused, or the test would not see a typo, or a flag that this sglang has dropped.
    any_task = next(task for task in tasks.values() if task.recipe == "compile-deep-gemm")
    wrong = {
        "a typo": replace(any_task, argv=(*any_task.argv, "--mem-fraction-sttic", "0.7")),
        "dropped": replace(any_task, argv=(*any_task.argv, "--cuda-graph-max-bs", "64")),
        "no such choice": replace(any_task, argv=(*any_task.argv, "--hicache-io-backend", "directly")),
        "no value": replace(any_task, argv=(*any_task.argv, "--page-size")),
    }
    answers = refused(docker_host, stand_in_image, tasks | wrong)
    assert answers.keys() == wrong.keys(), answers
    assert answers["a typo"].endswith("unrecognized arguments: --mem-fraction-sttic 0.7")
    assert "--cuda-graph-max-bs-decode" in answers["dropped"]
