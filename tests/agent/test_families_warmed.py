"""Every family of caches is filled below the root, counted, and free of what is true on one host alone."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import events
from builder.cache.families import FAMILIES, FAMILY
from tests.program import Program

PROBE = "gpu_p2p_access_cache_for_0,1,2,3,4,5,6,7.json"
WRITES_A_PROBE = (
    "import os, pathlib, sys, time\n"
    f"pathlib.Path(os.environ['SGLANG_CACHE_DIR'], {PROBE!r}).write_text('{{}}')\n"
    "if 'fail' in sys.argv: sys.exit(1)\n"
    "if 'wait' in sys.argv: time.sleep(600)\n"
)


def probes(program: Program) -> list[Path]:
    return list(program.root.glob("sglang_cache/*/gpu_p2p_access_cache_for_*"))


def test_serve_warms_every_family_and_counts_entries_and_bytes(program: Program) -> None:
    outside = {path for path in program.place.rglob("*") if program.root not in path.parents}
    done = program.run(program.task("all-families", recipe="serve"))
    verdict = done.verdict
    assert (done.status, verdict.proof) == (0, "verified"), verdict
    claimable = {family.name for family in FAMILIES if family.claimable}
    assert verdict.added.keys() == verdict.added_bytes.keys() == verdict.entries.keys() == claimable
    marker = json.loads((program.root / done.marker).read_text())
    for name, entries in marker["entries"].items():
        assert verdict.added[name] == len(entries) > 0, name
        base = program.root / name / marker["keys"][name]
        paths = [
            path for entry in entries for path in ([base / entry], (base / entry).rglob("*"))[(base / entry).is_dir()]
        ]
        assert verdict.added_bytes[name] == sum(path.stat().st_size for path in paths), name
    assert list(program.root.glob("cuda/*/0/1/0123")), "the driver's own cache is there as well, and claimed by nobody"
    assert not probes(program)
    made = {path.name for path in program.place.rglob("*") if program.root not in path.parents} - {
        p.name for p in outside
    }
    assert {name for name in made if not name.startswith("std")} == {program.root.name}, (
        "nothing went to a default place"
    )


def test_unclaimed_family_is_counted(program: Program) -> None:
    code = "import os, pathlib; pathlib.Path(os.environ['TILELANG_CACHE_DIR'], 'x').write_bytes(b'abc')"
    verdict = program.run(program.command(code, families=())).verdict
    assert (verdict.entries, verdict.added, verdict.added_bytes) == ({}, {"tilelang": 1}, {"tilelang": 3})


@pytest.mark.parametrize(("how", "status"), [("", 0), ("fail", 20), ("wait", 143)])
def test_host_specific_file_is_removed_on_every_exit(
    program: Program, until: Callable[..., None], how: str, status: int
) -> None:
    running = program.start(program.command(WRITES_A_PROBE, how))
    if how == "wait":
        until(lambda: probes(program), what="the probe")
        running.process.send_signal(signal.SIGTERM)
    assert running.end().status == status
    assert not probes(program)


def test_host_specific_file_in_use_stays_until_next_run(program: Program) -> None:
    assert program.run(program.command("pass")).status == 0
    (lock,) = program.root.glob("locks/sglang_cache-*.lock")
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert program.run(program.command(WRITES_A_PROBE)).status == 0
        assert probes(program)
    assert (
        program.run(
            program.command("import glob, os, sys; sys.exit(bool(glob.glob(os.environ['SGLANG_CACHE_DIR'] + '/*')))")
        ).status
        == 0
    )
    assert not probes(program)


def test_host_specific_file_is_removed_by_sweep(program: Program) -> None:
    start = program.run(program.command("pass")).all(events.Started)[0]
    family = FAMILY["sglang_cache"].name
    (program.root / family / start.family_keys[family] / PROBE).write_text("{}")
    assert program.run(None, mode="sweep").status == 0
    assert not probes(program)
