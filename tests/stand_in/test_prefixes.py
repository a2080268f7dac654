"""`[image] setup`: what one installer put under one prefix serves what another put under another, family by family."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine

pytestmark = [pytest.mark.stand_in, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SITE = "/opt/standin/venv/lib/python3.11/site-packages"
WHEEL = "/opt/kit/sgl_deep_gemm-*.whl"
#: As an install of the pull request's tree does it: another installer, another place, found first.
SETUPS = {
    "pip": [
        f"PYTHONPATH=/opt/kit python3 -m pip install -q --no-index --no-deps --prefix /opt/by-pip {WHEEL}",
        f"echo /opt/by-pip/lib/python3.11/site-packages > {SITE}/by-pip.pth",
    ],
    "uv": [
        f"uv pip install -q --offline --no-deps --python python3 --prefix /srv/by-uv {WHEEL}",
        f"echo /srv/by-uv/lib/python3.11/site-packages > {SITE}/by-uv.pth",
    ],
}
MANIFEST = """
schema = 1
[image]
ref = "{image}"
setup = {setup}
[container]
network = "none"
shm_size = "1g"
[gpus]
count = 0
[[task]]
model = "stand-in/dense"
recipe = "shapes"
shapes = ["GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"]
m_values = [64]
env = {{ LD_PRELOAD = "/opt/standin/stubs/fakert.so", FAKE_CUDA_DEVICES = "1" }}
"""


@pytest.fixture(scope="module")
def kit(stand_in_image: str) -> str:
    """The stand-in image with both installers, and with DeepGEMM as a wheel instead of installed."""
    pip = pytest.importorskip("pip", reason="the tests' own environment has no pip to copy")
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "uv is one of the development dependencies"
    lines = [
        f"FROM {stand_in_image}",
        "COPY uv /usr/local/bin/uv",
        "COPY pip /opt/kit/pip",
        "COPY repack.py /opt/kit/repack.py",
        "RUN python3 /opt/kit/repack.py sgl-deep-gemm /opt/kit",
        f"RUN rm -r {SITE}/deep_gemm {SITE}/sgl_deep_gemm-*.dist-info",
    ]
    dockerfile = "\n".join(lines).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(uv, "uv")
        tar.add(Path(pip.__file__).parent, "pip", filter=lambda entry: None if "__pycache__" in entry.name else entry)
        tar.add(Path(__file__).with_name("repack.py"), "repack.py")
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(dockerfile)
        tar.addfile(entry, io.BytesIO(dockerfile))
    tag = "warm-cache-test-derived:installers"
    engine = Engine().connect()
    try:
        engine.build(buffer.getvalue(), tag=tag)
    finally:
        engine.close()
    return tag


def run(verb: str, manifest: Path, *more: str) -> tuple[int, dict[str, Any]]:
    words = [verb, "--manifest", str(manifest), "--cache", str(manifest.parent / "cache"), "--json", *more]
    done = subprocess.run(
        [sys.executable, "-m", "builder", *words], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert "Traceback" not in done.stderr, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


def test_pip_and_uv_installs_share_keys(kit: str, tmp_path: Path) -> None:
    manifests = {}
    for installer, setup in SETUPS.items():
        manifests[installer] = tmp_path / f"{installer}.toml"
        manifests[installer].write_text(MANIFEST.format(image=kit, setup=json.dumps(setup)))
    status, first = run("warm", manifests["pip"])
    assert status == 0 and first["tasks"][0]["entries_added"] > 0
    entries = sorted((tmp_path / "cache").glob("deep_gemm/*/cache/*"))
    assert len(entries) == first["tasks"][0]["entries_added"]

    status, checked = run("check", manifests["uv"])
    assert (status, checked["tasks"][0]["state"]) == (0, "warm"), checked["tasks"][0]["reason"]
    _, explained = run("explain", manifests["uv"])
    assert {row["state"] for row in explained["families"]} == {"found"}  # no key holds the image
    status, again = run("warm", manifests["uv"], "--force")
    assert (status, again["tasks"][0]["state"], again["tasks"][0]["entries_added"]) == (0, "warmed", 0)
    assert sorted((tmp_path / "cache").glob("deep_gemm/*/cache/*")) == entries
