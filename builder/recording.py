"""What the launch recorder is asked for and what it reports, as values that cross the border to its process.

A report is a line of JSON. Lines come from a process that runs code of a checkout: they are decoded strictly, and one
that is not of its kind is a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

#: failed: it raised, so that later launches of it may be missing. failed-after-launch: it raised, and nothing that it
#: had still to run launches. skipped: it skipped itself, on this machine.
#: disabled: its registration says so. not-understood: a launch or a branch depends on a value that is not known, or
#: the file cannot be run.
State = Literal["failed", "failed-after-launch", "skipped", "disabled", "not-understood"]
#: server: popen_launch_server; pd: popen_launch_pd_server; process: another command; engine: in the test's own
#: process; bench: a benchmark that loads the model itself.
Kind = Literal["server", "pd", "process", "engine", "bench"]

LONGEST_LINE = 1 << 18  # bytes
_LONGEST_TEXT = 16384
_MOST_WORDS = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class TestFile:
    """A test file to run. path: below the checkout; gpus: how many its runner has."""

    path: str
    gpus: int

    __test__ = False  # for pytest, which collects classes of this name


@dataclass(frozen=True)
class RecordingRequest:
    """What to record. checkout: folder with ``python/sglang/test``; gpu: a name in `launch_facts.GPUS`.

    seconds_per_test, seconds_per_file: wall-clock limits; memory: bytes of address space for each process; workers:
    processes at the same time.
    """

    checkout: str
    files: tuple[TestFile, ...]
    gpu: str = "H200"
    seconds_per_test: float = 15.0
    seconds_per_file: float = 90.0
    memory: int = 2 << 30
    workers: int = 2

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RecordingRequest:
        """Raises ValueError for any other document than `to_json` wrote."""
        data = json.loads(text)
        try:
            files = tuple(TestFile(str(each["path"]), int(each["gpus"])) for each in data.pop("files"))
            return cls(files=files, **data)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a request for the launch recorder: {error}") from None


@dataclass(frozen=True)
class Launch:
    """One launch. test: ``Class.method``; location: ``FILE:LINE``, below the checkout; env: what differs from the
    environment before the tests. A temporary path, or one of the checkout, is TEMPORARY, an unknown value stands in its
    marks (`launch_unknown.MARK`).
    """

    test: str
    location: str
    kind: Kind
    model: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Unrecorded:
    """A test, class or file whose launches are not, or not all, recorded."""

    state: State
    test: str
    location: str
    why: str


@dataclass(frozen=True)
class FileEnd:
    """A file's tests have ended. launches: how many were reported; read: files of the checkout that the result depends
    on; absent: files that were looked for and are not there; listed: it looked at a folder, so that the result
    depends on more than files.
    """

    launches: int
    read: tuple[str, ...]
    absent: tuple[str, ...]
    listed: bool


Record = Launch | Unrecorded | FileEnd
_KINDS: Mapping[str, type[Launch | Unrecorded | FileEnd]] = {
    "launch": Launch,
    "problem": Unrecorded,
    "end": FileEnd,
}


def fields_of(record: Record) -> dict[str, Any]:
    """The record as a JSON object, its kind under ``record``."""
    return {"record": next(name for name, kind in _KINDS.items() if isinstance(record, kind)), **asdict(record)}


def encode(record: Record) -> bytes:
    """One line, newline included."""
    return json.dumps(fields_of(record), separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes | str) -> Record:
    """Raises ValueError for a line that `encode` cannot have written."""
    try:
        data = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return from_mapping(data)


def from_mapping(data: object) -> Record:
    """The same for a JSON object that is decoded already."""
    if not isinstance(data, dict) or not isinstance(data.get("record"), str) or data["record"] not in _KINDS:
        raise ValueError("not a record")
    kind = _KINDS[data["record"]]
    given = {name: value for name, value in data.items() if name != "record"}
    if given.keys() != {field.name for field in fields(kind)}:
        raise ValueError(f"not the fields of a {data['record']} record")
    return kind(**{name: _CHECKS[name](value) for name, value in given.items()})


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise ValueError("not a text, or too long")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MOST_WORDS:
        raise ValueError("not a list of words, or too long")
    return tuple(map(_text, value))


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    if (
        not isinstance(value, list)
        or len(value) > _MOST_WORDS
        or not all(isinstance(each, list) and len(each) == 2 for each in value)
    ):
        raise ValueError("not a list of pairs")
    return tuple((_text(name), _text(text)) for name, text in value)


def _one_of(words: tuple[str, ...]) -> Any:
    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"not one of {', '.join(words)}")
        return str(value)

    return check


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError("not a number")
    return value


def _switch(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("not true or false")
    return value


_CHECKS: Mapping[str, Any] = {
    **dict.fromkeys(("test", "location", "model", "why"), _text),
    **dict.fromkeys(("argv", "read", "absent"), _words),
    "kind": _one_of(get_args(Kind)),
    "state": _one_of(get_args(State)),
    "env": _pairs,
    "launches": _count,
    "listed": _switch,
}
