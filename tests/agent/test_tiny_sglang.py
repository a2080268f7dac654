"""The tiny stand-in: what the tests above take for an sglang must keep looking like one."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from builder.cache import inventory
from builder.cache.families import FAMILY
from tests.program import TINY, Program

Until = Callable[..., None]


def python(program: Program, code: str) -> str:
    environ = {"DG_JIT_CACHE_DIR": "dg", "SGLANG_DG_CACHE_DIR": "dg", "TRITON_CACHE_DIR": f"{program.place}/k/triton/0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=program.place,
        env={**program.environ, **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("name", ["sglang", "sgl_deep_gemm", "torch", "triton"])
def test_tiny_metadata_is_that_of_an_installation(site: Path, name: str) -> None:
    (info,) = site.glob(f"{name}-*.dist-info")
    assert Distribution.at(info).version == info.name.removesuffix(".dist-info").split("-")[1]
    for path, digest, _ in csv.reader((info / "RECORD").read_text().splitlines()):
        if digest:
            actual = base64.urlsafe_b64encode(hashlib.sha256((site / path).read_bytes()).digest()).rstrip(b"=")
            assert digest == f"sha256={actual.decode()}"


def test_tiny_sources_hold_no_init_file() -> None:
    assert not list(TINY.rglob("__init__.py"))


@pytest.mark.parametrize(
    ("chunk", "fast", "count"),
    [
        (8192, "1", 2560),
        (4096, "1", 2048),
        (2048, "1", 1536),
        (1024, "1", 1024),
        (8192, "0", 16384),
        (16384, "0", 32768),
    ],
)
def test_tiny_m_list_equals_measured_one(program: Program, chunk: int, fast: str, count: int) -> None:
    code = (
        f"import os, types; os.environ['SGLANG_JIT_DEEPGEMM_FAST_WARMUP'] = '{fast}'\n"
        "from sglang.srt.layers.deep_gemm_wrapper import compile_utils as cu\n"
        f"context = types.SimpleNamespace(chunked_prefill_size={chunk}, base_gpu_id=0)\n"
        "cu.get_schedule = cu.get_device = lambda: context\n"
        "cu.update_deep_gemm_config(0); print(len(cu._BUILTIN_M_LIST))"
    )
    assert int(python(program, code)) == count


def test_tiny_entries_are_valid(program: Program) -> None:
    code = (
        "from deep_gemm.jit import compile_kernel as a; from triton.cache import compile_kernel as b\n"
        "print(a('k', 'x')); b('k', 'x'); print(a('k', 'x'))"
    )
    assert python(program, code).split() == ["True", "False"]
    for family, place in (("deep_gemm", "dg"), ("triton", "k/triton/0")):
        found = inventory.scan(FAMILY[family], program.place / place)
        assert len(found.valid) == 1
        assert not found.invalid
    (cubin,) = program.place.glob("dg/cache/*/kernel.cubin")
    cubin.write_bytes(cubin.read_bytes()[:-70])
    assert list(inventory.scan(FAMILY["deep_gemm"], program.place / "dg").invalid)


def test_tiny_server_answers_health_and_generate(program: Program, until: Until) -> None:
    code = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
    port = int(python(program, code))
    environ = {
        **program.environ,
        "SGLANG_DG_CACHE_DIR": "dg",
        "TRITON_CACHE_DIR": "tri",
        "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1",
    }
    argv = [sys.executable, "-m", "sglang.launch_server", "--model", "org/name", "--port", str(port)]
    with (program.place / "log").open("wb") as log:
        server = subprocess.Popen(argv, cwd=program.place, env=environ, stdout=log, stderr=log)

    def get(path: str, body: object = None) -> object:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data=data, timeout=10) as answer:
            return json.load(answer)

    def healthy() -> bool:
        try:
            return get("/health_generate") == {}
        except OSError:
            return False

    try:
        until(healthy, what="health")
        assert get("/v1/models") == {"data": [{"id": "org/name"}]}
        body = {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 3}}
        answer = get("/generate", body)
        assert isinstance(answer, list)
        assert [part["meta_info"]["completion_tokens"] for part in answer] == [3, 3]
        server.terminate()
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()
    assert b"fired up and ready to roll" in (program.place / "log").read_bytes()


def test_tiny_nvcc_prints_real_version_text() -> None:
    assert os.access(TINY / "nvcc", os.X_OK)
    done = subprocess.run([TINY / "nvcc", "--version"], capture_output=True, text=True, timeout=10, check=True)
    assert "Cuda compilation tools, release 13.0, V13.0.88" in done.stdout
