"""Leases between processes: freed with their holder, not kept by its children, never swept while they are held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from builder.engine.api import ContainerSpec
from builder.engine.lease import LABEL_LEASE, Lease
from builder.engine.sweep import sweep
from builder.host.deadlines import Deadline, poll
from tests.fakes import FakeEngine, is_locked


def killed_owners_labels(state: Path, *, lifetime: float = 3600, engine: str = "") -> dict[str, str]:
    """The labels of a builder that was killed while it held its lease."""
    code = (
        "import json, os, sys; from pathlib import Path; from builder.engine.lease import Lease\n"
        "lease = Lease(Path(sys.argv[1]), run_id='dead', engine=sys.argv[3]).__enter__()\n"
        "print(json.dumps(lease.labels('task', float(sys.argv[2]))), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(state), str(lifetime), engine]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    labels: dict[str, str] = json.loads(done.stdout)
    return labels


def test_lease_is_not_inherited_by_children(tmp_path: Path) -> None:
    lease = Lease(tmp_path, run_id="r").__enter__()
    lease.keep = True
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        lease.__exit__()
        # The kernel closes the child's copies one by one, so that the child may run a moment before the last.
        assert poll(lambda: not is_locked(lease.path), Deadline(5), every=0.01)
        child.communicate(b"\n")


def test_sweep_concurrent_builders_never_sweep_each_other(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from builder.engine.lease import Lease\n"
        "from builder.engine.sweep import sweep\n"
        "sys.path.insert(0, sys.argv[2]); from tests.fakes import FakeEngine\n"
        "for _ in range(60):\n"
        "    with Lease(Path(sys.argv[1]), run_id='r') as lease:\n"
        "        sweep(FakeEngine(), Path(sys.argv[1]))\n"
        "        assert lease.path.read_text().strip() == lease.nonce\n"
    )
    root = Path(__file__).parents[2]
    builders = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(root)]) for _ in range(4)]
    assert [builder.wait(60) for builder in builders] == [0] * 4


def test_sweep_container_of_killed_builder_is_removed(tmp_path: Path) -> None:
    labels = killed_owners_labels(tmp_path)
    engine = FakeEngine()
    engine.create(ContainerSpec(image="tiny:1", name="orphan", labels=labels))
    (swept,) = sweep(engine, tmp_path)
    assert (swept.name, swept.removed) == ("orphan", True)
    assert not Path(json.loads(labels[LABEL_LEASE])["path"]).parent.exists()
