"""Durations and sizes: what is read as how much, and what is refused."""

from __future__ import annotations

import pytest

from builder.cache.model_store import STORE_MOUNT
from builder.engine.images import PROGRAM_ROOT
from builder.engine.lease import TARGET
from builder.job import MERGED
from builder.manifest import section_values, values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20m", 1200), ("1h30m", 5400), ("45s", 45), ("1d", 86400), ("7", 7), ("1.5h", 5400), (3, 3), (0.5, 0.5)],
)
def test_duration_is_read_in_seconds(text: object, seconds: float) -> None:
    assert values.seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "m", "1x", "-1s", "1m 2h", "inf", float("inf"), float("nan"), -1, True, None, [], "٣m"]
)
def test_duration_of_another_form_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        values.seconds(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("32g", 32 << 30),
        ("2GiB", 2 << 30),
        ("1.5k", 1536),
        ("10", 10),
        ("10 MB", 10 << 20),
        ("1t", 1 << 40),
        (5, 5),
        ("3b", 3),
    ],
)
def test_size_is_read_in_bytes(text: object, size: int) -> None:
    assert values.size(text) == size


@pytest.mark.parametrize("text", ["", "g", "1x", "-1", -1, 1.5, True, None])
def test_size_of_another_form_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        values.size(text)


@pytest.mark.parametrize(
    "path", ["/etc", "/proc/x", "/sys", "/dev/shm/jit", "/run", "/usr/local/jit", "/opt/warm-cache", "/models", "/tmp"]
)
def test_mount_over_what_the_container_needs_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="use a new path such as /jit"):
        section_values.mount_point(path)
    for fine in ("/jit", "/opt/jit", "/var/cache/jit", "/etcetera", "/home/ci/jit"):
        assert section_values.mount_point(fine) == fine


def test_mounts_of_the_program_are_refused_for_the_cache() -> None:
    for path in (PROGRAM_ROOT, TARGET, MERGED, STORE_MOUNT):
        with pytest.raises(ValueError, match="use a new path"):
            section_values.mount_point(path)
