"""A simulated GPU, for tasks that compile kernels and run none. EXPERIMENTAL: not proven on hardware.

DeepGEMM's keys and sources depend on facts that are known without a GPU: compute capability, number of SMs, compiler.
So the serving image's own sglang compiles shapes on a stub driver: a libcuda.so.1, and a library preloaded over the
CUDA runtime, both compiled from ``stub_driver/`` by the image's own compiler against its own headers. No kernel runs.
Everything made like this is marked: in the record's ``observed``, in the marker, and by a separate kind of proof.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from builder.task import GPUS, PRETEND_VARIABLE, Gpu

_SOURCES = Path(__file__).resolve().parent / "stub_driver"
_SECONDS = 120.0


class Impossible(Exception):
    """No GPU can be simulated here. The message is the reason."""


def environment(environ: Mapping[str, str], parent: str, gpu: Gpu | None = None) -> dict[str, str]:
    """Return the environment in which CUDA finds the simulated GPU, if one is requested. Raises Impossible.

    parent: the folder in which the stub driver is compiled. gpu: the one to simulate; None: that of the environment.
    """
    wanted = environ.get(PRETEND_VARIABLE)
    if gpu is None and not wanted:
        return dict(environ)
    if gpu is None and wanted not in GPUS:
        raise Impossible(f"no GPU to pretend is called {wanted!r}; known: {', '.join(GPUS)}")
    chosen = gpu or GPUS[str(wanted)]
    folder = Path(parent) / "stub_driver"
    folder.mkdir(exist_ok=True)
    _compile(chosen, environ, folder)
    return {
        **environ,
        PRETEND_VARIABLE: wanted or chosen.name,
        "LD_PRELOAD": " ".join(filter(None, (str(folder / "libpretended.so"), environ.get("LD_PRELOAD")))),
        "LD_LIBRARY_PATH": ":".join(filter(None, (str(folder), environ.get("LD_LIBRARY_PATH")))),
    }


def _compile(gpu: Gpu, environ: Mapping[str, str], folder: Path) -> None:
    include = _include(environ)
    numbers = {
        "GPU_NAME": f'"{gpu.name}"',
        "GPU_MAJOR": gpu.capability[0],
        "GPU_MINOR": gpu.capability[1],
        "GPU_SMS": gpu.sms,
        "GPU_MEMORY": f"{gpu.memory}ull",
        "GPU_SHARED": gpu.shared,
        "GPU_L2": gpu.l2,
    }
    common = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-I{_SOURCES}", f"-I{include}"]
    common += [f"-D{name}={value}" for name, value in numbers.items()]
    rest = folder / "rest.c"
    driver, runtime = _SOURCES / "driver.c", _SOURCES / "runtime.c"
    rest.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in _others(include, driver, environ)))
    _cc(environ, *common, str(driver), str(rest), "-o", str(folder / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1")
    _cc(environ, *common, str(runtime), "-o", str(folder / "libpretended.so"), "-ldl")


def _others(include: Path, driver: Path, environ: Mapping[str, str]) -> list[str]:
    """Return the functions of cuda.h, old names included, that the driver's source does not define."""
    names: set[str] = set()
    for mode in ([], ["-D__CUDA_API_VERSION_INTERNAL"]):
        text = _cc(environ, "-E", "-P", *mode, f"-I{include}", str(include / "cuda.h"))
        names |= set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", text))
    defined = set(re.findall(r"^CUresult (cu\w+)\(", driver.read_text(encoding="ascii"), re.MULTILINE))
    return sorted(names - defined)


def _include(environ: Mapping[str, str]) -> Path:
    """Return the folder of cuda.h: that of the compiler that DeepGEMM uses."""
    import shutil  # as below

    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), nvcc and str(Path(nvcc).resolve().parents[1])]
    for home in (*homes, "/usr/local/cuda"):
        if home and (Path(home) / "include" / "cuda.h").is_file():
            return Path(home) / "include"
    raise Impossible("the stub driver cannot be compiled: this image has no cuda.h")


def _cc(environ: Mapping[str, str], *arguments: str) -> str:
    import shutil  # no other mode needs these
    import subprocess

    compiler = shutil.which("cc", path=environ.get("PATH")) or shutil.which("gcc", path=environ.get("PATH"))
    if compiler is None:
        raise Impossible("the stub driver cannot be compiled: this image has no C compiler")
    env = {name: value for name, value in environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(
            [compiler, *arguments],
            check=False,
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Impossible(f"the stub driver cannot be compiled: {error}") from None
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        raise Impossible(f"the stub driver cannot be compiled against {arguments[-1]}: {reason.strip()[:300]}")
    return done.stdout
