"""What readers promise about anything at all: garbage, truncations, and valid documents with a few things wrong.

Each reader has its documented ways to say no; no other exception, no hang, and no text that a terminal cannot show.

``WARM_CACHE_EXAMPLES`` is the number of examples for each property: 100 unless it says otherwise (the whole file then
takes seconds), 10000 in the long mode::

    WARM_CACHE_EXAMPLES=10000 pytest tests/unit
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder import events
from builder.engine import log_sinks
from builder.engine.api import Attachment, ContainerSpec, State
from builder.engine.errors import NotFoundError
from builder.engine.log_pump import Pump
from builder.engine.log_resume import stored_form
from builder.engine.log_sinks import Lines, Sinks
from builder.engine.streams import BrokenFramesError, Demux
from builder.errors import EngineLostError
from builder.host.deadlines import Deadline
from tests.fakes import FakeContainer
from tests.strategies import (
    EXAMPLES,
    FUZZ,
    NONCE,
    PHASE,
    VERDICT,
    any_event,
    chunked,
    damaged,
    harmless,
    line_of,
    lookalikes,
)

#: For properties that run a whole pump.
RUNS = settings(FUZZ, max_examples=max(1, EXAMPLES // 3))

pytestmark = pytest.mark.timeout(120 + EXAMPLES * 0.2)


def frame(stream: int, data: bytes) -> bytes:
    return struct.pack(">BxxxL", stream, len(data)) + data


PIECES = [
    b"\n", b"\n", b"\r", b"\r\n", b"\n\r", b"", b"a", b"line", b"\xff", "é€𝄞".encode(), b"\xe2\x82", b"\xf0\x9f", b"\0",
    b"\x1b[31m", b"x" * 300, b"y" * 17_000, events.prefix(NONCE), b"@warmup other {}",
    b"\n" + PHASE,
    b"\n" + line_of(events.Progress(1, 2, "x")), b"\n" + events.prefix(NONCE) + b'{"event":[]}\n',
    b"\n" + PHASE[:-1] + b"\r\n", b" " + VERDICT, VERDICT[:20],
]  # fmt: skip

sizes = st.lists(
    st.one_of(st.integers(1, 9), st.sampled_from([64, 1000, 16_384, 1 << 20])), min_size=1, max_size=6
)  # fmt: skip
writes = st.lists(
    st.tuples(
        st.sampled_from([1, 1, 2]),
        st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)), max_size=6).map(b"".join),
    ),
    max_size=8,
)
Writes = Sequence[tuple[int, bytes]]


def lines_of(data: bytes, limit: int) -> list[bytes]:
    """The lines of a stream, the slow way: what ends with newline or return, in pieces of this size."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line[at : at + limit] for line in lines for at in range(0, len(line) or 1, limit)]


def expected(data: bytes, stream: int, limit: int = log_sinks.MAX_LINE) -> tuple[list[bytes], list[Any]]:
    """What a stream is in the end: lines of log, and events."""
    log, heard = [], []
    lines = lines_of(data, limit)
    for number, line in enumerate(lines, start=1):
        ended = number < len(lines) or data.endswith((b"\n", b"\r"))
        found = events.decode(line, NONCE) if stream == 1 and ended else None
        if found is None:
            log.append(line)
        else:
            heard.append(found)
    return log, heard


class Wire:
    """An attachment that gives these bytes in these chunks, and then ends or breaks."""

    def __init__(self, chunks: Sequence[bytes], error: OSError | None) -> None:
        self._chunks = list(chunks)[::-1]
        self._error = error

    def readinto(self, buffer: memoryview) -> int:
        if not self._chunks:
            if self._error:
                raise self._error
            return 0
        chunk = self._chunks.pop()
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        """Nothing is held."""


class Ended:
    """An engine whose container is over, with this attachment and this stored log."""

    def __init__(self, wire: Wire, stored: Sequence[tuple[int, bytes] | Exception]) -> None:
        self._wire = wire
        self._stored = stored

    def attach_output(self, container: str) -> Attachment:
        return self._wire

    def state(self, container: str) -> State:
        return State("exited", 0)

    def log_frames(self, container: str, *, follow: bool, tail: int | None = None) -> Iterator[tuple[int, bytes]]:
        for entry in self._stored if tail is None else self._stored[-tail:]:
            if isinstance(entry, Exception):
                raise entry
            yield entry


