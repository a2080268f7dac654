"""Sweeps a list of shapes with several workers at once (sweep.py), each a process of its own with a GPU of its own.

A script, standalone like its workers: ``python3 crew.py JSON`` with ``{"shapes": [[kernel, n, k, groups], ...],
"m_values": [...], "chunked_prefill_size": N, "workers": N, "devices": [...]}``. Every worker takes the next shape when
it is done with one, the most work first, so that none is left with a long one at the end. ``devices`` are values of
CUDA_VISIBLE_DEVICES, one per worker and round again; without any, workers see what this process sees.

Lines of its own begin with ``warm-cache shapes:``, one bar for all among them; the last one is the evidence. Workers'
lines are passed on, behind ``[worker N]`` where there are several, all but the bars. A worker that dies is named with
the shape that it died on, and another one goes on with the rest. Exit status 0 when every shape was done, else 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTIGUOUS = "_CONTIG"  # kinds of which sglang keeps only aligned Ms
ALIGNMENT = 128
BAR_SECONDS = 2.0  # between two states of the bar

_BAR = re.compile(rb"DeepGEMM warmup:[^\n]*?\|\s*(\d+)/(\d+)")

_Order = dict[str, Any]


def main(document: str) -> int:
    """Runs the whole list."""
    return Crew(json.loads(document), sys.stdout.buffer).run()


def weight(shape: Sequence[Any]) -> float:
    """What a shape costs, for comparing: the Ms that sglang goes over, times the size of one problem."""
    name, n, k, _groups = shape
    return float(n * k) / (ALIGNMENT if name.endswith(CONTIGUOUS) else 1)


class Crew:
    """All workers, and what they have done."""

    def __init__(self, order: _Order, out: Any) -> None:
        self._order, self._out = order, out
        self._lock = threading.Lock()
        self._queue = sorted(order["shapes"], key=weight, reverse=True)
        self._all = len(self._queue)
        self._workers = max(1, min(order["workers"], self._all))
        self._done = 0
        self._ms = (0, 0)  # of the list: all, and those of the contiguous kinds
        self._at: dict[str, tuple[int, int]] = {}  # by shape: Ms done, Ms in all
        self._said = 0.0

    def run(self) -> int:
        """Exit status."""
        begun = time.monotonic()
        crew = [threading.Thread(target=self._work, args=(number,)) for number in range(self._workers)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if self._done < self._all:
            self._say(f"{self._done} of {self._all} shapes done")
            return 1
        by = _counted(self._workers, "worker")
        self._say(f"all {self._done} shapes done in {time.monotonic() - begun:.1f} s by {by}")
        return 0

    def _work(self, number: int) -> None:
        """One worker after another on this place, until there is nothing left to do."""
        line = self._pass_on if self._workers > 1 else self._pass_plainly
        try:
            while self._queue:
                with _Worker(number, self._order, line) as worker:
                    if not self._welcome(worker) or self._drive(worker):
                        return
        except (OSError, RuntimeError) as error:  # what the PID limit makes of a process, and of a thread
            self._say(f"failed: a worker cannot be started: {error}")

    def _welcome(self, worker: _Worker) -> bool:
        """Whether a worker can work. Where it cannot, another one would fare no better."""
        heard = worker.hear()
        if "ready" not in heard:
            self._say(f"failed: {heard.get('unable') or 'a worker ' + worker.describe_end()}")
            return False
        with self._lock:
            if self._ms == (0, 0):
                self._ms = (heard["ready"][0], heard["ready"][1])
                over = f"{_counted(self._all, 'shape')} over {self._ms[0]} Ms"
                self._line(f"{over}, {_counted(self._workers, 'worker')}, import took {worker.seconds:.1f} s")
        return True

    def _drive(self, worker: _Worker) -> bool:
        """Gives a worker one shape after the other. False when it died."""
        while (taken := self._next()) is not None:
            shape, text = taken
            worker.shape = text
            heard = worker.ask(shape)
            # Without the lock: who has died is waited for until all is read that it said.
            why = "" if "done" in heard else heard.get("failed") or f"its worker {worker.describe_end()}"
            with self._lock:
                worker.shape = None
                self._at[text] = (self._at[text][1],) * 2
                if why:
                    self._line(f"failed {text}: {why}")
                else:
                    self._done += 1
                    self._line(f"done {text} over {heard['done']} Ms in {heard['seconds']:.1f} s")
                self._bar(always=True)
            if not heard:
                return False
        return True

    def _next(self) -> tuple[list[Any], str] | None:
        with self._lock:
            if not self._queue:
                return None
            shape = self._queue.pop(0)
            text = f"<{shape[0]}> N={shape[1]}, K={shape[2]}, num_groups={shape[3]}"
            self._at[text] = (0, self._expected(shape))
            return shape, text

    def _expected(self, shape: Sequence[Any]) -> int:
        """The Ms that sglang should go over; its own bar tells how many it does."""
        return self._ms[1 if shape[0].endswith(CONTIGUOUS) else 0]

    def _pass_on(self, worker: _Worker, line: bytes) -> None:
        self._pass(worker, b"[worker %d] " % worker.number, line)

    def _pass_plainly(self, worker: _Worker, line: bytes) -> None:
        self._pass(worker, b"", line)

    def _pass(self, worker: _Worker, prefix: bytes, line: bytes) -> None:
        bar = _BAR.search(line)
        with self._lock:
            if bar is None:
                self._out.write(prefix + line + b"\n")
                self._out.flush()
            elif worker.shape is not None:
                self._at[worker.shape] = (int(bar[1]), int(bar[2]))
                self._bar()

    def _bar(self, *, always: bool = False) -> None:
        """One bar for all, over the Ms of every shape."""
        now = time.monotonic()
        if not always and now - self._said < BAR_SECONDS:
            return
        self._said = now
        done = sum(done for done, _ in self._at.values())
        total = sum(total for _, total in self._at.values()) + sum(map(self._expected, self._queue))
        self._line(f"{done}/{total} Ms, {self._done} of {self._all} shapes", end=b"\r")

    def _say(self, text: str) -> None:
        with self._lock:
            self._line(text)

    def _line(self, text: str, end: bytes = b"\n") -> None:
        """A line of our own; the lock is held."""
        self._out.write(b"warm-cache shapes: " + text.encode("utf-8", "replace") + end)
        self._out.flush()


class _Worker:
    """One process of sweep.py. Leaving the context ends it: its stdin is at its end."""

    def __init__(self, number: int, order: _Order, line: Any) -> None:
        self.number = number
        self.shape: str | None = None
        self.seconds = 0.0
        self._last = b""
        devices = order["devices"]
        env = dict(os.environ)
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        reports, report = os.pipe()
        told = {"m_values": order["m_values"], "chunked_prefill_size": order["chunked_prefill_size"], "report": report}
        try:
            self._process = subprocess.Popen(
                ["python3", str(Path(__file__).with_name("shape_worker.py")), json.dumps(told)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(report,),
            )
        except BaseException:
            os.close(reports)
            raise
        finally:
            os.close(report)
        self._reports = os.fdopen(reports, encoding="ascii")
        self._reader = threading.Thread(target=self._read, args=(line,))
        self._reader.start()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def hear(self) -> dict[str, Any]:
        """What it says next; nothing when it has died."""
        begun = time.monotonic()
        line = self._reports.readline()
        self.seconds = time.monotonic() - begun
        heard: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
        return heard

    def ask(self, shape: Sequence[Any]) -> dict[str, Any]:
        """Has it do one shape; its answer, or nothing when it died over it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(shape).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return {}
        return self.hear()

    def describe_end(self) -> str:
        """How it ended, with the last thing it said."""
        status = self._end()
        how = f"ended with status {status}" if status >= 0 else f"was killed by {_signal(-status)}"
        last = " ".join(self._last[:1200].decode("utf-8", "replace").split())[:200]
        return f"{how}; its last line: {last}" if last else how

    def _end(self) -> int:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # what it never read
            stdin.close()
        status = self._process.wait()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._reports.close()
        return status

    def _read(self, line: Any) -> None:
        """Whole lines, whatever ends them."""
        stream = self._process.stdout
        assert stream is not None
        held = b""
        with stream:
            while data := os.read(stream.fileno(), 1 << 16):
                *whole, held = re.split(rb"[\r\n]", held + data)
                for text in whole:
                    self._take(text, line)
        self._take(held, line)

    def _take(self, text: bytes, line: Any) -> None:
        if text.strip():
            if not _BAR.search(text):
                self._last = text
            line(self, text)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
