"""The log of a real container: every byte once, live, and whatever the reader or the connection does."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from builder.engine.client import Engine
from tests.engine.workshop import Proxy, Workshop, check, when_ready
from tests.scripts import HANG, err, leave, out, pause

pytestmark = pytest.mark.engine


FLOOD = """
line = "x" * 91
for start in range(0, 1000000, 1000):
    os.write(1, "".join("%08d%s\\n" % (number, line) for number in range(start, start + 1000)).encode())
    os.write(2, b"%d\\n" % start)
"""


@pytest.mark.timeout(120)
def test_million_lines_arrive_once_with_flat_memory(workshop: Workshop) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = workshop.run(source=FLOOD, display=lambda stream, line: None)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    check(outcome, "exited", 0)
    expected = iter(range(1_000_000))
    errors = []
    with workshop.log_path.open("rb") as file:
        for line in file:
            if line.startswith(b"out| "):
                assert int(line[5:13]) == next(expected)
                assert len(line) == 105
            else:
                errors.append(int(line[5:]))
    assert next(expected, None) is None
    assert errors == list(range(0, 1_000_000, 1000))
    assert grown < 64 << 10, f"memory grew by {grown} KiB"


def test_connection_cut_within_frame_loses_and_doubles_nothing(workshop: Workshop, proxy: Proxy) -> None:
    proxy.cut_after = 123_457
    source = """
for number in range(20000):
    os.write(1, b"line %d\\n" % number)
    if number == 15000:
        threading.Event().wait(1.5)
os.write(2, b"caf\\xc3\\xa9 without end")
"""
    with contextlib.closing(Engine(proxy.url).connect()) as engine:
        outcome = workshop.run(source=source, engine=engine)
    assert proxy.cuts == 1
    check(outcome, "exited", 0)
    expected = b"".join(b"line %d\n" % number for number in range(20000))
    assert workshop.log() == {"out": expected, "err": "café without end\n".encode()}


def test_attachment_silent_beyond_client_timeout_is_no_failure(workshop: Workshop, docker_host: str) -> None:
    with contextlib.closing(Engine(docker_host, timeout=1).connect()) as engine:
        outcome = workshop.run(out("a\n"), pause(2.5), out("b\n"), leave(0), engine=engine)
    check(outcome, "exited", 0)
    assert workshop.log()["out"] == b"a\nb\n"


def test_log_bytes_arrive_unchanged(workshop: Workshop) -> None:
    outcome = workshop.run(
        out(b"\xff\xfe caf\xc3"), pause(0.1), out(b"\xa9\n"), err(b" 10%\r 20%\r\n"), out(b"\x00\x1b[31mend"), leave(0)
    )
    check(outcome, "exited", 0)
    assert workshop.log() == {"out": b"\xff\xfe caf\xc3\xa9\n\x00\x1b[31mend\n", "err": b" 10%\n 20%\n"}
    assert "\ufffdend" in outcome.tail


def test_progress_bar_is_shown_while_it_moves(workshop: Workshop) -> None:
    thread = when_ready(workshop, lambda: workshop.cancel.set(signal.SIGTERM))
    outcome = workshop.run(out("ready\r"), HANG)
    thread.join(5)
    assert outcome.ended == "cancelled"


def test_slow_reader_blocks_neither_container_nor_engine(workshop: Workshop) -> None:
    stuck = threading.Event()
    outcome = workshop.run(
        source='for _ in range(300): os.write(1, b"y" * 99 + b"\\n" * 1)\nos.write(1, (b"z" * 99 + b"\\n") * 50000)',
        display=lambda stream, line: stuck.wait(60),
    )
    stuck.set()
    assert (outcome.ended, outcome.exit_code, outcome.log_complete) == ("exited", 0, True)
    assert workshop.log()["out"].count(b"\n") == 50_300
    assert outcome.problems == ["the display took no more lines; the log file has them"]
