"""Tables out of results: rows as data, and the one function that draws them.

Nothing is printed here. Standard library only: ``--here`` draws the same tables.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from builder.report.results import TaskResult
from builder.text import duration, size

_GAP = "  "
#: A column that has to give way on a narrow terminal keeps at least this many columns of it.
_LEAST = 8
_BOLD = "1"

#: State of a task → SGR code of its colour: green, yellow or red.
STATE_STYLE = {"warm": "32", "warmed": "32", "cold": "33", "partial": "33", "skipped": "33", "failed": "31"}

TASK_COLUMNS = ("task", "state", "time", "entries", "verified", "note")


def task_table(tasks: Sequence[TaskResult]) -> list[list[str]]:
    """Return the rows, under TASK_COLUMNS, of the table at the end of a run."""
    rows = []
    for task in tasks:
        proven = task.proven or "–"
        if task.proven is not None and task.verified:
            proven = "0 new" if task.state == "warmed" else "yes"
        entries = families(task.added, "+", task.added_bytes) if any(task.added.values()) else families(task.entries)
        rows.append([task.label, task.state, duration(task.seconds), entries, proven, task.note])
    return rows


def families(counts: Mapping[str, int], sign: str = "", sizes: Mapping[str, int] | None = None) -> str:
    """``+518 deep_gemm (51.2 MB), +3 triton (40.1 kB)``; an en dash for nothing. sizes: bytes by family."""
    sizes = sizes or {}
    return (
        ", ".join(
            f"{sign}{number} {name}" + (f" ({size(sizes[name])})" if name in sizes else "")
            for name, number in sorted(counts.items())
            if number
        )
        or "–"
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int | None = None,
    styles: Mapping[str, str] | None = None,
) -> str:
    """Draw a table: a header, then one line a row, or as many lines as its longest cell needs.

    width: columns of the terminal, into which cells are folded; None: cells stay whole, so that grep finds sentences.
    Where it is too narrow for the columns, each row is several lines: its first cell, and a line for every other one.
    styles: SGR code by text of a cell in the column ``state``, and the header is bold; None: no escape sequences.
    """
    cells = [[cell.splitlines() or [""] for cell in row] for row in (columns, *rows)]
    widths = [max(_width(line) for row in cells for line in row[column]) for column in range(len(columns))]
    if width is not None:
        room = width - len(_GAP) * (len(columns) - 1)
        if sum(min(each, _LEAST) for each in widths) > room:
            return _records(columns, rows, width, styles)
        _shrink(widths, room)
        cells = [
            [[part for line in cell for part in _fold(line, room)] for cell, room in zip(row, widths, strict=True)]
            for row in cells
        ]
    lines = []
    for number, row in enumerate(cells):
        codes = ["" for _ in columns]
        if styles is not None:
            codes = [
                _BOLD if number == 0 else styles.get(rows[number - 1][at], "") if name == "state" else ""
                for at, name in enumerate(columns)
            ]
        for at in range(max(len(cell) for cell in row)):
            texts = [cell[at] if at < len(cell) else "" for cell in row]
            padded = [text + " " * (room - _width(text)) for text, room in zip(texts, widths, strict=True)]
            padded[-1] = padded[-1].rstrip()
            lines.append(_GAP.join(map(_styled, padded, codes)).rstrip())
    return "\n".join(lines)


def _records(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, styles: Mapping[str, str] | None
) -> str:
    """Draw each row as its first cell, and below it a line for each other cell that is not empty."""
    names = max(_width(name) for name in columns[1:]) if len(columns) > 1 else 0
    indent = 2 + names + len(_GAP)
    lines = []
    for row in rows:
        lines += _fold(row[0], width)
        for name, cell in zip(columns[1:], row[1:], strict=True):
            code = styles.get(cell, "") if styles is not None and name == "state" else ""
            parts = [part for line in cell.splitlines() for part in _fold(line, max(_LEAST, width - indent))]
            for number, part in enumerate(parts if cell != "–" else ()):
                head = f"  {name if number == 0 else '':<{names}}{_GAP}"
                lines.append(f"{head}{_styled(part, code)}".rstrip())
    return "\n".join(lines)


def _styled(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if code and text.strip() else text


def _shrink(widths: list[int], room: int) -> None:
    """Take columns from the widest cells until all fit into ``room``, or none can give any more."""
    while sum(widths) > room:
        widest = max(range(len(widths)), key=widths.__getitem__)
        if widths[widest] <= _LEAST:
            return
        second = max([each for at, each in enumerate(widths) if at != widest], default=0)
        widths[widest] = max(_LEAST, min(widths[widest] - 1, max(second, widths[widest] - (sum(widths) - room))))


def _fold(text: str, room: int) -> list[str]:
    """Cut a line into parts of at most ``room`` columns: between words, and inside a word only where it is longer."""
    parts, line = [], ""
    for word in text.split(" "):
        candidate = f"{line} {word}" if line else word
        while _width(candidate) > room:
            if line:
                parts.append(line)
                line, candidate = "", word
                continue
            fits = next((at for at in range(1, len(candidate) + 1) if _width(candidate[:at]) > room), 2) - 1
            parts.append(candidate[: max(1, fits)])
            candidate = candidate[max(1, fits) :]
        line = candidate
    return [*parts, line] if line or not parts else parts


def _width(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )
