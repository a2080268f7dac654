"""Records of test files: kept for the next run, and complete whatever a file does to the recorder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder import events
from builder.events import Event, LaunchRecorded
from builder.recording import FileEnd, Launch, Record, RecordingRequest, TestFile, Unrecorded, fields_of
from builder.run.launch_records import FileRecords, Store, record

A, B, C = (TestFile(f"test/{name}.py", 8) for name in "abc")


def launch(file: TestFile) -> Launch:
    return Launch("TestIt.test_it", f"{file.path}:1", "server", f"org/{file.path}", (), ())


def event_of(path: str, each: Record) -> Event:
    """As it comes out of a line of JSON."""
    event = events.decode(events.encode("n", LaunchRecorded(path, fields_of(each))), "n")
    assert event is not None
    return event


class Recorder:
    """Reports a launch of every file, unless one of them ends it."""

    def __init__(self, deadly: tuple[TestFile, ...] = (), *, listed: bool = False) -> None:
        self.deadly, self.listed = deadly, listed
        self.asked: list[tuple[TestFile, ...]] = []

    def __call__(self, request: RecordingRequest, on_event: Callable[[Event], None]) -> str:
        self.asked.append(request.files)
        for file in request.files:
            if file in self.deadly:
                return "it was killed"
            end = FileEnd(1, (file.path, "lib.py"), ("absent.py",), listed=self.listed)
            for each in (launch(file), end):
                on_event(event_of(file.path, each))
        on_event(event_of("test/other.py", launch(A)))
        on_event(LaunchRecorded(A.path, {"record": "launch"}))
        return ""


@pytest.fixture
def request_(tmp_path: Path) -> RecordingRequest:
    for name in ("a", "b", "c"):
        path = tmp_path / "co" / "test" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "co" / "lib.py").write_text("lib")
    return RecordingRequest(str(tmp_path / "co"), (A, B, C))


def launches(found: list[FileRecords]) -> list[Launch]:
    return [each for records in found for each in records.launches]


def test_record_takes_events_of_its_files_alone(request_: RecordingRequest) -> None:
    assert launches(record(request_, Recorder(), None)) == [launch(A), launch(B), launch(C)]


def test_record_blames_file_that_ends_recorder_and_goes_on(request_: RecordingRequest) -> None:
    recorder = Recorder((B,))
    found = record(request_, recorder, None)
    assert launches(found) == [launch(A), launch(C)]
    assert found[1].problems == [Unrecorded("not-understood", "", "test/b.py:1", "it was killed")]
    assert recorder.asked == [(A, B, C), (B, C), (C,)]


def test_record_ends_when_every_file_ends_recorder(request_: RecordingRequest) -> None:
    found = record(request_, Recorder((A, B, C)), None)
    assert [len(each.problems) for each in found] == [1, 1, 1]


def test_store_returns_what_was_kept(request_: RecordingRequest, tmp_path: Path) -> None:
    first = record(request_, Recorder(), Store(tmp_path / "store"))
    recorder = Recorder()
    again = record(request_, recorder, Store(tmp_path / "store"))
    assert launches(again) == launches(first)
    assert recorder.asked == []


@pytest.mark.parametrize(("name", "again"), [("test/b.py", (B,)), ("lib.py", (A, B, C)), ("absent.py", (A, B, C))])
def test_store_forgets_file_when_what_it_read_changes(
    request_: RecordingRequest, tmp_path: Path, name: str, again: tuple[TestFile, ...]
) -> None:
    record(request_, Recorder(), Store(tmp_path / "store"))
    (tmp_path / "co" / name).write_text("changed")
    recorder = Recorder()
    record(request_, recorder, Store(tmp_path / "store"))
    assert recorder.asked == [again]


def test_store_keeps_nothing_when_a_folder_was_listed(request_: RecordingRequest, tmp_path: Path) -> None:
    record(request_, Recorder(listed=True), Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_store_keeps_nothing_of_broken_file(request_: RecordingRequest, tmp_path: Path) -> None:
    record(request_, Recorder((B,)), Store(tmp_path / "store"))
    recorder = Recorder()
    record(request_, recorder, Store(tmp_path / "store"))
    assert recorder.asked == [(B,)]


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b'{"digests": [], "records": []}', b"\xff", b'{"digests": {}, "records": [1]}']
)
def test_store_ignores_damaged_record(request_: RecordingRequest, tmp_path: Path, damage: bytes) -> None:
    record(request_, Recorder(), Store(tmp_path / "store"))
    for path in (tmp_path / "store").iterdir():
        path.write_bytes(damage)
    recorder = Recorder()
    assert len(launches(record(request_, recorder, Store(tmp_path / "store")))) == 3
    assert recorder.asked == [(A, B, C)]


def test_store_that_cannot_be_written_costs_nothing(request_: RecordingRequest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(launches(record(request_, Recorder(), Store(tmp_path / "file")))) == 3


@pytest.mark.parametrize(
    ("source", "may"),
    [
        ("import torch\nassert torch.ones(2)\n", False),
        ("import torch\nEngine(model_path='org/m')\n", True),
        ("COMMAND = ['sglang', 'serve']\n", True),
    ],
)
def test_may_launch_false_when_no_source_names_a_launcher(tmp_path: Path, source: str, may: bool) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text(source)
    records = FileRecords(A, end=FileEnd(0, (A.path, "python/sglang/test/test_utils.py"), (), listed=False))
    assert records.may_launch(str(tmp_path)) == may


def test_may_launch_true_when_file_did_not_end(tmp_path: Path) -> None:
    assert FileRecords(A).may_launch(str(tmp_path))
