"""Tasks of a manifest replaced in place."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from builder.errors import UsageError
from builder.manifest import rewrite

TEXT = """\
# a manifest
schema = 1

[image]
ref = "tiny:1"  # ours

# the first
[[task]]
model = "org/one"
argv = [
    "--tp", "8",   # [[task]]
]

[[task]]
model = "org/two"
[task.env]
A = "1"

# what it is for
[run]
budget = "30m"
"""


def test_replace_keeps_every_byte_when_nothing_changes() -> None:
    assert rewrite.replace_tasks(TEXT, lambda _number: True, []) == TEXT


def test_replace_removes_one_with_its_comment() -> None:
    result = rewrite.replace_tasks(TEXT, lambda number: number == 1, [])
    assert result == TEXT.replace(TEXT[TEXT.index("# the first") : TEXT.index('[[task]]\nmodel = "org/two"')], "")


def test_replace_removes_subtables_and_adds_before_what_follows() -> None:
    result = rewrite.replace_tasks(TEXT, lambda number: number == 0, ['[[task]]\nmodel = "org/three"'])
    assert "[task.env]" not in result
    assert result.endswith('\n\n[[task]]\nmodel = "org/three"\n\n# what it is for\n[run]\nbudget = "30m"\n')
    assert result.startswith(TEXT[: TEXT.index('[[task]]\nmodel = "org/two"')].rstrip("\n"))


def test_replace_appends_when_there_is_no_task() -> None:
    assert rewrite.replace_tasks("schema = 1\n", lambda _number: True, ["[[task]]"]) == "schema = 1\n\n[[task]]\n"


def test_replace_refuses_tasks_written_inline() -> None:
    with pytest.raises(UsageError, match="cannot be replaced in place"):
        rewrite.replace_tasks('task = [{ model = "org/one" }]\n', lambda _number: True, [])


def test_write_keeps_mode_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "warm.toml"
    path.write_text("old")
    path.chmod(0o640)
    rewrite.write(path, "new\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_write_names_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        rewrite.write(tmp_path / "missing" / "warm.toml", "x")
