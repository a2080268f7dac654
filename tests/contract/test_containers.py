"""The same assertions on the fake engine and on the real one, so that the fake cannot drift from what it stands for."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from builder.engine.api import Containers, ContainerSpec, Mount, State
from builder.engine.errors import NotFoundError
from builder.errors import EngineRefusedError
from builder.host.deadlines import Deadline, poll
from tests.fakes import FakeEngine
from tests.scripts import HANG, LABEL, READ, Step, command, err, leave, on_term, out


@dataclass
class Bench:
    """One engine, and everything that a test made on it."""

    engine: Containers
    image: str
    made: list[str] = field(default_factory=list)

    def create(self, *steps: Step, **more: Any) -> str:
        spec = ContainerSpec(
            **{
                "image": self.image,
                "name": f"contract-{os.urandom(6).hex()}",
                "command": command(*steps),
                "labels": {LABEL: "contract"},
                "network": "none",
                "ulimits": {},
                **more,
            }
        )
        container = self.engine.create(spec)
        self.made.append(container)
        return container

    def over(self, container: str) -> State:
        def ended() -> State | None:
            state = self.engine.state(container)
            return state if state.finished else None

        state = poll(ended, Deadline(10), every=0.02)
        assert state, "it did not end"
        return state

    def stored(self, container: str, **how: Any) -> dict[int, bytes]:
        found = {1: b"", 2: b""}
        for stream, entry in self.engine.log_frames(container, **{"follow": False, **how}):
            found[stream] += entry
        return found


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.engine)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    if request.param == "fake":
        yield Bench(FakeEngine(["tiny:1"]), "tiny:1")
        return
    made = Bench(request.getfixturevalue("engine"), request.getfixturevalue("tiny_image"))
    yield made
    for container in made.made:
        made.engine.remove(container, force=True)


def everything(attachment: Any) -> bytes:
    data, buffer = b"", bytearray(1 << 16)
    while size := attachment.readinto(memoryview(buffer)):
        data += buffer[:size]
    attachment.close()
    return data


def frames(data: bytes) -> dict[int, bytes]:
    found, at = {1: b"", 2: b""}, 0
    while at < len(data):
        stream, size = struct.unpack_from(">BxxxL", data, at)
        found[stream] += data[at + 8 : at + 8 + size]
        at += 8 + size
    return found


def test_created_container_is_not_running(bench: Bench) -> None:
    container = bench.create(leave(3))
    assert bench.engine.state(container).status == "created"
    assert not bench.engine.state(container).finished
    bench.engine.start(container)
    assert bench.over(container).exit_code == 3


def test_attachment_before_start_gets_every_byte(bench: Bench) -> None:
    data = b"a\r\xff\xfe\n" * 5000 + b"no newline"
    container = bench.create(out(data), err("other\n"), leave(0))
    attachment = bench.engine.attach_output(container)
    bench.engine.start(container)
    assert frames(everything(attachment)) == {1: data, 2: b"other\n"}


def test_stored_log_replaces_every_invalid_byte(bench: Bench) -> None:
    euro = "€".encode()
    data = b"x\xffy\xe2\x82z\n" + b"-" * (16384 - 1) + euro + b"\n" + euro + b" end"
    container = bench.create(out(data), leave(0))
    bench.engine.start(container)
    bench.over(container)
    bad = "\ufffd"
    assert bench.stored(container)[1].decode() == f"x{bad}y{bad}{bad}z\n" + "-" * 16383 + bad * 3 + "\n€ end"


def test_stored_log_splits_long_lines(bench: Bench) -> None:
    container = bench.create(out(b"z" * 40000 + b"\nlast"), leave(0))
    bench.engine.start(container)
    bench.over(container)
    entries = [entry for _, entry in bench.engine.log_frames(container, follow=False)]
    assert [len(entry) for entry in entries] == [16384, 16384, 40000 - 2 * 16384 + 1, 4]
    assert [entry for _, entry in bench.engine.log_frames(container, follow=False, tail=1)] == [b"last"]


def test_follow_ends_with_container(bench: Bench) -> None:
    container = bench.create(out("one\n"), READ, out("two\n"), leave(0), stdin=True)
    stdin = bench.engine.attach_stdin(container)
    bench.engine.start(container)
    entries = bench.engine.log_frames(container, follow=True)
    assert next(entries) == (1, b"one\n")
    stdin.close()
    assert list(entries) == [(1, b"two\n")]
    assert bench.over(container).exit_code == 0


def test_stdin_attachment_closed_is_end_of_file(bench: Bench) -> None:
    container = bench.create(READ, leave(7), stdin=True)
    stdin = bench.engine.attach_stdin(container)
    bench.engine.start(container)
    assert bench.engine.state(container).status == "running"
    stdin.close()
    assert bench.over(container).exit_code == 7


@pytest.mark.parametrize(
    ("steps", "status"),
    [((HANG,), 143), ((on_term(0), HANG), 0), ((on_term(None), HANG), 137)],
    ids=["plain", "handler", "stubborn"],
)
def test_stop_ends_container(bench: Bench, steps: tuple[Step, ...], status: int) -> None:
    *before, last = steps
    container = bench.create(*before, out("ready\n"), last)
    attachment = bench.engine.attach_output(container)
    bench.engine.start(container)
    assert attachment.readinto(memoryview(bytearray(64)))
    bench.engine.stop(container, 1)
    assert bench.over(container).exit_code == status
    attachment.close()
    bench.engine.stop(container, 1)  # one that is over: nothing happens


def test_stop_of_created_container_does_nothing(bench: Bench) -> None:
    container = bench.create(leave(0))
    bench.engine.stop(container, 1)
    assert bench.engine.state(container).status == "created"


def test_remove_removes_container(bench: Bench) -> None:
    container = bench.create(out("ready\n"), HANG)
    bench.engine.start(container)
    with pytest.raises(EngineRefusedError) as refused:
        bench.engine.remove(container)
    assert refused.value.status == 409
    bench.engine.remove(container, force=True)
    with pytest.raises(NotFoundError):
        bench.engine.state(container)
    bench.engine.remove(container)  # gone already: nothing to do


def test_missing_container_is_not_found(bench: Bench) -> None:
    for question in (bench.engine.state, bench.engine.start, bench.engine.attach_output, bench.engine.attach_stdin):
        with pytest.raises(NotFoundError):
            question("0" * 64)
    with pytest.raises(NotFoundError):
        bench.engine.stop("0" * 64, 1)
    with pytest.raises(NotFoundError):
        bench.engine.log_frames("0" * 64, follow=False)


def test_start_of_missing_command_ends_at_once(bench: Bench) -> None:
    container = bench.create(command=["/no/such/program"])
    bench.engine.start(container)
    assert bench.over(container).exit_code == 127
    assert bench.stored(container)[2]


def test_start_refused_leaves_created_container(bench: Bench) -> None:
    with pytest.raises(EngineRefusedError):
        bench.engine.start(bench.create(leave(0), network="no-such-network"))
    for container in bench.made:  # newer engines refuse to create it
        assert bench.engine.state(container).status == "created"


def test_create_with_bad_spec_is_refused(bench: Bench, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(EngineRefusedError, match="bind source path does not exist") as refused:
        bench.create(leave(0), mounts=(Mount(missing, "/x"),))
    assert missing in refused.value.message
    with pytest.raises(NotFoundError, match="no-such-image:1"):
        bench.create(leave(0), image="no-such-image:1")
    name = f"contract-{os.urandom(6).hex()}"
    bench.create(leave(0), name=name)
    with pytest.raises(EngineRefusedError) as refused:
        bench.create(leave(0), name=name)
    assert refused.value.status == 409


def test_list_filters_by_label(bench: Bench) -> None:
    mark = os.urandom(6).hex()
    container = bench.create(leave(0), labels={LABEL: mark, "a": "b"})
    bench.create(leave(0), labels={LABEL: "other"})
    assert [found.id for found in bench.engine.containers([f"{LABEL}={mark}"])] == [container]
    found = next(found for found in bench.engine.containers([LABEL]) if found.id == container)
    assert (found.status, dict(found.labels)["a"]) == ("created", "b")
    assert found.name.startswith("contract-")
    assert bench.engine.containers([f"{LABEL}={mark}", "a=c"]) == []
