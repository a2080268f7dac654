"""The log, from frames to files: nothing lost, nothing twice, whatever breaks, lags, overflows or raises on the way."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import events
from builder.engine import log_pump, log_sinks
from builder.engine.api import ContainerSpec
from builder.engine.log_pump import Pump
from builder.engine.log_resume import Received, Resume, stored_form
from builder.engine.log_sinks import MAX_LINE, Display, Lines, LogFile, Sinks, Tail, show
from builder.engine.streams import BrokenFramesError, Demux
from builder.host.deadlines import Deadline, poll
from builder.text import readable
from tests.fakes import FakeContainer, FakeEngine
from tests.scripts import HANG, Step, command, err, leave, out, pause
from tests.strategies import FUZZ

NONCE = "cafe"


def frame(stream: int, data: bytes) -> bytes:
    return struct.pack(">BxxxL", stream, len(data)) + data


# --- frames ---


@FUZZ
@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40))),
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
def test_demux_cut_anywhere_gives_same_frames(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(frame(stream, payload) for stream, payload in sent)
    demux, got, at = Demux(), [], 0
    while at < len(data):
        size = cuts[at % len(cuts)]
        got += demux.pieces(memoryview(data)[at : at + size])
        at += size
    assert demux.between_frames
    told = [(stream, byte) for stream, payload in sent for byte in payload]
    assert [(stream, byte) for stream, piece in got for byte in piece] == told


@FUZZ
@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40))), st.integers(1, 50))
def test_demux_whole_frames_stay_whole(sent: list[tuple[int, bytes]], size: int) -> None:
    data = b"".join(frame(stream, payload) for stream, payload in sent)
    demux = Demux()
    assert [whole for at in range(0, len(data), size) for whole in demux.whole(data[at : at + size])] == sent


def test_demux_end_within_frame_is_noticed() -> None:
    demux = Demux()
    assert demux.pieces(frame(1, b"abcdef")[:-2]) == [(1, b"abcd")]
    assert not demux.between_frames


@pytest.mark.parametrize("data", [b"HTTP/1.1 500 x", b"\x07\0\0\0\0\0\0\x01x", b"\x01\0\x01\0\0\0\0\x01x"])
def test_demux_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(BrokenFramesError):
        Demux().pieces(data)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain\ttext ×", "plain\ttext ×"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x\x1b]8;;http://y\x1b\\z", "xz"),
        ("\x1b(Bx\x1b=y\x1bMz", "xyz"),
        ("a\x08b\x00c\x9bd", "a\ufffdb\ufffdc\ufffdd"),
        ("\x1b", "\ufffd"),
        ("\u202egnp.exe", "\ufffdgnp.exe"),
        ("a\nb", "a\ufffdb"),
    ],
)
def test_readable_removes_terminal_sequences(text: str, safe: str) -> None:
    assert readable(text) == safe


def test_shown_line_is_bounded() -> None:
    assert len(show(b"x" * (1 << 20))) < 2100
    assert show(b"caf\xc3\xa9 \xff") == "café \ufffd"


# --- lines ---


def reference(data: bytes) -> list[bytes]:
    """The lines of a stream, the slow way."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return lines if lines[-1] else lines[:-1]


@FUZZ
@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b"bc"])).map(b"".join), st.integers(1, 9))
def test_lines_split_at_newline_or_return(data: bytes, size: int) -> None:
    lines, regions = Lines(), []
    for at in range(0, len(data), size):
        region = lines.feed(data[at : at + size])
        assert not region or region.endswith(b"\n")
        regions.append(region)
    regions.append(lines.last())
    assert b"".join(regions).splitlines() == reference(data)


def test_lines_show_progress_bar_at_once() -> None:
    lines = Lines()
    assert lines.feed(b" 10%\r") == b" 10%\n"
    assert lines.feed(b" 20%\r") == b" 20%\n"
    assert lines.feed(b"\ndone\n") == b"done\n"


@pytest.mark.parametrize("size", [MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE + 7])
@pytest.mark.parametrize("chunk", [1 << 20, 100_003])
def test_lines_endless_are_cut_without_loss(size: int, chunk: int) -> None:
    data = random.Random(size).randbytes(size).replace(b"\n", b"x").replace(b"\r", b"y") + b"\nnext\n"
    lines = Lines()
    region = b"".join(lines.feed(data[at : at + chunk]) for at in range(0, len(data), chunk)) + lines.last()
    cut = region.split(b"\n")
    assert max(map(len, cut)) <= MAX_LINE
    assert cut[-2] == b"next"
    assert b"".join(cut[:-2]) == data[:-6]


