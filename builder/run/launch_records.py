"""Records what test files launch: in a container of the serving image, or in a child process of this environment.

What was recorded of a file is kept, and used again while the file, everything of the checkout that it read, and the
recorder are the same. A recorder that is ended by a file costs that file, and is started again for the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from builder import files
from builder.events import Event, LaunchRecorded
from builder.recording import (
    FileEnd,
    Launch,
    Record,
    RecordingRequest,
    TestFile,
    Unrecorded,
    decode,
    encode,
    from_mapping,
)

_PACKAGE = Path(__file__).resolve().parents[1]
#: What of the program decides what is recorded.
_RECORDER = ("agent/launch_*.py", "agent/confinement.py", "recording.py")
_LARGEST = 16 << 20
#: Names of what launches, in sglang and in its ``test_utils.py`` of 2026-08-22; a file without any launches nothing.
_LAUNCHERS = re.compile(
    rb"popen_launch|launch_(pd_)?server|\b(Async)?Engine\b|SRTRunner|\bRuntime\(|sglang[ \"', ]+serve\b"
    rb"|bench_one_batch|offline_throughput|run_bench|run_(score|embeddings)_benchmark|run_and_check_memory_leak"
    rb"|run_mmlu_test|run_mulit_request_test|ModelLaunchSettings"
)
#: Modules that every test file reads, and that hold the launchers themselves.
_COMMON = ("python/sglang/test/test_utils.py", "python/sglang/test/run_eval.py", "python/sglang/srt/environ.py")
#: Times that the recorder is started again after a file has ended it.
_RESTARTS = 8


class Recorder(Protocol):
    """Something that runs a request. on_event: is called with each of its events; returns why it ended early, or ""."""

    def __call__(self, request: RecordingRequest, on_event: Callable[[Event], None]) -> str: ...


@dataclass
class FileRecords:
    """What was recorded of one file. end: None until its tests have ended."""

    file: TestFile
    launches: list[Launch] = field(default_factory=list)
    problems: list[Unrecorded] = field(default_factory=list)
    end: FileEnd | None = None
    broken: bool = False

    @property
    def finished(self) -> bool:
        return self.end is not None or self.broken

    def may_launch(self, checkout: str) -> bool:
        """Return False where neither the file nor a helper that it read names a launcher, so that none is missed."""
        if self.end is None or self.launches:
            return True
        for name in dict.fromkeys((self.file.path, *self.end.read)):
            try:
                if name not in _COMMON and _LAUNCHERS.search(files.read_bytes(str(Path(checkout, name)), _LARGEST)):
                    return True
            except files.UnreadableError:
                return True
        return False

    def add(self, record: Record) -> None:
        if isinstance(record, Launch):
            self.launches.append(record)
        elif isinstance(record, FileEnd):
            self.end = record
        else:
            self.problems.append(record)
            self.broken = self.broken or (record.state == "not-understood" and not record.test)


def record(request: RecordingRequest, recorder: Recorder, store: Store | None) -> list[FileRecords]:
    """Return the records of every file of the request, in its order."""
    known = {file: store.find(request, file) for file in request.files} if store is not None else {}
    results = {file: known.get(file) or FileRecords(file) for file in request.files}
    for attempt in range(_RESTARTS):
        missing = [file for file in request.files if not results[file].finished]
        if not missing:
            break
        for file in missing:
            results[file] = FileRecords(file)
        # One at a time after a failure, so that the first file without an end is the one that failed.
        workers = request.workers if attempt == 0 else 1
        names = {file.path: file for file in missing}

        def on_event(event: Event, names: Mapping[str, TestFile] = names) -> None:
            if isinstance(event, LaunchRecorded) and event.file in names:
                with contextlib.suppress(ValueError):
                    results[names[event.file]].add(from_mapping(event.record))

        why = recorder(replace(request, files=tuple(missing), workers=workers), on_event)
        left = [file for file in missing if not results[file].finished]
        if left and (workers == 1 or len(left) == 1):
            _blame(results[left[0]], why or "it ended the recorder")
    for file in request.files:
        if not results[file].finished:
            _blame(results[file], "the recorder was ended too often to come to it")
        elif store is not None and known.get(file) is None:
            store.keep(request, results[file])
    return [results[file] for file in request.files]


def _blame(records: FileRecords, why: str) -> None:
    records.add(Unrecorded("not-understood", "", f"{records.file.path}:1", why))


def workers() -> int:
    """Return how many files to run at the same time: one for each CPU of this process, and at most four."""
    return min(4, len(os.sched_getaffinity(0)))


class Store:
    """Records of earlier runs, one file each, below a folder of this user. It never raises: a run without it is slower.

    A name is a digest of the test file's path, of the machine that is answered for and of the recorder; the contents
    name everything of the checkout that was read, or looked for in vain, with its digest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[Path, str] = {}
        sources = sorted(path for pattern in _RECORDER for path in _PACKAGE.glob(pattern))
        self._recorder = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()

    def find(self, request: RecordingRequest, file: TestFile) -> FileRecords | None:
        """Return the records of this file where all that they depend on is as it was."""
        try:
            document = files.read_json(str(self._path(request, file)), _LARGEST)
            digests: dict[str, str] = document["digests"]
            if any(self._digest(request, name) != digest for name, digest in digests.items()):
                return None
            found = FileRecords(file)
            for line in document["records"]:
                found.add(decode(line))
        except (files.UnreadableError, ValueError, KeyError, TypeError, AttributeError, OSError):
            return None
        return found if found.end is not None and file.path in digests else None

    def keep(self, request: RecordingRequest, records: FileRecords) -> None:
        """Keep the records of a file whose tests have ended, unless they depend on more than files."""
        if records.end is None or records.broken or records.end.listed:
            return
        names = dict.fromkeys([records.file.path, *records.end.read, *records.end.absent])
        if any(name.startswith("/") or ".." in name.split("/") for name in names):
            return
        end = replace(records.end, absent=())
        kept: list[Record] = [*records.launches, *records.problems, end]
        document = {
            "digests": {name: self._digest(request, name) for name in names},
            "records": [encode(each).decode() for each in kept],
        }
        path = self._path(request, records.file)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    json.dump(document, stream)
                os.replace(name, path)  # noqa: PTH105
            except OSError:
                os.unlink(name)  # noqa: PTH108
                raise

    def _path(self, request: RecordingRequest, file: TestFile) -> Path:
        key = "\0".join((self._recorder, request.gpu, str(file.gpus), file.path))
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _digest(self, request: RecordingRequest, name: str) -> str:
        """Return the digest of a file of the checkout; "" where there is none."""
        path = Path(request.checkout, name)
        if path not in self._digests:
            try:
                self._digests[path] = hashlib.sha256(files.read_bytes(str(path), _LARGEST)).hexdigest()
            except files.UnreadableError:
                self._digests[path] = "" if not os.path.lexists(path) else "unreadable"
        return self._digests[path]


def total_seconds(request: RecordingRequest) -> float:
    """Return how long the recorder may take: every file its limit, one after the other on each worker, and a start."""
    return 60.0 + request.seconds_per_file * (1 + len(request.files) / max(1, request.workers))


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the recorder's process: nothing that says what Python is to import."""
    kept = {name: environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in environ}
    return kept | {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
