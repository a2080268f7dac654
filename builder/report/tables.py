"""A table as plain text, with the standard library alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_GAP = "  "


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One line a row, or as many as its longest cell has; columns as wide as they need to be."""
    cells = [[cell.splitlines() or [""] for cell in row] for row in (columns, *rows)]
    widths = [max(_width(line) for row in cells for line in row[column]) for column in range(len(columns))]
    lines = []
    for row in cells:
        for at in range(max(len(cell) for cell in row)):
            texts = [cell[at] if at < len(cell) else "" for cell in row]
            padded = [text + " " * (width - _width(text)) for text, width in zip(texts, widths, strict=True)]
            lines.append(_GAP.join(padded).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )
