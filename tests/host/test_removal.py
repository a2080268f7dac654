"""Removal by a user who is not root, in a process of its own: a thread cannot give up being root."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from builder.beneath import Tree


@pytest.mark.attack(
    "directories at any level have no permissions, where a builder that is not root has to remove them",
    by="env",
    holds="their owner gives them back, or removes them",
)
def test_remove_directories_without_permissions_as_their_owner(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "b" / "file").write_text("x")
    tmp_path.chmod(0o777)
    for name in ("tree/a/b/c", "tree/a/b", "tree/a", "tree"):
        (tmp_path / name).chmod(0)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.chdir(tmp_path)
            if not os.getuid():
                for place in (tmp_path, *tmp_path.rglob("*")):
                    os.chown(place, 65534, 65534)
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            Tree(".").remove("tree")
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []
