"""The limits of a prune: from options, from the environment, else from the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.cli.commands.prune import PruneArgs, limits
from builder.cli.main import main
from builder.errors import UsageError
from builder.manifest.load import CacheSpec
from builder.run.prune import Limits, PruneRow, summary

CACHE = CacheSpec(root=Path("/jit"), keep=3, older_than=60.0, max_size=1000)


def test_limits_without_options_are_the_manifests() -> None:
    assert limits(PruneArgs(), CACHE) == Limits(keep=3, older_than=60.0, max_size=1000, images=False)


def test_limits_options_take_precedence() -> None:
    args = PruneArgs(keep="1", older_than="2h", max_size="5k", images=True)
    assert limits(args, CACHE) == Limits(keep=1, older_than=7200.0, max_size=5 << 10, images=True)


def test_limits_wrong_values_are_reported_at_once_with_their_sources() -> None:
    args = PruneArgs(keep="0", older_than="-1h", max_size="big", sources={"max-size": "WARM_CACHE_MAX_SIZE"})
    with pytest.raises(UsageError) as caught:
        limits(args, CACHE)
    places = [problem.location for problem in caught.value.problems]
    assert places == ["--keep", "--older-than", "WARM_CACHE_MAX_SIZE"]


def test_summary_counts_rows_of_each_kind() -> None:
    rows = [PruneRow(kind, "x") for kind in ("marker", "family", "family", "entries", "entries", "aside", "image")]
    assert summary(rows) == "1 marker, 2 family directories, 2 sets of entries, 1 image, 1 quarantined item"
    assert summary([]) == ""


@pytest.mark.parametrize("verb", ["prune", "refresh"])
def test_wrong_value_is_judged_before_the_machine(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    assert main([verb, "--profile", "h200", "--keep", "two"], environ=nowhere) == 2
    assert "--keep  a number of at least 1 is wanted, found 'two'" in capsys.readouterr().err
