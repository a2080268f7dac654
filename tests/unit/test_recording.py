"""Records of the launch recorder: they survive their line, and no other line is one."""

from __future__ import annotations

import json

import pytest

from builder.recording import FileEnd, Launch, Record, RecordingRequest, TestFile, Unrecorded, decode, encode

LAUNCH = Launch("TestIt.setUpClass", "test/a.py:7", "pd", "org/m", ("--tp", "8"), (("A", "1"),))


@pytest.mark.parametrize(
    "record",
    [LAUNCH, Unrecorded("skipped", "TestIt", "test/a.py:1", "why"), FileEnd(3, ("a.py",), ("b.py",), listed=True)],
)
def test_decode_returns_what_was_encoded(record: Record) -> None:
    line = encode(record)
    assert line.endswith(b"\n")
    assert decode(line) == record


@pytest.mark.parametrize(
    "change",
    [
        {"record": "launched"},
        {"record": ["launch"]},
        {"kind": "rocket"},
        {"model": None},
        {"argv": "--tp"},
        {"argv": [1]},
        {"env": [["A"]]},
        {"env": {"A": "1"}},
        {"test": "x" * 100_000},
        {"more": 1},
    ],
)
def test_decode_refuses_record_with_mistake(change: dict[str, object]) -> None:
    document = json.loads(encode(LAUNCH)) | change
    with pytest.raises(ValueError, match=r"."):
        decode(json.dumps(document))


@pytest.mark.parametrize("line", [b"", b"[]", b"nonsense", b"\xff", b"[" * 100_000, b'{"record": "end"}'])
def test_decode_refuses_other_line(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(line)


def test_request_survives_its_document() -> None:
    request = RecordingRequest("/co", (TestFile("test/a.py", 4),), gpu="B200", workers=3)
    assert RecordingRequest.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"files": [{}], "checkout": ""}', '{"files": [], "checkout": "", "x": 1}']
)
def test_request_refuses_other_document(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        RecordingRequest.from_json(text)
