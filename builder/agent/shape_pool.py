"""A pool of workers (shape_worker.py), each a process with a GPU, that compile a list of DeepGEMM shapes.

A script, standalone like its workers: ``python3 shape_pool.py JSON`` with ``{"shapes": [[kernel, n, k, groups], ...],
"m_values": [...], "chunked_prefill_size": N, "workers": N, "devices": [...]}``. Every worker takes the next shape when
it has finished one, the most expensive first, so that no long one is left at the end. ``devices`` are values of
CUDA_VISIBLE_DEVICES, one per worker in turn; without any, workers see the GPUs of this process.

Its own lines begin with ``warm-cache shapes:``, one progress bar for all shapes among them; the last one is the
evidence of success. It passes on the workers' lines, behind ``[worker N]`` where there are several, without their bars.
A worker that dies is reported with its shape, and another one continues with the rest. Exit status 0 if every shape was
done, else 1.

With ``"imported": SOCKET`` workers are forks of one process that has imported sglang (shape_forks.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

CONTIGUOUS = "_CONTIG"  # ends the kernel types of which sglang keeps only aligned Ms
ALIGNMENT = 128  # of their Ms on Hopper; near enough to order the shapes
BAR_SECONDS = 2.0  # between two updates of the progress bar

_BAR = re.compile(rb"DeepGEMM warmup:[^\n]*?\|\s*(\d+)/(\d+)")

_Shape = tuple[str, int, int, int]  # kernel type, N, K, groups


@dataclass(frozen=True)
class PoolRequest:
    """The script's argument."""

    shapes: list[_Shape]
    m_values: list[int]  # empty: those of sglang
    chunked_prefill_size: int
    workers: int
    devices: list[str]
    imported: str = ""  # socket of a process that forks workers (`shape_forks`); "": each imports sglang


@dataclass(frozen=True)
class WorkerAnswer:
    """A line that a worker reports (shape_worker.py)."""

    ready: tuple[int, int] | None = None
    unable: str = ""
    done: int | None = None  # Ms
    seconds: float = 0.0
    failed: str = ""


def main(document: str) -> int:
    """Compile the whole list. Returns the exit status."""
    return ShapePool(PoolRequest(**json.loads(document)), sys.stdout.buffer).run()


def weight(shape: _Shape) -> float:
    """Return the relative cost of a shape: the number of its Ms times the size of one problem."""
    name, n, k, _groups = shape
    return float(n * k) / (ALIGNMENT if name.endswith(CONTIGUOUS) else 1)