# --- taking up the stored log ---


def stored(data: bytes) -> list[bytes]:
    """What the engine stores for these bytes of one stream; the contract tests prove it of the fake."""
    container = FakeContainer("x", ContainerSpec(image="i", name="n"))
    container.write(1, data)
    container.end(0)
    return [entry for _, entry in container.stored]


def take_up(received: Received, entries: list[bytes]) -> bytes:
    resume = Resume(received)
    return b"".join([*(resume.new(entry) for entry in entries), resume.end()])


def having(data: bytes, chunk: int = 1000) -> Received:
    received = Received()
    for at in range(0, len(data), chunk):
        received.add(data[at : at + chunk])
    return received


TEXT = st.lists(st.sampled_from(["", "a", "same", "same", "line €", "𝄞𝄞", "x\ry", "\ufffd"])).map("\n".join)


@FUZZ
@given(TEXT, st.data())
def test_resume_continues_at_last_byte(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    cut = data.draw(st.integers(0, len(whole)))
    assert whole[:cut] + take_up(having(whole[:cut]), stored(whole)) == whole


@FUZZ
@given(
    st.lists(st.sampled_from([b"\n", b"a", b"\xff", "€".encode(), b"\xe2\x82", b"\xf0\x9f", b"\x80"])).map(b"".join),
    st.data(),
)
def test_resume_invalid_utf8_is_exact(whole: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(whole)))
    got = whole[:cut] + take_up(having(whole[:cut]), stored(whole))
    assert "".join(map(stored_form, got.splitlines(keepends=True))) == b"".join(stored(whole)).decode()


@pytest.mark.parametrize(
    "cut", [0, 1, 16383, 16384, 16385, 50_000, 1 << 20, (1 << 20) + 1, 2_200_000, 2_500_000, 2_500_001, 2_500_010]
)
def test_resume_within_long_line(cut: int) -> None:
    whole = b"first\n" + b"0123456789" * 250_000 + b"\nlast line"
    assert whole[:cut] + take_up(having(whole[:cut]), stored(whole)) == whole


def test_resume_character_split_over_pieces() -> None:
    line = b"-" * 16383 + "€".encode() + b"tail\n"
    cut = len(line) - 3
    assert take_up(having(line[:cut]), stored(line)) == line[cut:]


def test_resume_counts_lines_and_compares_last() -> None:
    whole = b"".join(b"line %d\n" % number for number in range(50_000))
    cut = 400_001
    assert whole[:cut] + take_up(having(whole[:cut], 32768), stored(whole)) == whole


def test_resume_with_lines_not_stored_loses_no_later_line() -> None:
    lines = [b"line %d\n" % number for number in range(3000)]
    received = having(b"".join(lines[:2000]) + b"line 20")
    kept = lines[:1990] + lines[2001:]
    assert take_up(received, kept) == b"".join(lines[2001:])


def test_resume_shorter_stored_log_repeats_nothing() -> None:
    whole = b"a\nb\nc and more"
    for stop in range(len(whole)):
        assert take_up(having(whole), stored(whole[:stop])) == b"", stop


def test_resume_memory_is_bounded() -> None:
    received = Received()
    for _ in range(100):
        received.add(b"x" * 60_000)
        received.add(b"y\n" * 5000)
    assert sum(map(len, received.recent_lines())) < 200_000
    assert received.bytes == 100 * 70_000
    endless = having(b"z" * (5 << 20), 1 << 18)
    assert len(endless.partial) <= 1 << 20
    assert endless.cut + len(endless.partial) == 5 << 20


@settings(FUZZ, max_examples=30)
@given(st.integers(0, 400), st.integers(1, 200))
def test_resume_recognises_same_end(lines: int, tail: int) -> None:
    whole = b"".join(b"line %d\n" % number for number in range(lines)) + b"rest"
    entries = b"".join(stored(whole)[-tail:])
    assert having(whole).ends_like(entries)
    assert not having(whole[:-1]).ends_like(entries)


# --- sinks ---


