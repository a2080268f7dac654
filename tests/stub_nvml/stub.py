"""A GPU driver for tests: a real libnvidia-ml.so.1 whose answers a test decides, also while somebody is asking."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builder.host.gpu_locks import DIRECTORIES

HERE = Path(__file__).parent
GB = 10**9


def build(source: str, library: Path) -> Path:
    """Compiles one of the doubles; skips, visibly, where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        if os.environ.get("WARM_CACHE_TESTS_COMPLETE") == "1":
            pytest.fail("no C compiler, and WARM_CACHE_TESTS_COMPLETE=1 says that every test must run", pytrace=False)
        pytest.skip("no C compiler for the GPU driver's double")
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, HERE / source],
        check=True,
        timeout=60,
    )
    return library


@dataclass
class Driver:
    """What the driver says from the next question on, once it is written. used: bytes, per GPU, held by nobody that
    can be named. processes: (GPU, pid, bytes). UUIDs are nobody else's, so that no other test waits for these GPUs.
    """

    libraries: Path
    state: Path
    gpus: int = 2
    used: dict[int, int] = field(default_factory=dict)
    processes: list[tuple[int, int, int]] = field(default_factory=list)
    errors: list[tuple[str, int | None, int]] = field(default_factory=list)
    hang: str = ""

    def __post_init__(self) -> None:
        self.uuids = [f"GPU-{uuid.uuid4()}" for _ in range(64)]
        self.write()

    def write(self) -> None:
        used = [self.used.get(gpu, 4 << 20) for gpu in range(self.gpus)]
        lines = [f"gpu\t{self.uuids[gpu]}\tNVIDIA H200\t{150 * GB}\t{used[gpu]}" for gpu in range(self.gpus)]
        lines += [f"process\t{gpu}\t{pid}\t{held}" for gpu, pid, held in self.processes]
        lines += [f"error\t{name}\t{'*' if gpu is None else gpu}\t{code}" for name, gpu, code in self.errors]
        lines += [f"hang\t{self.hang}"] if self.hang else []
        scratch = self.state.with_suffix(".new")
        scratch.write_text("\n".join(lines) + "\n")
        scratch.replace(self.state)

    def hold(self, *processes: tuple[int, int, int]) -> None:
        self.processes = list(processes)
        self.write()

    def say(self, function: str, code: int, gpu: int | None = None) -> None:
        """From now on this function fails so."""
        self.errors.append((function, gpu, code))
        self.write()

    @property
    def environ(self) -> dict[str, str]:
        """For a process that shall find this driver."""
        return {"LD_LIBRARY_PATH": str(self.libraries), "STUB_NVML_STATE": str(self.state)}


@pytest.fixture(name="nvml_library", scope="session")
def a_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the double."""
    return build("nvml.c", tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1").parent


@pytest.fixture(name="driver")
def a_driver(nvml_library: Path, tmp_path: Path) -> Iterator[Driver]:
    """Its GPUs go with it, and so may their locks: nobody else ever locks these UUIDs."""
    driver = Driver(nvml_library, tmp_path / "nvml-state")
    yield driver
    for directory in DIRECTORIES:
        for gpu in driver.uuids:
            (directory / f"{gpu}.lock").unlink(missing_ok=True)
