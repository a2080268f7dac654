"""Runs test files of a checkout with recorders in the place of launchers, and reports what they launch.

Each file has a separate process, forked from this one, which runs none of the checkout's code: a file that ends its
process, hangs, or floods its output costs its own results and no others. A file's process has limits of memory, time
and file size, starts and signals no other process, and writes to one pipe, whose lines are decoded strictly.
Standard library only.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from builder.agent import confinement
from builder.agent.guard import SCRATCH
from builder.recording import LONGEST_LINE, FileEnd, Launch, Record, RecordingRequest, TestFile, Unrecorded, decode

#: Records of one file: more are no test's.
_MOST_RECORDS = 4096
_CHUNK = 1 << 16
_FILE_SIZE = 64 << 20

#: Called with the file and each of its records; a file's last one is a `FileEnd`, or an `Unrecorded` of the file.
Report = Callable[[TestFile, Record], None]


@dataclass
class _FileProcess:
    """A file's process. deadline: monotonic; ended: its last record has come; broken: why its pipe is not believed."""

    file: TestFile
    pid: int
    descriptor: int
    scratch: str
    deadline: float
    rest: bytes = b""
    records: int = 0
    launches: int = 0
    end: FileEnd | None = None
    broken: str = ""
    overdue: bool = field(default=False)


def record(request: RecordingRequest, report: Report, check: Callable[[], None] = lambda: None) -> None:
    """Run every file of the request. check: called about ten times a second; what it raises ends the run."""
    confinement.hide_process()
    waiting = list(request.files)[::-1]
    running: dict[int, _FileProcess] = {}
    selector = selectors.DefaultSelector()
    try:
        while waiting or running:
            check()
            while waiting and len(running) < max(1, request.workers):
                child = _start(request, waiting.pop(), [each.descriptor for each in running.values()])
                running[child.descriptor] = child
                selector.register(child.descriptor, selectors.EVENT_READ)
            for key, _events in selector.select(0.1):
                child = running[key.fd]
                data = os.read(child.descriptor, _CHUNK)
                if data and not child.broken:
                    _take(child, data, report)
                if not data or child.broken:
                    selector.unregister(child.descriptor)
                    del running[child.descriptor]
                    _finish(child, request, report)
            for child in running.values():
                if time.monotonic() > child.deadline and not child.overdue:
                    child.overdue = True
                    _kill(child.pid)
    finally:
        for child in running.values():
            _kill(child.pid)
            os.close(child.descriptor)
            os.waitpid(child.pid, 0)
            shutil.rmtree(child.scratch, ignore_errors=True)
        selector.close()


def _start(request: RecordingRequest, file: TestFile, others: list[int]) -> _FileProcess:
    from builder.agent import launch_session

    reader, writer = os.pipe()
    scratch = tempfile.mkdtemp(prefix=f"{SCRATCH}tests-")
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            os.dup2(writer, 3)
            os.closerange(4, 1024)
            gc.collect()
            confinement.limit(memory=request.memory, cpu=int(request.seconds_per_file) + 1, file_size=_FILE_SIZE)
            confinement.forbid_other_processes(parent)
            launch_session.record_file(request, file, 3, scratch)
        finally:
            os._exit(70)
    os.close(writer)
    return _FileProcess(file, pid, reader, scratch, time.monotonic() + request.seconds_per_file)


def _take(child: _FileProcess, data: bytes, report: Report) -> None:
    """Report the records in what was read; a line that is none ends the belief in what follows."""
    *lines, child.rest = (child.rest + data).split(b"\n")
    if len(child.rest) > LONGEST_LINE:
        child.broken = "it wrote a line that no recorder writes"
        return
    for line in lines:
        if child.end is not None:
            child.broken = "it wrote to the recorder's pipe after its end"
            return
        try:
            each = decode(line)
        except ValueError as error:
            child.broken = f"it wrote to the recorder's pipe: {error}"
            return
        child.records += 1
        if child.records > _MOST_RECORDS:
            child.broken = f"it has more than {_MOST_RECORDS} launches and problems"
            return
        if isinstance(each, FileEnd):
            child.end = each
            continue
        child.launches += isinstance(each, Launch)
        report(child.file, each)


def _finish(child: _FileProcess, request: RecordingRequest, report: Report) -> None:
    """Report how a file ended, after its pipe did."""
    os.close(child.descriptor)
    _kill(child.pid)
    _pid, status = os.waitpid(child.pid, 0)
    shutil.rmtree(child.scratch, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    why = child.broken
    if child.overdue:
        why = f"its tests took longer than {request.seconds_per_file:g} s"
    elif not why and child.end is None:
        why = f"its process ended before its tests did ({_ending(code)})"
    elif not why and child.end is not None and child.end.launches != child.launches:
        why = f"it reported {child.launches} launches of {child.end.launches}"
    if why or child.end is None:
        report(child.file, Unrecorded("not-understood", "", f"{child.file.path}:1", why))
    else:
        report(child.file, child.end)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
