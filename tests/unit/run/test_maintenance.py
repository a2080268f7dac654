"""What a maintenance job that did not end well is reported as."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.cache import layout
from builder.errors import PreflightError
from builder.run import container_job, maintenance


@pytest.mark.attack(
    "a view whose audit takes for ever, or more memory than there is",
    by="view",
    holds="12: the audit is ended after 15 minutes or at 2 GB, and is said not to be complete",
)
@pytest.mark.parametrize(
    ("ended", "oom", "said"), [("timeout", False, "took longer than"), ("exited", True, "needed too much memory")]
)
def test_maintenance_over_its_limits_is_named(
    monkeypatch: pytest.MonkeyPatch, ended: str, oom: bool, said: str
) -> None:
    limits: list[float] = []

    def run(executor: Any, mode: str, task: Any, deadlines: Any, request: Any) -> Any:
        limits.append(deadlines.task)
        return SimpleNamespace(ended=ended, oom=oom, exit_code=137, events=[], tail=[])

    monkeypatch.setattr(container_job, "run", run)
    executor: Any = SimpleNamespace(
        context=SimpleNamespace(
            manifest=SimpleNamespace(run=SimpleNamespace(start=1.0, grace=1.0)),
            cancel=SimpleNamespace(check=lambda: None),
        )
    )
    with pytest.raises(PreflightError) as caught:
        maintenance.run(executor, "view-audit", lambda event: None, timeout=900.0)
    assert limits == [900.0]
    assert said in caught.value.problems[0].text and "it is not complete" in caught.value.problems[0].text


@pytest.mark.parametrize(("names", "said"), [((), "there is no cache in "), (("photos",), "this machine can't run it")])
def test_directory_that_is_no_cache_yet_is_named(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    """A volume's foreign files are in no copy of it, so that it looks empty too."""
    for name in names:
        (tmp_path / name).mkdir()
    executor: Any = SimpleNamespace(
        context=SimpleNamespace(report=SimpleNamespace(cache="")),
        root_name=str(tmp_path),
        require_root=lambda: None,
        cache=SimpleNamespace(exists=lambda: True, view=lambda entries: contextlib.nullcontext(tmp_path)),
    )
    with pytest.raises(PreflightError) as caught:
        maintenance.require_root(executor)
    assert caught.value.message.startswith(said)
    if not names:
        layout.prepare(tmp_path)
        maintenance.require_root(executor)
