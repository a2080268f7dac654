"""The probe: compilers, GPUs and packages of an environment as one record."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from builder.agent import probe
from builder.cache import toolchain
from builder.cache.families import FAMILIES
from builder.task import ServingImage

IMAGE = "sha256:" + "a" * 64
SOON = time.monotonic() + 3600


# Compilers


def tool(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def nvcc_of(environ: dict[str, str], site: str | None = None) -> dict[str, str | None]:
    problems: list[str] = []
    running = probe.start_compilers(environ, site)
    return {name: probe.finish(process, SOON, name, problems) for name, process in running.items()}


def test_nvcc_is_searched_in_order(tmp_path: Path) -> None:
    tool(tmp_path / "home/bin/nvcc", "echo home; echo second line")
    tool(tmp_path / "path/nvcc", "echo path")
    tool(tmp_path / "cudapath/bin/nvcc", "echo cudapath")
    own = tool(tmp_path / "own", "echo own")
    path, home = str(tmp_path / "path"), str(tmp_path / "home")
    assert nvcc_of({"PATH": path, "CUDA_HOME": home})["nvcc"] == "home\nsecond line"
    assert nvcc_of({"PATH": path, "CUDA_PATH": str(tmp_path / "cudapath")})["nvcc"] == "cudapath"
    assert nvcc_of({"PATH": path})["nvcc"] == "path"
    both = nvcc_of({"PATH": path, "CUDA_HOME": home, "DG_JIT_NVCC_COMPILER": own})
    # Only DeepGEMM listens to that variable.
    assert (both["nvcc"], both["deep_gemm_nvcc"]) == ("home\nsecond line", "own")


def test_ptxas_of_triton_unless_variable_names_one(tmp_path: Path) -> None:
    bin_ = tmp_path / "site/triton/backends/nvidia/bin"
    tool(bin_ / "ptxas", "echo wheel")
    tool(bin_ / "ptxas-blackwell", "echo blackwell")
    site, path = str(tmp_path / "site"), str(tmp_path)
    found = nvcc_of({"PATH": path}, site)
    assert (found["ptxas"], found["ptxas-blackwell"]) == ("wheel", "blackwell")
    named = tool(tmp_path / "mine", "echo mine")
    assert nvcc_of({"PATH": path, "TRITON_PTXAS_PATH": named}, site)["ptxas"] == "mine"
    assert nvcc_of({"PATH": path, "TRITON_PTXAS_PATH": "/nowhere"}, site)["ptxas"] == "wheel"
    assert nvcc_of({"PATH": path, "TRITON_PTXAS_BLACKWELL_PATH": named}, site)["ptxas-blackwell"] == "mine"


def test_compiler_failing_hanging_or_garbled_is_absent(tmp_path: Path) -> None:
    problems: list[str] = []
    environ = {"PATH": os.environ["PATH"]}
    broken = probe.start([tool(tmp_path / "broken", "exit 3")], environ)
    assert probe.finish(broken, SOON, "broken", problems) is None
    # It starts a child that holds the pipe open: both must end.
    hung = probe.start([tool(tmp_path / "hung", "sleep 1000 & wait")], environ)
    assert probe.finish(hung, 0.0, "hung", problems) is None
    assert probe.finish(probe.start(["/nowhere/nvcc"], environ), SOON, "gone", problems) is None
    odd = probe.start([tool(tmp_path / "odd", "printf '\\377\\n'")], environ)
    assert probe.finish(odd, SOON, "odd", problems) == "\ufffd"
    assert [problem.split(":")[0] for problem in problems] == ["broken", "hung", "gone"]


# Probe


def test_probe_names_every_factor_without_heavy_imports(tmp_path: Path) -> None:
    nvcc = tool(tmp_path / "cuda/bin/nvcc", "echo nvcc: NVIDIA; echo release 13.0")
    cxx = tool(tmp_path / "bin/clang", 'echo "clang 18 $2"; echo Target')
    environ = {"PATH": os.environ["PATH"], "CUDA_HOME": str(tmp_path / "cuda"), "CXX": f"{cxx} -flag"}
    made = probe.probe(environ=environ, mount="/jit/", image=ServingImage(IMAGE, {"ai.sglang.build.commit": "abc"}))
    assert toolchain.sound(json.loads(json.dumps(made)))
    assert {factor for family in FAMILIES for factor in family.factors} <= set(made["factors"])
    factors = made["factors"]
    assert factors["nvcc"] == factors["deep_gemm_nvcc"] == "nvcc: NVIDIA\nrelease 13.0"
    assert factors["host_compiler"] == "clang 18 --version"
    assert (factors["mount"], factors["image"], made["sglang"]["commit"]) == ("/jit", IMAGE, "abc")
    assert factors["machine"] == os.uname().machine
    assert not {"torch", "sglang", "triton"} & set(sys.modules)
    assert nvcc


def test_commit_unknown_is_absent() -> None:
    environ = {"PATH": "/nowhere", "SGLANG_BUILD_COMMIT": "unknown"}
    made = probe.probe(environ=environ, mount="/jit", image=ServingImage())
    assert made["sglang"]["commit"] is None
    assert made["factors"]["image"] is None
    assert made["factors"]["nvcc"] is None or Path("/usr/local/cuda/bin/nvcc").exists()


def test_gpu_probe_runs_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # A driver that crashes its process is a problem noted and no facts.
    monkeypatch.setattr(probe, "_GPU_FACTS", "import os; os.kill(os.getpid(), 11)")
    made = probe.probe(environ={"PATH": "/nowhere"}, mount="/jit", image=ServingImage())
    assert made["gpus"] == []
    assert made["observed"]["problems"] == ["GPU facts: status -11"]
