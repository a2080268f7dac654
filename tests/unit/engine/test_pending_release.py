"""A lease's directory with a pending release outlives its owner until a sweep has run the release."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.engine import lease
from builder.host import hooks
from builder.host.hooks import PENDING_RELEASE, Hooks
from tests.fakes import FakeEngine


def record(directory: Path) -> Path:
    hooks.record_pending_release(directory, Hooks(("true",), "dead", 20, "/"))
    return directory / PENDING_RELEASE


def test_sweep_living_owner_keeps_its_pending_release(tmp_path: Path) -> None:
    with lease.Lease(tmp_path, run_id="r1") as held:
        pending = record(held.path.parent)
        lease.sweep(FakeEngine(), tmp_path, run_release=lambda directory: pytest.fail("the owner lives"))
        assert pending.exists()


def test_sweep_dead_owners_release_runs_before_its_directory_is_removed(tmp_path: Path) -> None:
    with lease.Lease(tmp_path, run_id="r1") as held:
        pending = record(held.path.parent)
    assert pending.exists() and held.path.exists()
    calls: list[Path] = []

    def fail(directory: Path) -> bool:
        calls.append(directory)
        return False

    lease.sweep(FakeEngine(), tmp_path, run_release=fail)
    assert calls == [pending.parent] and pending.exists(), "it did not run, and stays"
    lease.sweep(FakeEngine(), tmp_path, run_release=lambda directory: True)
    assert not pending.parent.exists()


def test_sweep_without_run_release_keeps_it(tmp_path: Path) -> None:
    with lease.Lease(tmp_path, run_id="r1") as held:
        pending = record(held.path.parent)
    lease.sweep(FakeEngine(), tmp_path)
    assert pending.exists()


def test_sweep_without_pending_release_runs_none(tmp_path: Path) -> None:
    with lease.Lease(tmp_path, run_id="r1") as held:
        held.keep = True
    lease.sweep(FakeEngine(), tmp_path, run_release=lambda directory: pytest.fail("there is no pending release"))
    assert not held.path.parent.exists()