def test_log_file_lines_name_their_stream(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "log")
    file.open()
    file.write("out", b"a\n\nb\xff\n")
    file.write("err", b"c\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"out| a\nout| \nout| b\xff\nerr| c\n"
    assert not file.problem


def test_log_file_on_full_disk_is_one_problem() -> None:
    file = LogFile(Path("/dev/full"))
    file.open()
    file.write("out", b"a\n")
    file.write("out", b"b\n")
    file.close()
    assert file.problem == "the log /dev/full is not complete: No space left on device"


def test_log_file_that_hangs_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sinks, "PATIENCE", 0.1)
    monkeypatch.setattr(log_sinks, "_BACKLOG", 1 << 10)
    os.mkfifo(tmp_path / "log")
    file, began = LogFile(tmp_path / "log"), time.monotonic()
    file.open()
    for _ in range(100):
        file.write("out", b"x" * 999 + b"\n")
    file.close(0.1)
    assert file.problem == f"the log {tmp_path}/log is not complete: its place took no more bytes in time"
    assert time.monotonic() - began < 5
    os.close(os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK))


def test_tail_is_last_lines_and_bounded() -> None:
    tail = Tail(3)
    tail.add(b"1\n")
    tail.add(b"2\n3\n\x1b[1m4\n")
    assert tail.lines() == ["2", "3", "4"]
    tail.add(b"x" * MAX_LINE + b"\n")
    assert len(tail.lines()[-1]) < 3000


def test_slow_display_drops_lines_and_reports_it() -> None:
    go, shown = threading.Event(), []

    def show_line(stream: str, line: str) -> None:
        go.wait(10)
        shown.append((stream, line))

    display = Display(show_line)
    display.open()
    region = b"x" * 99 + b"\n"
    for _ in range(100):
        display.add("out", region * 1000)
    go.set()
    display.close(10)
    lines = [line for stream, line in shown if stream == "out"]
    notes = [line for stream, line in shown if stream == "note"]
    dropped = sum(int(note.split()[0]) for note in notes)
    assert dropped > 0
    assert len(lines) + dropped == 100_000
    assert not display.problem


def test_raising_display_is_one_problem() -> None:
    def show_line(stream: str, line: str) -> None:
        raise BrokenPipeError("gone")

    display = Display(show_line)
    display.open()
    display.add("out", b"x\n")
    display.close(5)
    display.add("out", b"y\n")
    assert "BrokenPipeError" in display.problem


def test_hanging_display_does_not_block_the_end() -> None:
    stuck = threading.Event()

    def show_line(stream: str, line: str) -> None:
        stuck.wait(10)

    display = Display(show_line)
    display.open()
    display.add("out", b"x\n")
    display.close(0.05)
    stuck.set()
    assert "took no more lines" in display.problem


# --- the pump ---


class Bench:
    def __init__(self, tmp_path: Path) -> None:
        self.engine = FakeEngine()
        self.path = tmp_path / "log"
        self.shown: list[tuple[str, str]] = []
        self.heard: list[Any] = []

    def pump(self, *steps: Step, **more: Any) -> tuple[Pump, FakeContainer]:
        container = self.engine.create(ContainerSpec(image="tiny:1", name=os.urandom(4).hex(), command=command(*steps)))
        sinks = Sinks(log_path=self.path, display=lambda stream, line: self.shown.append((stream, line)))
        pump = Pump(self.engine, container, nonce=NONCE, **{"sinks": sinks, "on_event": self.heard.append, **more})
        pump.attach()
        pump.start()
        self.engine.calls.clear()
        return pump, self.engine.all[container]

    def run(self, *steps: Step, **more: Any) -> Pump:
        pump, container = self.pump(*steps, **more)
        self.engine.start(container.id)
        assert container.ended.wait(10)
        pump.finish(Deadline(10))
        return pump

    def log(self) -> dict[str, bytes]:
        """Each stream's lines as the file has them."""
        found = {"out": b"", "err": b""}
        for line in self.path.read_bytes().splitlines(keepends=True):
            found[line[:3].decode()] += line[5:]
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.engine.lost = False
    for container in list(made.engine.all):
        made.engine.remove(container, force=True)


def line(event: events.Event) -> bytes:
    return events.encode(NONCE, event)


VERDICT = line(events.Verdict(state="warmed"))


