"""Faults of file systems that hang, while the real program runs: a FUSE server without an answer, as NFS without one.

A call on one cannot be interrupted by a handler of signals, so nothing but the program's end frees the thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.engine.api import ContainerSpec
from builder.engine.lease import LABEL_LEASE
from builder.host.deadlines import Deadline, poll
from tests.engine.cli import GATE, READY, Cli, command
from tests.engine.faults import Aftermath, changed

pytestmark = pytest.mark.engine

#: Less patience with a file system than the program has.
HURRIED = changed("from builder.host import stuck", "stuck.PATIENCE = 1.0")

Hang = Callable[[Path], None]


@pytest.fixture
def hang() -> Iterator[Hang]:
    """Lets a directory hang from then on, for every process of this machine that is no container."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as stack:

        def mount(place: Path) -> None:
            try:
                server = os.open("/dev/fuse", os.O_RDWR)
            except OSError as error:
                pytest.skip(f"a file system that hangs takes /dev/fuse: {error.strerror}")
            stack.callback(os.close, server)
            options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
            if libc.mount(b"fuse", os.fsencode(place), b"fuse", 0, options):
                pytest.skip(f"a mount takes root: {os.strerror(ctypes.get_errno())}")
            stack.callback(libc.umount2, os.fsencode(place), 2)  # MNT_DETACH

        yield mount


@pytest.mark.fault(
    "the cache's file system hangs",
    how="a FUSE server without an answer at the root, or in the middle of it at `markers`; a patience of 1 s "
    "instead of 20; each verb that reads a root",
    holds="12, in time, with the path; `hold` warns, and its command runs",
)
@pytest.mark.parametrize("below", ["", "markers"])
def test_cache_that_hangs_ends_every_verb(cli: Cli, hang: Hang, aftermath: Aftermath, below: str) -> None:
    cli.manifest(command("any", READY))
    cli.warm()
    hang(cli.root / below)
    aftermath.begins()
    verbs: list[tuple[str, ...]] = [("check", "--json"), ("warm", "--json")]
    if not below:
        verbs += [("env",), ("status",), ("verify",), ("view", "list"), ("check", "--here", "--cache", str(cli.root))]
    running = [cli.start(*verb, program=HURRIED) for verb in verbs]
    quick = ("-c", "from builder.cli.commands import hold; hold._FILES_TIMEOUT = 0.5; from builder import __main__; ")
    program = (sys.executable, quick[0], quick[1] + "raise SystemExit(__main__.main())")
    held = None if below else cli.start("hold", "--", "echo", "ran", program=program)
    ended = [builder.end(30) for builder in running]
    aftermath.clean()
    for verb, each in zip(verbs, ended, strict=True):
        assert each.status == 12, (verb, each.said)
        assert f"a file system has not answered for 1 s (in use: {cli.root / below}" in each.said, verb
        assert "--json" not in verb or each.document["exit"] == 12
    if held is not None:
        job = held.end(30)
        assert (job.status, job.out) == (0, "ran\n")
        assert f"the cache is not held: the file system of {cli.root} does not answer" in job.err


@pytest.mark.fault(
    "signal to the builder while the cache's file system hangs",
    how="a FUSE server without an answer at the root; SIGTERM",
    holds="143, within 5 s",
)
def test_signal_while_cache_hangs_ends_verb_in_time(cli: Cli, hang: Hang, aftermath: Aftermath) -> None:
    cli.manifest(command("any", READY))
    hang(cli.root)
    builder = cli.start("warm", "--json")
    status = Path(f"/proc/{builder.process.pid}/status")
    assert poll(lambda: "State:\tD" in status.read_text(), Deadline(20), every=0.02)
    builder.send(signal.SIGTERM)
    aftermath.begins()
    began = time.monotonic()
    ended = builder.end(20)
    aftermath.clean()
    assert (ended.status, ended.document["exit"]) == (143, 143)
    assert time.monotonic() - began < 5


@pytest.mark.fault(
    "the cache's file system hangs during a task",
    how="a FUSE server without an answer at `markers`, on the host alone; a patience of 1 s instead of 20",
    holds="12: its containers are stopped and removed; its lease is removed by the next sweep",
)
def test_cache_that_hangs_during_task_ends_run(cli: Cli, hang: Hang, aftermath: Aftermath) -> None:
    cli.manifest(command("slow", GATE + READY))
    builder = cli.start("warm", "--json", program=HURRIED)
    builder.says("command")
    hang(cli.root / "markers")
    aftermath.begins()
    (cli.root / "go").touch()
    ended = builder.end(30)
    aftermath.clean()
    with cli.engine() as engine:
        assert cli.containers(engine) == []
    assert ended.status == 12, ended.said
    assert f"(in use: {cli.root / 'markers'}" in ended.said
    assert ended.document["exit"] == 12


@pytest.mark.attack(
    "a container has the label of a lease whose path is on a file system that hangs",
    by="image",
    holds="it is not waited for longer than 3 s, and its container is named and left alone; what else is dead is swept",
)
def test_label_naming_file_system_that_hangs_delays_no_sweep(
    cli: Cli, hang: Hang, tmp_path: Path, tiny_image: str
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    cli.manifest(command("any", READY))
    cli.root.mkdir()
    label = {LABEL_LEASE: json.dumps({"path": f"{place}/warm-cache-0/held-x/lease", "dev": 1, "ino": 1})}
    with cli.engine() as engine:
        made = engine.create(ContainerSpec(image=tiny_image, name="forged", command=("true",), labels=label))
        hang(place)
        ended = cli.start("sweep", program=HURRIED).end(20)
        engine.remove(made, force=True)
    assert ended.status == 0, ended.said
    assert "left forged (?): its lease file cannot be seen from here" in ended.said
