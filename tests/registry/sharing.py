"""Machines that share a cache by a registry: each a job of tests/cli/test_here.py, with the whole package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.cli.test_here import DENSE, IMAGE, Job
from tests.program import ROOT
from tests.registries import StandIn

#: A task whose one kernel, of a family that looks its entries up by content, is large enough to be cut on its way.
BIG = """
import os, random
path = os.path.join(os.environ["QUACK_CACHE_DIR"], "kernel.bin")
if not os.path.exists(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(random.Random(1).randbytes(3 << 20))
print("KERNELS READY")
"""
TASKS = (
    DENSE,
    {
        "model": "org/big",
        "recipe": "command",
        "argv": ["python3", "-c", BIG],
        "success": "KERNELS READY",
        "families": ["quack"],
    },
)


class Machine(Job):
    """A machine with a cache root of its own."""

    def warm(self, *words: str) -> None:
        self.run("warm", "--image", IMAGE, *words, status=0)

    def begin(self, verb: str, *words: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start push or pull: they need more than the standard library."""
        manifest = [] if "--manifest" in words else ["--manifest", str(self.path)]
        return subprocess.Popen(
            [sys.executable, "-m", "builder", verb, *words, "--here", "--json", *manifest],
            cwd=self.place,
            env={**self.environ, "PYTHONPATH": f"{ROOT}:{self.environ['PYTHONPATH']}", **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def share(
        self, verb: str, *words: str, status: int = 0, environ: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Push or pull, and return the JSON document."""
        process = self.begin(verb, *words, environ=environ)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status, out + err
        assert "Traceback" not in err
        document: dict[str, Any] = json.loads(out)
        return document

    def push(self, registry: StandIn, name: str, *words: str, status: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.share("push", f"{registry.host}/{name}", "--image", IMAGE, *words, status=status)
        return found["push"] if status == 0 else found

    def pull(self, registry: StandIn, name: str, *words: str, status: int = 0, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.share("pull", f"{registry.host}/{name}", *words, status=status, **more)
        return found["pull"] if status == 0 else found

    def warm_tasks(self) -> set[str]:
        """Labels of the tasks that a check finds warm."""
        process = self.start("check", "--here", "--strict", "--json", "--manifest", str(self.path))
        out, _ = process.communicate(timeout=60)
        return {task["label"] for task in json.loads(out)["tasks"] if task["state"] == "warm"}

    def is_untouched(self) -> bool:
        """Whether nothing of a cache is in the root: no entry, no marker, nothing unpacked."""
        folders = ("deep_gemm", "quack", "markers/*", "images/*", "staging/*", "restored.json")
        return not any(list(self.root.glob(folder)) for folder in folders)
