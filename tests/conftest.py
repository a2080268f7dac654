"""What tests need from the machine, by marker. Where it is missing a test is skipped, or fails if all of them must run.

Environment, set by `make test`: DOCKER_HOST (the engine, and the only way to it), WARM_CACHE_TEST_IMAGE and
WARM_CACHE_STAND_IN (tags of the tiny and of the real stand-in image on it), WARM_CACHE_TESTS_COMPLETE=1 (nothing may be
missing but GPUs).

.github/CONTRIBUTING.md names the folders of tests; beside those there, tests/host/ holds hooks, locks and NVML with
processes of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import psutil
import pytest

from builder.engine.client import Engine
from builder.errors import BuilderError
from tests.program import Program, assemble
from tests.stub_nvml.stub import a_driver, a_library  # noqa: F401 - fixtures

TINY = "WARM_CACHE_TEST_IMAGE"
REAL = "WARM_CACHE_STAND_IN"
NEEDS = {"engine": TINY, "stand_in": REAL}


@cache
def missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here, or None."""
    if marker == "gpu":
        return None if Path("/dev/nvidia0").exists() else "this machine has no GPU"
    if not os.environ.get("DOCKER_HOST"):
        return "DOCKER_HOST is not set"
    tag = os.environ.get(NEEDS[marker])
    if not tag:
        return f"{NEEDS[marker]} is not set"
    try:
        engine = Engine(os.environ["DOCKER_HOST"])
        try:
            engine.connect()
            return None if engine.image(tag) else f"the engine at DOCKER_HOST has no image {tag}"
        finally:
            engine.close()
    except BuilderError as error:
        return error.message


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside the time limit of a test, which is no limit for its neighbours
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    uses_engine = any(item.get_closest_marker(marker) for marker in NEEDS)
    with engine_turn(alone=item.get_closest_marker("alone") is not None) if uses_engine else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def engine_turn(*, alone: bool) -> Iterator[None]:
    """One test's turn on the engine that all processes of tests share; with ``alone``, while no other test has one."""
    engine = hashlib.sha256(os.environ.get("DOCKER_HOST", "").encode()).hexdigest()[:12]
    stem = Path(tempfile.gettempdir()) / f"warm-cache-tests-{os.getuid()}-{engine}"
    with stem.with_suffix(".next").open("a") as entrance, stem.with_suffix(".turn").open("a") as turn:
        # Who waits at the turn keeps the entrance: else the shared turns of others could follow each other for ever.
        fcntl.flock(entrance, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(entrance, fcntl.LOCK_UN)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("engine", "stand_in", "gpu"):
        if item.get_closest_marker(marker) and (reason := missing(marker)):
            if marker != "gpu" and os.environ.get("WARM_CACHE_TESTS_COMPLETE") == "1":
                pytest.fail(f"{reason}, and WARM_CACHE_TESTS_COMPLETE=1 says that every test must run", pytrace=False)
            pytest.skip(reason)


@pytest.fixture(scope="session")
def docker_host() -> str:
    return os.environ["DOCKER_HOST"]


@pytest.fixture(scope="session")
def tiny_image() -> str:
    """Tag of the image whose fake sglang plays every failure."""
    return os.environ[TINY]


@pytest.fixture(scope="session")
def stand_in_image() -> str:
    """Tag of the image with the real sglang and the real compilers."""
    return os.environ[REAL]


@pytest.fixture
def engine(docker_host: str) -> Iterator[Engine]:
    """The engine that the tests were pointed to."""
    engine = Engine(docker_host)
    engine.connect()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """``until(predicate)``: returns as soon as it is true; fails after ``seconds``. Tests never just sleep."""

    def until(predicate: Callable[[], object], *, seconds: float = 20.0, what: str = "the condition") -> None:
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while not predicate():
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not come true within {seconds:.0f} s")
            pause.wait(0.02)

    return until


@pytest.fixture
def sleeper() -> Iterator[psutil.Popen]:
    """A process that does nothing until the test is over."""
    process = psutil.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the fake sglang, made once."""
    return assemble(tmp_path_factory.mktemp("tiny") / "site")


@pytest.fixture
def program(tmp_path: Path, site: Path) -> Program:
    """The in-container program, on a cache root of its own."""
    return Program(tmp_path, site)
