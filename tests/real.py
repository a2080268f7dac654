"""The real engine of the tests: whatever DOCKER_HOST names, with one tiny image that has python3. Never anything of
its own.
"""

from __future__ import annotations

import functools
import os

import pytest

from builder.engine import Engine
from builder.errors import EngineLostError

IMAGE = os.environ.get("WARM_CACHE_TEST_IMAGE", "engine-kit-py:1")

#: On every container of the tests, so that what one of them leaves behind can be found.
LABEL = "io.sglang.warm-cache.test"


@functools.cache
def why_not() -> str:
    """Why there is no engine to test with; empty when there is one."""
    if not os.environ.get("DOCKER_HOST"):
        return "DOCKER_HOST is not set"
    engine = Engine(timeout=10)
    try:
        return "" if engine.connect().image(IMAGE) else f"the engine has no image {IMAGE} (WARM_CACHE_TEST_IMAGE)"
    except EngineLostError as error:
        return error.message
    finally:
        engine.close()


def engine_or_skip() -> Engine:
    """A connected engine; skips the test, and says why, where there is none."""
    if why_not():
        pytest.skip(f"no engine to test with: {why_not()}")
    return Engine().connect()