class ShapePool:
    """All workers, and the shapes that they have done."""

    def __init__(self, request: PoolRequest, out: BinaryIO) -> None:
        self._request, self._out = request, out
        self._lock = threading.Lock()
        self._queue = sorted(request.shapes, key=weight, reverse=True)
        self._all = len(self._queue)
        self._workers = max(1, min(request.workers, self._all))
        self._done = 0
        self._ms = (0, 0)  # number of Ms: all, and those of the contiguous types
        self._progress: dict[str, tuple[int, int]] = {}  # by shape: Ms done, Ms in all
        self._bar_time = 0.0

    def run(self) -> int:
        """Compile all shapes. Returns the exit status."""
        begun = time.monotonic()
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(self._workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._done < self._all:
            self._report(f"{self._done} of {self._all} shapes done")
            return 1
        workers = _counted(self._workers, "worker")
        self._report(f"all {self._done} shapes done in {time.monotonic() - begun:.1f} s by {workers}")
        return 0

    def _work(self, number: int) -> None:
        """Run one worker after another in this slot, until no shape is left."""
        try:
            while self._queue:
                with _ShapeProcess(number, self._request, self._pass_on) as worker:
                    ready = worker.read()
                    if ready is None and worker.is_fork:
                        self._request = replace(self._request, imported="")  # what went wrong is shown by an import
                    elif not self._is_ready(worker, ready) or self._feed(worker):
                        return
        except (OSError, RuntimeError) as error:  # the PID limit: of a process, of a thread
            self._report(f"failed: a worker cannot be started: {error}")

    def _is_ready(self, worker: _ShapeProcess, answer: WorkerAnswer | None) -> bool:
        """Return whether a worker can compile, by its first answer. If it cannot, no other one could."""
        if answer is None or answer.ready is None:
            unable = answer.unable if answer else ""
            self._report(f"failed: {unable or 'a worker ' + worker.describe_end()}")
            return False
        with self._lock:
            if self._ms == (0, 0):
                self._ms = answer.ready
                work = f"{_counted(self._all, 'shape')} over {self._ms[0]} Ms"
                self._line(f"{work}, {_counted(self._workers, 'worker')}, import took {worker.seconds:.1f} s")
        return True

    def _feed(self, worker: _ShapeProcess) -> bool:
        """Give a worker one shape after the other. Returns False if it died."""
        while (taken := self._next()) is not None:
            shape, text = taken
            worker.shape = text
            answer = worker.compile(shape)
            # Without the lock: this waits until all output of a dead worker is read.
            why = answer.failed if answer else f"its worker {worker.describe_end()}"
            with self._lock:
                worker.shape = None
                self._progress[text] = (self._progress[text][1],) * 2
                if answer is None or why:
                    self._line(f"failed {text}: {why}")
                else:
                    self._done += 1
                    self._line(f"done {text} over {answer.done} Ms in {answer.seconds:.1f} s")
                self._bar(always=True)
            if answer is None:
                return False
        return True

    def _next(self) -> tuple[_Shape, str] | None:
        with self._lock:
            if not self._queue:
                return None
            shape = self._queue.pop(0)
            text = f"<{shape[0]}> N={shape[1]}, K={shape[2]}, num_groups={shape[3]}"
            self._progress[text] = (0, self._expected(shape))
            return shape, text

    def _expected(self, shape: _Shape) -> int:
        """Return the number of Ms that sglang should compile; its own progress bar has the actual number."""
        return self._ms[1 if shape[0].endswith(CONTIGUOUS) else 0]

    def _pass_on(self, worker: _ShapeProcess, line: bytes) -> None:
        """Pass on a worker's line, or take its progress bar into account."""
        bar = _BAR.search(line)
        prefix = b"[worker %d] " % worker.number if self._workers > 1 else b""
        with self._lock:
            if bar is None:
                self._out.write(prefix + line + b"\n")
                self._out.flush()
            elif worker.shape is not None:
                self._progress[worker.shape] = (int(bar[1]), int(bar[2]))
                self._bar()

    def _bar(self, *, always: bool = False) -> None:
        """Write the progress bar, over the Ms of all shapes."""
        now = time.monotonic()
        if not always and now - self._bar_time < BAR_SECONDS:
            return
        self._bar_time = now
        done = sum(done for done, _ in self._progress.values())
        total = sum(total for _, total in self._progress.values()) + sum(map(self._expected, self._queue))
        self._line(f"{done}/{total} Ms, {self._done} of {self._all} shapes", end=b"\r")

    def _report(self, text: str) -> None:
        with self._lock:
            self._line(text)

    def _line(self, text: str, end: bytes = b"\n") -> None:
        """Write a line of our own. The caller holds the lock."""
        self._out.write(b"warm-cache shapes: " + text.encode("utf-8", "replace") + end)
        self._out.flush()


_OnLine = Callable[["_ShapeProcess", bytes], None]


class _ShapeProcess:
    """One process of shape_worker.py, or a fork that does the same. Leaving the context closes its stdin: it ends."""

    def __init__(self, number: int, request: PoolRequest, on_line: _OnLine) -> None:
        self.number = number
        self.shape: str | None = None
        self.seconds = 0.0
        self._last = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._status: int | None = None
        reports, report = os.pipe()
        try:
            order = {"m_values": request.m_values, "chunked_prefill_size": request.chunked_prefill_size}
            if request.imported:
                self._fork(request.imported, order, report)
            if self._connection is None:
                self._start(request.devices, {**order, "report": report})
        except BaseException:
            os.close(reports)
            raise
        finally:
            os.close(report)
        self._reports = os.fdopen(reports, encoding="ascii")
        self._reader = threading.Thread(target=self._read, args=(on_line,))
        self._reader.start()

    def _start(self, devices: list[str], order: dict[str, Any]) -> None:
        env = dict(os.environ)
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = devices[self.number % len(devices)]
        self._process = subprocess.Popen(
            ["python3", str(Path(__file__).with_name("shape_worker.py")), json.dumps(order)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(order["report"],),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout

    def _fork(self, imported: str, order: dict[str, Any], report: int) -> None:
        """Have it forked. Without a connection afterwards, there is nothing to fork it of."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(imported)
            theirs, stdin = os.pipe()
            stdout, output = os.pipe()
            self._stdin, self._stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
            try:
                socket.send_fds(connection, [b"."], [theirs, output, report])
            finally:
                os.close(theirs)
                os.close(output)
            self._stdin.write(json.dumps(order).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            connection.close()
            return
        self._connection = connection

    @property
    def is_fork(self) -> bool:
        return self._connection is not None

    def __enter__(self) -> _ShapeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read(self) -> WorkerAnswer | None:
        """Return its next answer; None if it died."""
        begun = time.monotonic()
        line = self._reports.readline()
        self.seconds = time.monotonic() - begun
        return WorkerAnswer(**json.loads(line)) if line.endswith("\n") else None

    def compile(self, shape: _Shape) -> WorkerAnswer | None:
        """Have it compile one shape. Returns its answer; None if it died."""
        try:
            self._stdin.write(json.dumps(shape).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            return None
        return self.read()

    def describe_end(self) -> str:
        """Return how it ended, with its last line."""
        status = self._end()
        how = f"ended with status {status}" if status >= 0 else f"was killed by {_signal(-status)}"
        last = " ".join(self._last[:1200].decode("utf-8", "replace").split())[:200]
        return f"{how}; its last line: {last}" if last else how

    def _end(self) -> int:
        with contextlib.suppress(OSError):  # it died without reading all of it
            self._stdin.close()
        status = self._wait()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._reports.close()
        return status

    def _wait(self) -> int:
        """Return its exit status: a negative number for a signal."""
        if self._process is not None:
            return self._process.wait()
        assert self._connection is not None
        with self._connection:
            if self._status is None:
                text = b""
                with contextlib.suppress(OSError):
                    text = self._connection.recv(16)
                self._status = int(text or -signal.SIGKILL)  # without an answer it went with what it was forked of
        return self._status

    def _read(self, on_line: _OnLine) -> None:
        """Take its output line by line; a line may end with a carriage return."""
        held = b""
        with self._stdout as stream:
            while data := os.read(stream.fileno(), 1 << 16):
                *whole, held = re.split(rb"[\r\n]", held + data)
                for text in whole:
                    self._take(text, on_line)
        self._take(held, on_line)

    def _take(self, text: bytes, on_line: _OnLine) -> None:
        if text.strip():
            if not _BAR.search(text):
                self._last = text
            on_line(self, text)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
