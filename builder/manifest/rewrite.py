"""Replaces the ``[[task]]`` tables of a manifest in place; everything else of the file stays as it is, to the byte."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from builder.errors import DefectError, Problem, UsageError
from builder.manifest.document import Document
from builder.text import printable


def replace_tasks(text: str, keep: Callable[[int], bool], added: Sequence[str]) -> str:
    """Return a manifest's text without the tasks that are not kept, and with more after the last one.

    keep: True for the number, from 0, of a task that stays; added: whole ``[[task]]`` tables. Comments directly above a
    table belong to it. Raises UsageError for a text that is no TOML manifest of ``[[task]]`` tables.
    """
    document = Document.parse("manifest", text.encode())
    lines = text.splitlines(keepends=True)
    starts = _starts(document, lines)
    tables = sorted({line for path, line in document.lines.items() if lines[line - 1].lstrip().startswith("[")})
    removed: set[int] = set()
    end = len(lines)
    for number, start in enumerate(starts):
        following = next((line for line in tables if line > start and not _is_below(document, number, line)), None)
        first = _with_comments(lines, start)
        last = len(lines) if following is None else _with_comments(lines, following) - 1
        end = last
        if not keep(number):
            removed |= set(range(first, last + 1))
    before = [line for number, line in enumerate(lines[:end], start=1) if number not in removed]
    after = lines[end:]
    body = "".join(before).rstrip("\n") + "\n"
    for block in added:
        body += f"\n{block}\n"
    result = body + ("\n" if after else "") + "".join(after)
    _check(document, result)
    return result


def write(path: Path, text: str) -> None:
    """Write a file at once, with the mode that it had. Raises UsageError."""
    target = Path(os.path.realpath(path))
    try:
        mode = stat.S_IMODE(target.stat().st_mode)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
                stream.write(text)
                os.fchmod(stream.fileno(), mode)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"{printable(str(path))} cannot be written: {error.strerror}") from None


def _starts(document: Document, lines: Sequence[str]) -> list[int]:
    tasks = document.data.get("task", [])
    starts = [document.lines.get(("task", number), 0) for number in range(len(tasks))]
    for number, start in enumerate(starts):
        if not start or not lines[start - 1].lstrip().startswith("[["):
            problem = Problem(f"task {number + 1}", "it is no [[task]] table of a TOML file.")
            raise UsageError("the tasks of this manifest cannot be replaced in place", [problem])
    return starts


def _is_below(document: Document, number: int, line: int) -> bool:
    """Return whether the table in this line is a part of the task."""
    return any(at == line and path[:2] == ("task", number) for path, at in document.lines.items())


def _with_comments(lines: Sequence[str], start: int) -> int:
    """Return the first line (from 1) of a table, the comments directly above it included."""
    while start > 1 and lines[start - 2].lstrip().startswith("#"):
        start -= 1
    return start


def _check(before: Document, text: str) -> None:
    """Raise DefectError unless everything but the tasks has the same values as before."""
    after = Document.parse("manifest", text.encode())
    others = [{name: value for name, value in each.data.items() if name != "task"} for each in (before, after)]
    if others[0] != others[1]:
        raise DefectError("replacing the tasks of a manifest would have changed the rest of it")