def drain(
    place: Path, wire: Wire, stored: Sequence[tuple[int, bytes] | Exception]
) -> tuple[Pump, dict[int, list[bytes]]]:
    """A pump that has finished, and each stream's lines in its log file."""
    path = place / "log"
    engine: Any = Ended(wire, stored)
    pump = Pump(engine, "c" * 64, nonce=NONCE, sinks=Sinks(log_path=path))
    pump.attach()
    pump.start()
    pump.finish(Deadline(10))
    found: dict[int, list[bytes]] = {1: [], 2: []}
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    for line in text.split(b"\n")[:-1]:
        assert line[:5] in (b"out| ", b"err| ")
        found[1 if line.startswith(b"out") else 2].append(line[5:])
    assert all(harmless(re.sub("[\t\u2028\u2029]", " ", line)) for line in pump.tail)  # which steer nothing
    assert len(pump.tail) <= log_sinks.TAIL_LINES
    return pump, found


def streams(sent: Writes) -> dict[int, bytes]:
    return {stream: b"".join(data for number, data in sent if number == stream) for stream in (1, 2)}


def stored(sent: Writes) -> list[tuple[int, bytes]]:
    """What the engine stores; the contract tests prove it of the fake."""
    container = FakeContainer("x", ContainerSpec(image="i", name="n"))
    for stream, data in sent:
        container.write(stream, data)
    container.end(0)
    return container.stored


def counted(sent: Writes) -> Writes:
    """With the event at the end that counts what went before."""
    whole = streams(sent)
    newline = b"" if not whole[1] or whole[1].endswith(b"\n") else b"\n"
    end = line_of(events.End(len(whole[1] + newline), len(whole[2])))
    return [*sent, (1, newline), (1, end)]


@RUNS
@given(writes, sizes, st.booleans())
@example([(1, b"\xef")], [1], False)
@example([(2, b"\n\xef\xbf")], [1], False)
def test_log_equals_written_for_any_chunks(place: Path, sent: Writes, cuts: list[int], end: bool) -> None:
    sent = counted(sent) if end else sent
    data = b"".join(frame(stream, payload) for stream, payload in sent)
    pump, found = drain(place, Wire(chunked(data, cuts), None), stored(sent))
    assert pump.complete
    assert pump.problems == []
    for stream, whole in streams(sent).items():
        log, heard = expected(whole, stream)
        assert found[stream] == log
        assert stream == 2 or [kept for kept in pump.events if not isinstance(kept, events.Progress)] == [
            kept for kept in heard if not isinstance(kept, events.Progress)
        ]
    assert pump.received == sum(len(payload) for _, payload in sent)


@RUNS
@given(writes, sizes, st.integers(0, 1 << 20), st.sampled_from([None, ConnectionResetError()]), st.booleans())
def test_log_equals_written_for_any_break(
    place: Path, sent: Writes, cuts: list[int], cut: int, error: OSError | None, garbage: bool
) -> None:
    if any(len(line) > 16_000 for whole in streams(sent).values() for line in whole.split(b"\n")):
        # The engine cuts such lines into pieces, and characters with them: test_logs.py follows those.
        sent = [(stream, data.decode("ascii", "replace").replace("\ufffd", "?").encode()) for stream, data in sent]
    frames = [frame(stream, payload) for stream, payload in sent]
    raw = b"".join(frames)
    cut %= len(raw) + 1
    chunks = chunked(raw[:cut], cuts)
    if garbage and cut in [len(b"".join(frames[:number])) for number in range(len(frames) + 1)]:
        chunks.append(b"\x09\0\0\0\0\0\0\0HTTP/1.1")
    pump, found = drain(place, Wire(chunks, error), stored(sent))
    assert pump.complete
    assert pump.problems == []
    for stream, whole in streams(sent).items():
        log, _ = expected(whole, stream)
        assert list(map(stored_form, found[stream])) == list(map(stored_form, log))


