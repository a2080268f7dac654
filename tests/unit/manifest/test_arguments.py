"""[args]: arguments that several tasks share, and the message for a wrong name."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.errors import UsageError
from builder.manifest.load import load

HEAD = """\
schema = 1
image.ref = "i"
cache.root = "/c"
[args]
tp = ["--tp", "8"]
both = ["@tp", "--dp", "8"]
"""


def read(path: Path, argv: str, head: str = HEAD) -> tuple[str, ...]:
    path.write_text(f'{head}[[task]]\nmodel = "org/m"\nargv = {argv}\n')
    return load(path).tasks[0].argv


def test_argv_with_group_name_is_expanded(tmp_path: Path) -> None:
    argv = read(tmp_path / "m.toml", '["--a", "@both", "--b", "@@tp", "@", "x@tp"]')
    assert argv == ("--a", "--tp", "8", "--dp", "8", "--b", "@tp", "@", "x@tp")


@pytest.mark.parametrize(
    ("head", "argv", "expected"),
    [
        (HEAD, '["--a", "@tpp"]', "m.toml:9: argv: item 2: no group 'tpp' is in [args] above this (did you"),
        ("\n".join(HEAD.splitlines()[:3]) + "\n", '["@tp"]', "m.toml:6: argv: item 1: no group 'tp' is in [args]"),
        (HEAD + 'early = ["@late"]\nlate = ["x"]\n', "[]", "m.toml:7: early: item 1: no group 'late'"),
        (HEAD + 'me = ["@me"]\n', "[]", "m.toml:7: me: item 1: no group 'me'"),
        (HEAD + 'one = "--tp"\n', "[]", "m.toml:7: one: expected a list of arguments, found a string: '--tp'; write"),
    ],
)  # fmt: skip
def test_group_that_is_wrong_is_reported_with_its_line(tmp_path: Path, head: str, argv: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "m.toml", argv, head)
    found = [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]
    assert len(found) == 1 and found[0].startswith(expected), found


def test_argv_with_secret_from_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "m.toml", '["@key"]', HEAD + 'key = ["--api-key", "x"]\n')
    assert "argv holds --api-key" in str(caught.value.problems[0])
