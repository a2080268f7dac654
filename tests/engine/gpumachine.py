"""A machine with GPUs that a test has in its hands: an image that sees them, and a user of the program on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.cli import READY, Cli, Ended, command
from tests.stub_nvml.stub import Driver, build


@contextlib.contextmanager
def gpu_image(context: Path, docker_host: str, tiny_image: str, count: int) -> Iterator[str]:
    """The tiny image with so many pretended GPUs, whoever looks."""
    build("cuda.c", context / "libcuda.so.1")
    (context / "Dockerfile").write_text(
        f"FROM {tiny_image}\n"
        "COPY libcuda.so.1 /opt/driver/\n"
        f"ENV LD_LIBRARY_PATH=/opt/driver FAKE_CUDA_DEVICES={count}\n"
    )
    tag = f"warm-cache-test-gpus:{count}-{os.getpid()}"
    docker = ["docker", "-H", docker_host]
    if shutil.which("docker") is None:
        pytest.skip("no docker command to build the image with")
    subprocess.run([*docker, "build", "-q", "-t", tag, context], check=True, capture_output=True, timeout=120)
    yield tag
    subprocess.run([*docker, "rmi", "-f", tag], check=False, capture_output=True, timeout=60)


class GpuCli(Cli):
    """A user on a machine with GPUs."""

    driver: Driver

    @property
    def environ(self) -> dict[str, str]:
        return {**super().environ, **self.driver.environ}

    def gpus(self, *tasks: dict[str, Any], **section: Any) -> None:
        usual = {"count": self.driver.gpus, "name": "H200", "release_timeout": "10s"}
        self.manifest(*(tasks or (command("one", READY),)), gpus={**usual, **section})

    def ended(self, *options: str, **how: Any) -> Ended:
        """`warm` to its end, whatever that is, and nothing of it left."""
        ended = self.run("warm", "--json", *options, **how)
        if "device driver" in ended.err:
            pytest.skip("this engine has no GPU device driver, not even a fake one")
        assert "defect" not in ended.said, ended.said
        return ended

    def go(self) -> None:
        (self.root / "go").touch()

    def another(self, name: str) -> GpuCli:
        """Another cache root, on the same GPUs."""
        place = self.place / name
        place.mkdir()
        return self.on(place, self.host, self.image, self.driver)

    @classmethod
    def on(cls, place: Path, host: str, image: str, driver: Driver) -> GpuCli:
        cli = cls(place, host, image)
        cli.driver = driver
        return cli
