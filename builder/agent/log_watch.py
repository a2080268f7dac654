"""What a child's log says: crashes, evidence, shapes, progress.

A log may come at hundreds of megabytes a second, so nothing here looks at single lines: a chunk of whole lines is asked
whether it holds a row's literal text (a search that costs a fifth of a nanosecond per byte), and only then is the row's
regular expression run over it. Of a big chunk the rows that merely inform people see the end only.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from builder.task import Shape
from builder.text import shortened

INFORM_BYTES = 16 << 10  # of a chunk, for rows that inform; more comes only in a flood

_DEEP_GEMM = re.compile(
    rb"DeepGEMM (?:JIT Compiling for <(?P<kernel>[A-Z][A-Z0-9_]*)>,? "
    rb"N=(?P<n>\d+),? K=(?P<k>\d+),? num_groups=(?P<groups>\d+)"
    rb"|warmup:[^\n]*?\|\s*(?P<done>\d+)/(?P<total>\d+))"
)
_CHUNKED = re.compile(rb"server_args=[^\n]*?\bchunked_prefill_size(?:'\s*:|=)\s*(-?\d+)")
_SWEPT = re.compile(
    rb"warm-cache shapes: done <(?P<kernel>[A-Z][A-Z0-9_]*)> N=(?P<n>\d+), K=(?P<k>\d+), "
    rb"num_groups=(?P<groups>\d+) over (?P<ms>\d+) Ms"
)
_SWEEP_FAILED = re.compile(rb"warm-cache shapes: failed:? ([^\n]*)")
#: The one bar of all workers of a sweep.
_SWEEP_BAR = re.compile(rb"warm-cache shapes: (?P<done>\d+)/(?P<total>\d+) Ms, (?P<shapes>\d+ of \d+) shapes")
_TRACEBACK = re.compile(rb"Traceback \(most recent call last\):\n(?:[ \t][^\n]*\n)+([^\s][^\n]*)")


@dataclass(frozen=True)
class Row:
    """One thing a log line may say. ``name`` is for people.

    ``text`` occurs in every match of ``pattern``; rows may share it, and then it is searched once for all of them.
    """

    text: bytes
    pattern: re.Pattern[bytes]
    name: str


@dataclass(frozen=True)
class Crash:
    """The first crash line: which one, and the line itself."""

    name: str
    line: str

    def __str__(self) -> str:
        return f'crash: "{self.name}" ({self.line})' if self.line else f'crash: "{self.name}"'


class Watch:
    """Reads both streams of one child. Written by the pump's thread, read by the recipe's.

    evidence: what a recipe's success looks like, or None where something else is the evidence. ``succeeded`` is set
    by its match (or by the recipe); from then on crash lines are only log. sweeping: the child is crew.py.
    """

    def __init__(
        self,
        *,
        crashes: tuple[Row, ...] = (),
        phases: tuple[Row, ...] = (),
        progress: tuple[Row, ...] = (),
        evidence: re.Pattern[bytes] | None = None,
        sweeping: bool = False,
    ) -> None:
        self._phases, self._progress, self._evidence = phases, progress, evidence
        self._crashes: dict[bytes, list[Row]] = {}
        for row in crashes:
            self._crashes.setdefault(row.text, []).append(row)
        self._sweeping = sweeping
        self._lock = threading.Lock()
        self.succeeded = False
        self._current: Shape | None = None
        self.crash: Crash | None = None
        self.shapes: dict[Shape, int] = {}
        self.swept: dict[Shape, int] = {}
        self.failed_shapes: list[str] = []
        self.chunked_prefill_size: int | None = None
        self.reduced = False
        self.phase = ""
        self.done: tuple[int, int, str] | None = None
        self.last_line = ""

    def lines(self, text: bytes) -> None:
        """Whole lines, each with its end (``\\n`` or ``\\r``)."""
        if b"\r" in text:
            text = text.replace(b"\r", b"\n")
        with self._lock:
            self._judge(text)
            self._collect(text)
            self._inform(text[-INFORM_BYTES:])

    def partial(self, text: bytes) -> None:
        """A line whose end has not come (yet): a crash may be the last thing that a hanging process says."""
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
        told = _TRACEBACK.search(text, at)
        line = text[begin : end if end >= 0 else len(text)]
        return Crash(row.name, _readable(told[1] if told and told.start() < begin + len(line) else line))

    def _collect(self, text: bytes) -> None:
        if b"DeepGEMM " in text:
            for found in _DEEP_GEMM.finditer(text):
                if found["kernel"]:
                    self._current = _shape(found)
                    self.shapes.setdefault(self._current, 0)
                    if not self._sweeping:
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
        if self._sweeping and b"warm-cache shapes: " in text:
            swept = {_shape(found): int(found["ms"]) for found in _SWEPT.finditer(text)}
            self.swept.update(swept)
            self.shapes.update(swept)
            self.failed_shapes += [_readable(found[1]) for found in _SWEEP_FAILED.finditer(text)]
            for found in _SWEEP_BAR.finditer(text):
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
    """At most 300 characters of a line, for a reason that people read."""
    return shortened(" ".join(line[:1200].decode("utf-8", "replace").split()), 300)
