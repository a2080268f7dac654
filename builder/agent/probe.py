"""Find out what the kernels of this environment depend on: a toolchain record (`cache.toolchain`).

Versions come from installed metadata and from ``--version``, GPU facts from libcuda and NVML in a process of their own.
Nothing is imported that takes long: torch would take seconds.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import posixpath
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from builder import files
from builder.agent import packages, sglang_build
from builder.cache import kernel_sources, toolchain, variables
from builder.cache.families import COMPILERS, FAMILIES, PACKAGES
from builder.cache.toolchain import SCHEMA, Record, distinct, factor_variables, switches
from builder.task import PRETEND_VARIABLE, ServingImage

#: Seconds that a compiler, or the GPU driver, may take to answer.
SECONDS = 20.0

#: Assemblers of Triton: the second one from compute capability 9.0 (Triton 3.9) or 10.0 (before) on.
PTXAS = ("ptxas", "ptxas-blackwell")

#: Name of the question for the host compiler's folders of headers.
_SEARCH = "host_compiler_headers"

_ROOT = str(Path(__file__).resolve().parents[2])
_GPU_FACTS = f"import sys; sys.path.insert(0, {_ROOT!r}); from builder.agent import gpu_probe; gpu_probe.main()"


def probe(
    *,
    environ: Mapping[str, str],
    mount: str,
    image: ServingImage,
    inherited: Mapping[str, str] | None = None,
) -> Record:
    """Return the record of the environment that this process runs in.

    Takes a few tenths of a second, plus the time of cuInit.

    environ: the environment that the task's processes will have.
    mount: the cache root as they see it.
    inherited: the environment without the task's own variables, for the record's switches; None: this process's.
    """
    inherited = os.environ if inherited is None else inherited
    triton = packages.find("triton")
    compilers = start_compilers(environ, None if triton is None else triton.place)
    gpu_facts = start([sys.executable, "-I", "-S", "-c", _GPU_FACTS], environ)

    sglang = sglang_build.build(environ, image)
    factors: dict[str, str | None] = {name: packages.identity(names) for name, names in PACKAGES.items()}
    factors.update(packages.deep_gemm())
    factors["sglang_csrc"] = kernel_sources.group_digest(sglang["sources"], "tvm_ffi")
    factors["sglang_extensions"] = kernel_sources.group_digest(sglang["sources"], "torch_extensions")
    factors["sglang_build"] = toolchain.build_name(sglang["version"], sglang["commit"])
    factors["torch_cuda"] = _torch_cuda()
    factors.update(_host_abi())
    factors.update(mount=posixpath.normpath(mount), image=image.content or image.id, isa=toolchain.isa())

    problems: list[str] = []
    until = time.monotonic() + SECONDS
    gpus, driver, cuda_status = _gpus(finish(gpu_facts, until, "GPU facts", problems), problems)
    factors["compute_capability"] = distinct(gpus, "compute_capability")
    factors["sm_count"] = distinct(gpus, "sm_count")
    factors["gpu_name"] = distinct(gpus, "name")
    factors["driver"] = driver
    searched = _searched(finish(compilers.pop(_SEARCH, None), until, _SEARCH, []))
    texts = {name: finish(process, until, name, problems) for name, process in compilers.items()}
    factors["nvcc"] = texts.get("nvcc")
    headers = {
        "nvcc": [f"{cuda_home(environ)}/include"] if factors["nvcc"] else [],
        "host_compiler": searched,
    }
    factors["deep_gemm_nvcc"] = texts["deep_gemm_nvcc"] if "deep_gemm_nvcc" in compilers else texts.get("nvcc")
    factors["host_compiler"] = (texts.get("host_compiler") or "").split("\n", 1)[0] or None
    factors["ptxas"] = "\n".join(text for name in PTXAS if (text := texts.get(name))) or None

    return {
        "schema": SCHEMA,
        "factors": {name: factors[name] for name in sorted(factors)},
        "gpus": gpus,
        "sglang": sglang,
        "switches": switches(inherited),
        "variables": factor_variables(inherited, named_home(environ)),
        "newest": newest_sources(headers),
        "observed": {
            "cuda_home": cuda_home(environ),
            "driver": driver,
            "python": sys.version.split()[0],
            "cuda_status": cuda_status,
            "problems": problems,
            "pretended": environ.get(PRETEND_VARIABLE),
        },
    }


# --- compilers -------------------------------------------------------------------------------------------------------


def start_compilers(environ: Mapping[str, str], site: str | None) -> dict[str, subprocess.Popen[str] | None]:
    """Start ``--version`` of every compiler, all at once: in turn they would take most of the probe's time.

    site: the folder that Triton is installed in.
    """
    path = environ.get("PATH")
    commands: dict[str, list[str]] = {}
    if nvcc := find_nvcc(environ):
        commands["nvcc"] = [nvcc]
    if own := environ.get("DG_JIT_NVCC_COMPILER"):
        commands["deep_gemm_nvcc"] = [own]
    try:
        compiler = shlex.split(environ.get("CXX") or "c++")
    except ValueError:
        compiler = []
    if compiler and shutil.which(compiler[0], path=path):
        commands["host_compiler"] = compiler
        # For the folders that it looks for headers in, which it prints among its errors.
        commands[_SEARCH] = [*compiler, "-x", "c++", "-E", "-v", os.devnull]
    for name in PTXAS:
        # Triton falls back to the one in its wheel if the one in the variable cannot be run.
        named = environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH")
        if ptxas := _first_executable([named, f"{site}/triton/backends/nvidia/bin/{name}" if site else None]):
            commands[name] = [ptxas]
    return {
        name: start(command, {**environ, "LC_ALL": "C"}, errors=True)
        if name == _SEARCH
        else start([*command, "--version"], environ)
        for name, command in commands.items()
    }


def newest_sources(headers: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Return the time (ns) of the newest source of each package, and of each compiler's headers, that ninja compares.

    headers: the folders of each compiler.
    """
    found = {name: time for name, folders in headers.items() if (time := packages.newest_header(folders))}
    for name in sorted({name for family in FAMILIES for name in family.sources} - {*COMPILERS}):
        times = [packages.newest(package) for each in PACKAGES.get(name, (name,)) if (package := packages.find(each))]
        if any(times):
            found[name] = max(times)
    return found


