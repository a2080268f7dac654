"""Every test here starts from a cache root that does not exist yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def roots_may_be_made() -> Iterator[None]:
    """For each process that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARM_CACHE_CREATE", "1")
        yield