def progress(done: int) -> bytes:
    return line(events.Progress(done=done, total=9, unit="kernels"))


def counts(**families: int) -> bytes:
    return line(events.EntryCounts(families, {}))


def test_pump_delivers_last_line_without_newline(bench: Bench) -> None:
    pump = bench.run(out("a\n"), err(b"\xff\n"), out("b"), leave(0))
    assert bench.log() == {"out": b"a\nb\n", "err": b"\xff\n"}
    assert pump.complete
    assert sorted(bench.shown) == [("err", "\ufffd"), ("out", "a"), ("out", "b")]
    assert sorted(pump.tail) == ["a", "b", "\ufffd"]
    assert pump.problems == []


def test_pump_events_are_not_in_the_log(bench: Bench) -> None:
    lines = b"one\n" + line(events.Phase("x")) + b"two\n" + VERDICT + b"three\n"
    pump = bench.run(out(lines[:20]), out(lines[20:]), leave(0))
    assert bench.log()["out"] == b"one\ntwo\nthree\n"
    assert bench.heard == [events.Phase("x"), events.Verdict(state="warmed")]
    assert pump.events == bench.heard


@pytest.mark.parametrize(
    "text",
    [
        b"@warmup other " + b'{"event":"verdict"}\n',
        b" " + VERDICT,
        b"@warmup cafe {not json\n",
        b'@warmup cafe {"event":"unknown"}\n',
        b'@warmup cafe {"event":"phase"}\n',
        b'@warmup cafe {"event":"phase","phase":1}\n',
        b'@warmup cafe {"event":"phase","phase":"x","more":1}\n',
        b'@warmup cafe {"event":"progress","done":1.5,"total":2,"unit":"x"}\n',
        b'@warmup cafe {"event":"end","stdout":true,"stderr":0}\n',
        b'@warmup cafe {"event":"end","stdout":99999999999999999999,"stderr":0}\n',
        b'@warmup cafe {"event":"entry_counts","families":{"triton":"3"},"added":{}}\n',
        b'@warmup cafe {"event":"verdict","state":"fine"}\n',
        b'@warmup cafe {"event":"verdict","seconds":NaN}\n',
        b"@warmup cafe []\n",
    ],
)
def test_malformed_event_is_log(bench: Bench, text: bytes) -> None:
    pump = bench.run(out(b"before\n" + text + b"after\n"), leave(0))
    assert bench.log()["out"] == b"before\n" + text + b"after\n"
    assert pump.events == []


def test_pump_stderr_has_no_events(bench: Bench) -> None:
    assert bench.run(err(VERDICT), leave(0)).events == []


def test_pump_byte_count_proves_the_log(bench: Bench) -> None:
    data, errors = b"x\n" * 1000 + line(events.Phase("p")), b"y\r" * 10
    pump = bench.run(out(data), err(errors), out(line(events.End(len(data), len(errors)))), leave(0))
    assert pump.complete
    assert "log_frames" not in bench.engine.calls


@pytest.mark.parametrize("end", [events.End(5, 0), events.End(2, 1)])
def test_pump_other_byte_count_reads_stored_log(bench: Bench, end: events.End) -> None:
    pump = bench.run(out(b"x\n"), out(line(end)), leave(0))
    assert "log_frames" in bench.engine.calls
    assert pump.complete
    assert bench.log()["out"] == b"x\n"


def test_pump_broken_attachment_loses_and_doubles_nothing(bench: Bench) -> None:
    first, second = b"".join(b"line %d\n" % number for number in range(2000)), b"and\nmore\nwithout end"
    pump, container = bench.pump(out(first + b"half a li"), pause(0.3), out(b"ne\n" + second), leave(0))
    bench.engine.start(container.id)
    assert poll(lambda: pump.received == len(first) + 9, Deadline(5), every=0.001)
    for output in container.outputs:
        output.sendall(frame(1, b"ne\n")[:-1])  # the connection ends within a frame
    container.cut()
    assert container.ended.wait(5)
    pump.finish(Deadline(10))
    assert bench.log()["out"] == first + b"half a line\n" + second + b"\n"
    assert pump.complete


