"""Finds crashes, evidence, shapes and progress in a child's log.

A log may come at hundreds of megabytes a second, so nothing here works on single lines: a chunk of whole lines is
searched for a row's literal text (a fifth of a nanosecond per byte), and only where that occurs the row's regular
expression runs. Rows that merely inform people see only the end of a big chunk.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from builder.task import Shape
from builder.text import shortened

INFORM_BYTES = 16 << 10  # of a chunk, for rows that inform people

_DEEP_GEMM = re.compile(
    rb"DeepGEMM (?:JIT Compiling for <(?P<kernel>[A-Z][A-Z0-9_]*)>,? "
    rb"N=(?P<n>\d+),? K=(?P<k>\d+),? num_groups=(?P<groups>\d+)"
    rb"|warmup:[^\n]*?\|\s*(?P<done>\d+)/(?P<total>\d+))"
)
_CHUNKED = re.compile(rb"server_args=[^\n]*?\bchunked_prefill_size(?:'\s*:|=)\s*(-?\d+)")
_SHAPE_DONE = re.compile(
    rb"warm-cache shapes: done <(?P<kernel>[A-Z][A-Z0-9_]*)> N=(?P<n>\d+), K=(?P<k>\d+), "
    rb"num_groups=(?P<groups>\d+) over (?P<ms>\d+) Ms"
)
_SHAPE_FAILED = re.compile(rb"warm-cache shapes: failed:? ([^\n]*)")
#: The progress bar of the shape pool, for all its workers.
_POOL_BAR = re.compile(rb"warm-cache shapes: (?P<done>\d+)/(?P<total>\d+) Ms, (?P<shapes>\d+ of \d+) shapes")
_TRACEBACK = re.compile(rb"Traceback \(most recent call last\):\n(?:[ \t][^\n]*\n)+([^\s][^\n]*)")


@dataclass(frozen=True)
class Row:
    """A line to find in a log."""

    text: bytes  # occurs in every match of `pattern`; rows that share it are searched for together
    pattern: re.Pattern[bytes]
    name: str  # for people


@dataclass(frozen=True)
class Crash:
    """The first crash line."""

    name: str  # of its row
    line: str

    def __str__(self) -> str:
        return f'crash: "{self.name}" ({self.line})' if self.line else f'crash: "{self.name}"'


class Watch:
    """Reads both streams of one child. Written by the thread that copies them, read by the recipe's.

    evidence: matches the line that proves success; None where something else does. A match (or the recipe) sets
        `succeeded`; from then on crash lines are only log.
    pool: the child is the shape pool.
    """

    def __init__(
        self,
        *,
        crashes: tuple[Row, ...] = (),
        phases: tuple[Row, ...] = (),
        progress: tuple[Row, ...] = (),
        evidence: re.Pattern[bytes] | None = None,
        pool: bool = False,
    ) -> None:
        self._phases, self._progress, self._evidence = phases, progress, evidence
        self._crashes: dict[bytes, list[Row]] = {}
        for row in crashes:
            self._crashes.setdefault(row.text, []).append(row)
        self._pool = pool
        self._lock = threading.Lock()
        self._current: Shape | None = None
        self.succeeded = False
        self.crash: Crash | None = None
        self.shapes: dict[Shape, int] = {}  # shapes that sglang compiled → Ms in all, 0 if unknown
        self.finished_shapes: dict[Shape, int] = {}  # shapes that the pool finished → Ms
        self.failed_shapes: list[str] = []
        self.chunked_prefill_size: int | None = None  # of the server
        self.reduced = False  # sglang reduced the largest M for lack of memory
        self.phase = ""
        self.done: tuple[int, int, str] | None = None  # done, total, unit
        self.last_line = ""

    def lines(self, text: bytes) -> None:
        """Take whole lines, each with its end (``\\n`` or ``\\r``)."""
        if b"\r" in text:
            text = text.replace(b"\r", b"\n")
        with self._lock:
            self._judge(text)
            self._collect(text)
            self._inform(text[-INFORM_BYTES:])

    def partial(self, text: bytes) -> None:
        """Take a line without its end (yet): a crash may be the last output of a hanging process."""
        with self._lock:
            self._judge(text, whole=False)
            last = _last_line(text)
            if last:
                self.last_line = last

    def _judge(self, text: bytes, *, whole: bool = True) -> None:
        if self.succeeded:
            return
        at = len(text)
        if whole and self._evidence is not None:
            found = next((m for m in self._evidence.finditer(text) if b"\n" not in m.group().strip(b"\n")), None)
            if found:
                at = found.start()
                self.succeeded = self.crash is None
        if self.crash is None:
            self.crash = self._first_crash(text[:at] if at < len(text) else text)
            self.succeeded = self.succeeded and self.crash is None

    def _first_crash(self, text: bytes) -> Crash | None:
        first: tuple[int, Row] | None = None
        for row in (row for shared, rows in self._crashes.items() if shared in text for row in rows):
            found = row.pattern.search(text)
            if found and (first is None or found.start() < first[0]):
                first = (found.start(), row)
        if first is None:
            return None
        at, row = first
        begin, end = text.rfind(b"\n", 0, at) + 1, text.find(b"\n", at)
        traceback = _TRACEBACK.search(text, at)
        line = text[begin : end if end >= 0 else len(text)]
        return Crash(row.name, _readable(traceback[1] if traceback and traceback.start() < begin + len(line) else line))

    def _collect(self, text: bytes) -> None:
        if b"DeepGEMM " in text:
            for found in _DEEP_GEMM.finditer(text):
                if found["kernel"]:
                    self._current = _shape(found)
                    self.shapes.setdefault(self._current, 0)
                    if not self._pool:
                        self.phase = f"DeepGEMM {len(self.shapes)}: {self._current}"
                else:
                    self.done = (int(found["done"]), int(found["total"]), "Ms")
                    if self._current:
                        self.shapes[self._current] = self.done[1]
        if self.chunked_prefill_size is None and b"server_args=" in text:
            size = _CHUNKED.search(text)
            self.chunked_prefill_size = int(size[1]) if size else None
        if b"reducing max_m to" in text:
            self.reduced = True
        if self._pool and b"warm-cache shapes: " in text:
            finished = {_shape(found): int(found["ms"]) for found in _SHAPE_DONE.finditer(text)}
            self.finished_shapes.update(finished)
            self.shapes.update(finished)
            self.failed_shapes += [_readable(found[1]) for found in _SHAPE_FAILED.finditer(text)]
            for found in _POOL_BAR.finditer(text):
                self.done = (int(found["done"]), int(found["total"]), "Ms")
                self.phase = f"DeepGEMM {found['shapes'].decode()} shapes"

    def _inform(self, text: bytes) -> None:
        for row in self._phases:
            if row.text in text and row.pattern.search(text):
                self.phase = row.name
        for row in self._progress:
            if row.text in text:
                for found in row.pattern.finditer(text):
                    self.done = (int(found["done"]), int(found["total"]), row.name)
        last = _last_line(text)
        if last:
            self.last_line = last


def _shape(found: re.Match[bytes]) -> Shape:
    return Shape(found["kernel"].decode(), int(found["n"]), int(found["k"]), int(found["groups"]))


def _last_line(text: bytes) -> str:
    text = text[-4096:].rstrip()
    return _readable(text[text.rfind(b"\n") + 1 :]) if text else ""


def _readable(line: bytes) -> str:
    """Return at most 300 characters of a line, for a reason that people read."""
    return shortened(" ".join(line[:1200].decode("utf-8", "replace").split()), 300)
