"""The lease: a locked file with its nonce, labels that name its inode, a directory that is private."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from builder.engine.lease import LABEL_DEADLINE, LABEL_LEASE, LABEL_RUN, LABEL_TASK, TARGET, Lease
from builder.errors import PreflightError
from tests.fakes import is_locked


def test_lease_file_is_locked_with_its_nonce_until_exit(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r") as lease:
        assert lease.path.read_text().strip() == lease.nonce
        assert is_locked(lease.path)
        home = lease.path.parent.parent
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE(lease.path.stat().st_mode) == 0o644
        mount = lease.mount()
        assert (mount.source, mount.target, mount.read_only) == (str(lease.path), TARGET, True)
    assert list(home.iterdir()) == []


def test_lease_labels_name_path_device_and_inode(tmp_path: Path) -> None:
    with Lease(tmp_path, run_id="r") as lease:
        labels = lease.labels("a task", 100)
        status = lease.path.stat()
        expected = {"path": str(lease.path), "dev": status.st_dev, "ino": status.st_ino}
        assert json.loads(labels[LABEL_LEASE]) == expected
        assert (labels[LABEL_RUN], labels[LABEL_TASK]) == ("r", "a task")
        assert 0 <= int(labels[LABEL_DEADLINE]) - time.time() <= 101
        assert lease.nonce not in json.dumps(labels)


def test_lease_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"warm-cache-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(PreflightError, match="XDG_RUNTIME_DIR"):
        Lease(tmp_path, run_id="r").__enter__()


def test_lease_directory_that_cannot_be_made_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PreflightError, match="Set XDG_RUNTIME_DIR"):
        Lease(tmp_path / "file", run_id="r").__enter__()
