"""Which sglang a process imports, by every way that a checkout gets into an environment. No package is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

HEAD, LABEL = "e" * 40, "f" * 40
PROBE = f"""
import json, os
from builder.agent import packages, sglang_build
from builder.task import ServingImage
image = ServingImage("sha256:1", {{"ai.sglang.build.commit": "{LABEL}"}})
print(json.dumps({{**sglang_build.build(os.environ, image), "identity": packages.identity(["sglang"])}}))
"""
RECORD = "sglang/__init__.py,sha256=x,1\nsglang/kernels/k.py,sha256=x,1\n"


def package(above: Path, kernel: str) -> Path:
    folder = above / "sglang"
    (folder / "kernels").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('nothing is imported')")
    (folder / "kernels" / "k.py").write_text(f"@triton.jit\n{kernel}\n")
    return above


def metadata(site: Path, name: str, **more: str) -> None:
    info = site / name
    info.mkdir(parents=True)
    for file, text in {"METADATA": "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.24\n", **more}.items():
        (info / file).write_text(text)


@pytest.mark.parametrize("way", ["wheel", "direct_url", "develop", "path before a wheel", "folder of the name"])
def test_build_is_of_what_is_imported(tmp_path: Path, way: str) -> None:
    site, checkout = tmp_path / "site", package(tmp_path / "co" / "python", "changed")
    (tmp_path / "co" / ".git").mkdir()
    (tmp_path / "co" / ".git" / "HEAD").write_text(HEAD)
    paths = [site]
    if way == "direct_url":
        url = json.dumps({"url": f"file://{checkout}", "dir_info": {"editable": True}})
        metadata(site, "sglang-0.5.24.dist-info", RECORD="__editable__.sglang.pth,,\n", **{"direct_url.json": url})
        paths = [site, checkout]  # as its .pth file has it
    elif way == "develop":
        metadata(checkout, "sglang.egg-info", **{"PKG-INFO": "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.24\n"})
        paths = [checkout]
    else:
        metadata(package(site, "released"), "sglang-0.5.24.dist-info", RECORD=RECORD)
        first = {"path before a wheel": [checkout], "folder of the name": [tmp_path / "plain"]}
        paths = [*first.get(way, ()), site]
        (tmp_path / "plain" / "sglang").mkdir(parents=True)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    environ.pop("SGLANG_BUILD_COMMIT", None)

    def build() -> Any:
        command = [sys.executable, "-c", PROBE]
        ran = subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True, text=True)
        return json.loads(ran.stdout)

    found = build()
    is_checkout = way in ("direct_url", "develop", "path before a wheel")
    assert found["version"] == "0.5.24"
    assert found["commit"] == (HEAD if is_checkout else LABEL)
    assert list(found["sources"]) == ["triton"]
    (checkout / "sglang" / "kernels" / "k.py").write_text("@triton.jit\nagain\n")
    again = build()
    assert (again["sources"] != found["sources"]) == is_checkout
    assert (again["identity"] != found["identity"]) == is_checkout, "as for every package that a key depends on"