def _searched(text: str | None) -> list[str]:
    """Return the folders of headers of gcc's or clang's answer to ``-v``."""
    between = re.search(
        r"^#include <\.\.\.> search starts here:$(.*?)^End of search list", text or "", re.MULTILINE | re.DOTALL
    )
    return [line.strip() for line in between[1].splitlines() if line.strip()] if between else []


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Return the nvcc that is found with this environment; None where there is none."""
    # The order of DeepGEMM (cuda_helpers.py), torch (cpp_extension.py) and tvm-ffi.
    home = environ.get(variables.CUDA_HOME) or environ.get(variables.CUDA_PATH)
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    return _first_executable([f"{home}/bin/nvcc" if home else None, on_path, f"{variables.DEFAULT_HOME}/bin/nvcc"])


def cuda_home(environ: Mapping[str, str]) -> str:
    """Return the toolkit's directory as FlashInfer, torch and tvm-ffi write it into their build files."""
    if (named := named_home(environ)) is not None:
        return named
    nvcc = find_nvcc(environ)
    return posixpath.dirname(posixpath.dirname(nvcc)) if nvcc else variables.DEFAULT_HOME


def named_home(environ: Mapping[str, str]) -> str | None:
    """Return the toolkit's directory where a variable names it."""
    named = environ.get(variables.CUDA_HOME) or environ.get(variables.CUDA_PATH)
    return posixpath.normpath(named) if named else None


def _first_executable(paths: Iterable[str | None]) -> str | None:
    return next((path for path in paths if path and Path(path).is_file() and os.access(path, os.X_OK)), None)


def start(command: list[str], environ: Mapping[str, str], *, errors: bool = False) -> subprocess.Popen[str] | None:
    """Start a command in a new session; None if it cannot be started. errors: what it prints there counts as well."""
    try:
        return subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except (OSError, ValueError):
        return None


def finish(process: subprocess.Popen[str] | None, until: float, name: str, problems: list[str]) -> str | None:
    """Return what the process printed; None, and a problem added, if it failed.

    until: (monotonic) when the process is killed, with all that it started.
    """
    if process is None:
        problems.append(f"{name}: cannot be run")
        return None
    with process:
        try:
            text, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            problems.append(f"{name}: no answer in {SECONDS:.0f} s")
            os.killpg(process.pid, signal.SIGKILL)
            return None
    if process.returncode:
        problems.append(f"{name}: status {process.returncode}")
        return None
    return text.strip() or None


# --- GPUs, image, libraries ------------------------------------------------------------------------------------------


def _gpus(text: str | None, problems: list[str]) -> tuple[list[dict[str, Any]], str | None, int | None]:
    """Read the answer of `gpu_probe`: its GPUs, the driver's version, and the status of cuInit."""
    try:
        found = json.loads((text or "{}").splitlines()[-1])
        problems.extend(found.get("problems", ()))
        return list(found.get("gpus", ())), found.get("driver"), found.get("cuda_status")
    except (ValueError, AttributeError, TypeError):
        problems.append("GPU facts: unintelligible answer")
        return [], None, None


def _torch_cuda() -> str | None:
    """Return the CUDA version that torch was built with, from the text of ``torch/version.py``."""
    package = packages.find("torch")
    if package is None:
        return None
    try:
        text = files.read_bytes(f"{package.place}/torch/version.py", 1 << 16).decode("utf-8", "replace")
    except files.UnreadableError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _host_abi() -> dict[str, str | None]:
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        import platform  # slow to import

        libc = " ".join(platform.libc_ver()).strip()
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]  # ".cpython-312-x86_64-linux-gnu.so"
    return {"libc": libc or None, "machine": os.uname().machine or None, "python_abi": suffix.split(".")[1]}