def test_pump_broken_attachment_follows_running_container(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_pump, "_EXIT_LAG", 0.1)
    pump, container = bench.pump(out("before\n"), HANG)
    bench.engine.start(container.id)
    assert poll(lambda: pump.received, Deadline(5), every=0.001)
    container.cut()
    container.write(1, b"meanwhile\n")
    assert poll(lambda: ("out", "meanwhile") in bench.shown, Deadline(5), every=0.005), "nothing follows"
    container.write(2, b"later\n")
    assert poll(lambda: ("err", "later") in bench.shown, Deadline(5), every=0.005)
    container.end(0)
    pump.finish(Deadline(5))
    assert bench.log() == {"out": b"before\nmeanwhile\n", "err": b"later\n"}
    assert pump.complete


def test_pump_unreachable_end_is_a_problem(bench: Bench) -> None:
    pump, container = bench.pump(out("a\n"), leave(0))
    bench.engine.start(container.id)
    assert container.ended.wait(5)
    bench.engine.lost = True
    pump.finish(Deadline(0.5))
    assert not pump.complete
    assert any("the engine is away" in problem for problem in pump.problems)
    assert bench.log()["out"] == b"a\n"


def test_pump_failing_log_file_goes_on_draining(bench: Bench) -> None:
    sinks = Sinks(log_path=Path("/dev/full"), display=lambda stream, line: bench.shown.append((stream, line)))
    pump = bench.run(out(b"x\n" * 200_000), out("last\n"), leave(0), sinks=sinks)
    assert pump.received == 400_005
    assert pump.tail[-1] == "last"
    problem = "the log /dev/full is not complete: No space left on device"
    assert pump.problems == [problem]
    assert bench.shown.count(("note", problem)) == 1


def test_pump_hanging_log_file_ends_in_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_pump, "CLOSING", 0.1)
    monkeypatch.setattr(log_sinks, "_BACKLOG", 1 << 10)
    os.mkfifo(bench.path)
    pump, container = bench.pump(out(b"x\n" * 200_000), HANG)
    bench.engine.start(container.id)
    assert poll(lambda: pump.received, Deadline(5), every=0.001)
    container.end(0)
    began = time.monotonic()
    pump.finish(Deadline(0.2))
    assert time.monotonic() - began < 3
    problem = f"the log {bench.path} is not complete: its place took no more bytes in time"
    assert problem in pump.problems
    assert bench.shown.count(("note", problem)) == 1
    os.close(os.open(bench.path, os.O_RDONLY | os.O_NONBLOCK))


def test_pump_raising_callback_goes_on_draining(bench: Bench) -> None:
    def listen(heard: Any) -> None:
        raise RuntimeError("no")

    pump = bench.run(out(line(events.Phase("x")) + b"after\n"), leave(0), on_event=listen)
    assert bench.log()["out"] == b"after\n"
    assert pump.problems == ["handling the event 'phase' failed: RuntimeError: no"]


def test_pump_of_created_container_is_empty(bench: Bench) -> None:
    pump, _ = bench.pump(out("x"))
    pump.finish(Deadline(5), ran=False)
    assert bench.path.read_bytes() == b""
    assert not pump.complete


def feed(pump: Pump, data: bytes) -> bool:
    """Whether these bytes were a sign of life."""
    pump.last_output = 0.0
    pump._feed(1, data)
    return pump.last_output > 0


def test_pump_last_output_time_moves(bench: Bench) -> None:
    pump, _ = bench.pump()
    assert feed(pump, b"log\n")
    assert feed(pump, b"part of a line")
    assert feed(pump, b"\n")
    assert not feed(pump, line(events.Started(1, "flock", {}, "t")))
    assert feed(pump, progress(1))
    assert not feed(pump, progress(1))
    assert feed(pump, progress(2))
    assert feed(pump, counts(triton=3))
    assert not feed(pump, counts(triton=3, cuda=0))
    assert feed(pump, counts(triton=3, cuda=1))
    assert not feed(pump, line(events.Phase("again")))
    assert feed(pump, progress(1))
    half = progress(1)
    assert not feed(pump, half[:20])
    assert not feed(pump, half[20:])
    pump.finish(Deadline(1), ran=False)


def test_pump_keeps_one_progress_event(bench: Bench) -> None:
    lines = b"".join(map(progress, range(5000)))
    pump = bench.run(out(lines + VERDICT), leave(0))
    assert pump.events == [events.Progress(4999, 9, "kernels"), events.Verdict(state="warmed")]