@RUNS
@given(
    writes,
    sizes,
    st.data(),
    st.sampled_from([None, EngineLostError("away"), NotFoundError("no such container")]),
)
def test_pump_survives_damaged_connection(
    place: Path, sent: Writes, cuts: list[int], data: st.DataObject, error: Exception | None
) -> None:
    raw = data.draw(damaged(b"".join(frame(stream, payload) for stream, payload in sent)))
    entries: list[Any] = list(stored(sent))
    if error is not None:
        entries[data.draw(st.integers(0, len(entries))) :] = [error]
    pump, _ = drain(place, Wire(chunked(raw, cuts), None), entries)
    assert pump.complete or any(problem.startswith("the end of the log could not be read") for problem in pump.problems)
    assert all(map(harmless, pump.problems))


@RUNS
@given(st.lists(any_event.map(line_of) | lookalikes, max_size=6))
def test_pump_survives_any_event(place: Path, lines: list[bytes]) -> None:
    sent = [(1, line) for line in lines]
    pump, found = drain(place, Wire([frame(*write) for write in sent], None), stored(sent))
    assert pump.problems == []
    assert found == {1: [line.rstrip(b"\n") for line in lines if events.decode(line, NONCE) is None], 2: []}
    assert len(pump.events) + len(found[1]) <= len(lines)


@FUZZ
@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b"bc", b"d" * 9])).map(b"".join), sizes)
def test_lines_are_independent_of_chunks_and_bounded(data: bytes, cuts: list[int]) -> None:
    with mock.patch.object(log_sinks, "MAX_LINE", 8):
        lines, region = Lines(), b""
        for chunk in chunked(data, [min(size, 8) for size in cuts]):
            region += lines.feed(chunk)
            assert region.endswith(b"\n") or not region
            assert len(lines.rest) <= 8
        region += lines.last()
    assert region.split(b"\n")[:-1] == lines_of(data, 8)


def demuxed(chunks: Sequence[bytes]) -> tuple[dict[int, bytes], bool, bool]:
    """Output by stream, whether that was all the engine's format, and whether it ended between frames."""
    demux, got = Demux(), dict.fromkeys(range(4), b"")
    try:
        for chunk in chunks:
            for stream, data in demux.pieces(memoryview(chunk)):
                got[stream] += data
    except BrokenFramesError:
        return got, False, False
    return got, True, demux.between_frames


def framed(chunks: Sequence[bytes]) -> tuple[list[tuple[int, bytes]], bool]:
    """Whole frames, and whether that was all the engine's format."""
    demux, got = Demux(), []
    try:
        for chunk in chunks:
            for found in demux.whole(chunk):
                got.append(found)  # noqa: PERF402 - what came before an exception counts
    except BrokenFramesError:
        return got, False
    return got, True


@FUZZ
@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=20)), max_size=5)
        .map(lambda sent: b"".join(frame(*write) for write in sent))
        .flatmap(lambda data: st.one_of(st.just(data), damaged(data))),
    ),
    sizes,
)
def test_frames_are_independent_of_chunks(data: bytes, cuts: list[int]) -> None:
    got, sound, between = demuxed(chunked(data, cuts))
    slow, slow_sound, slow_between = demuxed(chunked(data, [1]))
    assert (sound, between) == (slow_sound, slow_between)
    # Of what breaks off, the rest is read from the stored log: only what came may not differ.
    assert all(slow[stream].startswith(got[stream]) for stream in got)
    assert got == slow or not sound
    assert framed(chunked(data, cuts)) == framed(chunked(data, [1]))
    whole, whole_sound = framed([data])
    assert (whole, whole_sound) == framed(chunked(data, cuts))
    if sound and between:
        assert b"".join(frame(*found) for found in whole) == data


def test_frame_claiming_huge_length_is_refused() -> None:
    for take in (Demux().pieces, lambda data: list(Demux().whole(data))):
        with pytest.raises(BrokenFramesError):
            take(struct.pack(">BxxxL", 1, 0xFFFFFFFF))
