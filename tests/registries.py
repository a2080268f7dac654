"""Real registries of a test: docker/stand-in/registry, started and ended with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.registry.client import RegistryClient
from builder.registry.reference import Reference, parse

STAND_INS = Path(__file__).resolve().parents[1] / "docker" / "stand-in" / "registry"
SCRIPT = STAND_INS / "registry.sh"
#: Where programs that are hard to get stay for the next run, as those of the stand-in images do.
KEPT = Path(os.environ.get("WARM_CACHE_STAND_IN_CACHE") or Path.home() / ".cache" / "warm-cache-stand-in")


@dataclass(frozen=True)
class StandIn:
    """A registry that runs. host: with its port. ca_file: of one that speaks TLS. data: below `folder`."""

    host: str
    folder: Path
    ca_file: Path | None = None

    def reference(self, name: str = "team/cache") -> Reference:
        return parse(f"{self.host}/{name}")

    def client(self, name: str = "team/cache") -> RegistryClient:
        return RegistryClient(self.reference(name), ca_file=self.ca_file)

    def kill(self) -> None:
        """End it, in the middle of whatever it does."""
        subprocess.run([SCRIPT, "down", self.folder], check=True, timeout=30)

    def comes_back(self) -> None:
        """Start it again, at the same port."""
        port = self.host.rpartition(":")[2]
        subprocess.run([SCRIPT, "up", self.folder, "--port", port], check=True, capture_output=True, timeout=60)

    def blob(self, digest: str) -> Path:
        """The file that holds a blob or a manifest: the registry serves what is in it, right or wrong."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.folder / "data/docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"


@contextlib.contextmanager
def stand_in(folder: Path, *options: str) -> Iterator[StandIn]:
    """Run a registry in this folder, with options of registry.sh; skip the test where there can be none."""
    done = subprocess.run([SCRIPT, "up", folder, *options], capture_output=True, text=True, timeout=240)
    if done.returncode:
        reason = f"no registry: {done.stderr.strip()[-300:]}"
        if os.environ.get("WARM_CACHE_TESTS_COMPLETE") == "1":
            pytest.fail(f"{reason}, and WARM_CACHE_TESTS_COMPLETE=1 says that every test must run", pytrace=False)
        pytest.skip(reason)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    ca_file = found.get("REGISTRY_CA")
    try:
        yield StandIn(found["REGISTRY"], folder, Path(ca_file) if ca_file else None)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=30)


def tool(name: str) -> Path:
    """Return the program cosign or oras; skip the test where it cannot be had."""
    done = subprocess.run([STAND_INS / "tools.sh", KEPT / "tools", name], capture_output=True, text=True, timeout=240)
    if done.returncode:
        pytest.skip(f"no {name}: {done.stderr.strip()[-300:]}")
    return KEPT / "tools" / name
