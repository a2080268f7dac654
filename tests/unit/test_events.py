"""The codec of events: every event round-trips, and any other line is log."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builder import events
from tests.strategies import (
    EXAMPLES,
    FUZZ,
    NONCE,
    VERDICT,
    any_event,
    damaged,
    documents,
    line_of,
    lookalikes,
    written,
)

pytestmark = pytest.mark.timeout(120 + EXAMPLES * 0.2)


def assert_decoded(line: bytes) -> None:
    found = events.decode(line, NONCE)
    if found is not None:
        assert line.startswith(events.prefix(NONCE))
        assert events.decode(line_of(found), NONCE) == found


@FUZZ
@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda data: events.prefix(NONCE) + data),
        documents.flatmap(written).map(lambda data: events.prefix(NONCE) + data),
        st.just(VERDICT).flatmap(damaged),
        lookalikes,
    )
)
@example(VERDICT[:-1] + b"x")
@example(events.prefix(NONCE) + b'{"event":[]}')
@example(events.prefix(NONCE) + b'{"event":{}}')
@example(events.prefix(NONCE) + '{"event":"end"}'.encode("utf-16"))
def test_decode_any_line_is_event_or_log(line: bytes) -> None:
    assert_decoded(line)


@FUZZ
@given(any_event)
def test_event_round_trips(event: events.Event) -> None:
    line = line_of(event)
    assert line.count(b"\n") == 1
    assert events.decode(line, NONCE) == events.decode(line[:-1], NONCE) == event
    for size in range(len(line) - 1):
        assert events.decode(line[:size], NONCE) is None
    assert events.decode(line, NONCE[:-1]) is None
    assert events.decode(line, NONCE + "4") is None
