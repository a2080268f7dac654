"""Where each value of a run comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.manifest.effective import Setting, settings
from builder.manifest.fields import Overrides
from builder.manifest.load import read_manifest

MANIFEST = """\
schema = 1
[image]
ref = "i:1"
[cache]
root = "/data/cache"
[gpus]
count = 8
[defaults]
timeout = "30m"
env = { A = "1" }
[[task]]
model = "org/one"
argv = ["--tp", "8"]
timeout = "90s"
[[task]]
model = "org/two"
recipe = "serve"
gpus = 4
"""


@pytest.fixture
def found(tmp_path: Path) -> dict[tuple[str, str], Setting]:
    path = tmp_path / "m.toml"
    path.write_text(MANIFEST)
    overrides = Overrides(budget="5m", cache="/elsewhere")
    manifest, document = read_manifest(path, overrides=overrides)
    given = {"budget": "--budget", "cache": "WARM_CACHE_CACHE"}
    rows = [*settings(manifest, document, given.get)]
    return {(row.table, row.key): row for row in rows}


@pytest.mark.parametrize(
    ("table", "key", "value", "origin", "source"),
    [
        ("[image]", "ref", "i:1", "manifest", "m.toml:3"),
        ("[cache]", "root", "/elsewhere", "option", "WARM_CACHE_CACHE"),
        ("[cache]", "volume", None, "default", ""),
        ("[cache]", "job_max", "6h", "default", ""),
        ("[run]", "budget", "5m", "option", "--budget"),
        ("task one-tp8", "timeout", "90s", "manifest", "m.toml:14"),
        ("task two", "timeout", "30m", "defaults", "m.toml:9"),
        ("task two", "env", {"A": "1"}, "defaults", "m.toml:10"),
        ("task two", "gpus", 4, "manifest", "m.toml:18"),
        ("task one-tp8", "gpus", 8, "default", ""),
        ("task one-tp8", "silence", "10m", "default", ""),
    ],
)
def test_setting_has_value_and_origin(
    found: dict[tuple[str, str], Setting], table: str, key: str, value: object, origin: str, source: str
) -> None:
    row = found[table, key]
    assert (row.value, row.origin) == (value, origin)
    assert row.source.endswith(source) and bool(row.source) == bool(source)
