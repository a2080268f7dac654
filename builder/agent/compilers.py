"""Asks compilers for their version, all at once, with a deadline."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

#: How long a compiler, or the GPU driver, may take to answer.
SECONDS = 20.0

#: What Triton assembles with: the second one from compute capability 9.0 (3.9) or 10.0 (before) on.
PTXAS = ("ptxas", "ptxas-blackwell")


def start_all(environ: Mapping[str, str], site: str | None) -> dict[str, subprocess.Popen[str] | None]:
    """Starts every ``--version`` at once: one after the other they would be most of the probe's time."""
    path = environ.get("PATH")
    commands: dict[str, list[str]] = {}
    # The order of DeepGEMM (cuda_helpers.py), torch (cpp_extension.py) and tvm-ffi.
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc", path=path), "/usr/local/cuda/bin/nvcc"]
    if nvcc := _first_executable(candidates):
        commands["nvcc"] = [nvcc]
    if own := environ.get("DG_JIT_NVCC_COMPILER"):
        commands["deep_gemm_nvcc"] = [own]
    try:
        compiler = shlex.split(environ.get("CXX") or "c++")
    except ValueError:
        compiler = []
    if compiler and shutil.which(compiler[0], path=path):
        commands["host_compiler"] = compiler
    for name in PTXAS:
        # Triton falls back to the one in its wheel when the one that the variable names cannot be run.
        named = environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH")
        if ptxas := _first_executable([named, f"{site}/triton/backends/nvidia/bin/{name}" if site else None]):
            commands[name] = [ptxas]
    return {name: start([*command, "--version"], environ) for name, command in commands.items()}


def _first_executable(paths: Iterable[str | None]) -> str | None:
    return next((path for path in paths if path and Path(path).is_file() and os.access(path, os.X_OK)), None)


def start(command: list[str], environ: Mapping[str, str]) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except (OSError, ValueError):
        return None


def finish(process: subprocess.Popen[str] | None, until: float, what: str, problems: list[str]) -> str | None:
    """What the process printed; None, and a problem noted, where it failed. Ends it, and all it started, at `until`."""
    if process is None:
        problems.append(f"{what}: cannot be run")
        return None
    with process:
        try:
            text, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            problems.append(f"{what}: no answer in {SECONDS:.0f} s")
            os.killpg(process.pid, signal.SIGKILL)
            return None
    if process.returncode:
        problems.append(f"{what}: status {process.returncode}")
        return None
    return text.strip() or None
