"""A manifest's text as a document: typed reading that collects every problem, each with its line.

A Python 3.10 that has nothing installed cannot read TOML. For it, and for programs, the same document may be JSON.

Reading does not stop at the first mistake: a wrong value is recorded as a problem and read as the default, so that one
run shows all problems. After reading, `Document.problems` has them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from builder.errors import Problem, UsageError
from builder.manifest.values import a_table, list_of
from builder.text import did_you_mean, printable

if sys.version_info >= (3, 11):
    import tomllib

    HAS_TOML = True
else:
    try:
        import tomli as tomllib

        HAS_TOML = True
    except ImportError:
        try:  # every pip of such a Python contains one, and a test job has a pip
            from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

            HAS_TOML = True
        except ImportError:
            HAS_TOML = False

NO_TOML = "this Python is older than 3.11 and has no tomli, so it cannot read TOML."
TO_JSON = (
    "Give it the manifest as JSON, made by a newer Python: "
    "python3 -c 'import json, sys, tomllib; json.dump(tomllib.load(sys.stdin.buffer), sys.stdout)' "
    "< manifest.toml > manifest.json"
)

T = TypeVar("T")
D = TypeVar("D")  # a default, which may be None
Path = tuple[Any, ...]  # keys from the root; a number for a table of an array

_KEY = r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'"""
_DOTTED = rf"(?:{_KEY})(?:[ \t]*\.[ \t]*(?:{_KEY}))*"
_STATEMENT = re.compile(rf"[ \t]*(?:(?P<open>\[\[?)[ \t]*(?P<header>{_DOTTED})[ \t]*\]\]?|(?P<key>{_DOTTED})[ \t]*=)")
_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|' + r"'''.*?'{3,5}" + r'|"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'|#[^\n]*|[\[{]|[\]}]|\n",
    re.DOTALL,
)


def _split(dotted: str) -> list[str]:
    return [part[1:-1] if part[0] in "\"'" else part for part in re.findall(_KEY, dotted)]


def find_lines(text: str) -> dict[Path, int]:
    """Return the line (from 1) of every table and key of a valid TOML text, without keys of inline tables."""
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()

    def resolve(parts: list[str]) -> Path:
        path: Path = ()
        for part in parts:
            path += (part,)
            if path in counts:
                path += (counts[path] - 1,)
        return path

    position, line = 0, 1
    while position < len(text):
        statement = _STATEMENT.match(text, position)
        if statement and statement["header"]:
            parts = _split(statement["header"])
            if statement["open"] == "[[":
                whole = (*resolve(parts[:-1]), parts[-1])
                counts[whole] = counts.get(whole, 0) + 1
            table = resolve(parts)
            lines.setdefault(table, line)
        elif statement:
            lines.setdefault((*table, *_split(statement["key"])), line)
        position, depth = (statement.end() if statement else position), 0
        for token in _TOKEN.finditer(text, position):
            line += token[0].count("\n")
            position = token.end()
            depth += (token[0] in "[{") - (token[0] in "]}")
            if token[0] == "\n" and depth <= 0:
                break
        else:
            break
    return lines


def _refusal(text: str, error: ValueError | RecursionError) -> tuple[int, str]:
    """Return the line where a text is no TOML, and why it is none."""
    at = re.search(r"\(at line (\d+)", str(error))
    if isinstance(error, RecursionError):
        return text.count("\n") + 1, "nested too deeply"
    if not isinstance(error, tomllib.TOMLDecodeError):
        # Python reads no decimal number of thousands of digits, and its error has no line.
        longest = max(re.finditer(r"[0-9_]+", text), key=lambda found: len(found[0]))
        return text.count("\n", 0, longest.start()) + 1, "a number of too many digits"
    return int(at[1]) if at else text.count("\n") + 1, printable(re.sub(r" \(at .*", "", str(error)))


def _json(name: str, text: str) -> dict[str, Any]:
    """Parse a document that begins with a brace, as TOML never does. Raises UsageError with the line of the mistake."""
    try:
        data: dict[str, Any] = json.loads(text)
    except RecursionError:
        raise UsageError(f"{name} is not valid JSON", [Problem(name, "it is nested too deeply.")]) from None
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        reason = printable(getattr(error, "msg", str(error)))
        raise UsageError(f"{name} is not valid JSON", [Problem(f"{name}:{line}", reason)]) from None
    return data


def _oversized(data: Any) -> Iterator[Path]:
    """Yield the paths of integers that do not fit into 64 bits, the most that TOML and JSON readers guarantee."""
    todo: list[tuple[Path, Any]] = [((), data)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo += [((*path, key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [((*path, index), inner) for index, inner in enumerate(value)]
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            yield path


@dataclass
class Document:
    """A parsed file. name: its name in messages."""

    name: str
    data: dict[str, Any]
    lines: Mapping[Path, int]
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def parse(cls, name: str, raw: bytes) -> Document:
        """Parse TOML or JSON. Raises UsageError with the line of the mistake."""
        try:
            text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            body = error.object  # without the byte order mark
            line = body.count(b"\n", 0, error.start) + 1
            problem = Problem(
                f"{name}:{line}", f"byte 0x{body[error.start]:02x} is not UTF-8.", "Save the file as UTF-8."
            )
            raise UsageError(f"{name} cannot be read", [problem]) from None
        data: dict[str, Any] = {}
        lines: dict[Path, int] = {}
        if text.lstrip().startswith("{"):
            data = _json(name, text)
        elif text.strip() and not HAS_TOML:
            raise UsageError(f"{name} cannot be read", [Problem(name, NO_TOML, TO_JSON)])
        elif text.strip():
            try:
                data, lines = tomllib.loads(text), find_lines(text)
            except (ValueError, RecursionError) as error:
                line, reason = _refusal(text, error)
                raise UsageError(f"{name} is not valid TOML", [Problem(f"{name}:{line}", reason)]) from None
        document = cls(name, data, lines)
        for path in _oversized(data):
            document.add_problem(path, "an integer of more than 64 bits:", "none is that large.")
        if document.problems:
            raise UsageError(f"{name} cannot be used as it is", document.in_order())
        return document

    def location(self, path: Path) -> str:
        """Return ``FILE:LINE`` of the value at this path, or of the nearest table around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines.get(path, 1)}"

    def add_problem(self, path: Path, text: str, remedy: str = "") -> None:
        self.problems.append(Problem(self.location(path), text, remedy))

    def root(self) -> Table:
        return Table(self, (), self.data)

    def in_order(self) -> list[Problem]:
        """Return the problems by line; those of options last."""
        prefix = f"{self.name}:"

        def line(problem: Problem) -> float:
            return int(problem.location[len(prefix) :]) if problem.location.startswith(prefix) else float("inf")

        return sorted(self.problems, key=line)


@dataclass
class Table:
    """One table of the document. Each read names a key; `finish` reports the keys that were not read."""

    document: Document
    path: Path
    data: Mapping[str, Any]
    known: dict[str, None] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        return key in self.data

    def add_problem(self, key: str | None, text: str, remedy: str = "") -> None:
        self.document.add_problem(self.path if key is None else (*self.path, key), text, remedy)

    def read(self, key: str, convert: Callable[[Any], T], default: D) -> T | D:
        """Return the converted value; the default where it is missing or wrong.

        convert: raises ValueError with what was expected and what was found.
        """
        self.known[key] = None
        if key not in self.data:
            return default
        try:
            return convert(self.data[key])
        except ValueError as error:
            self.add_problem(key, f"{printable(key)}: {error}.")
            return default

    def require(self, key: str, convert: Callable[[Any], T], default: D) -> T | D:
        if key not in self.data:
            self.add_problem(None, f"{self.title()} needs {key!r}.")
        return self.read(key, convert, default)

    def table(self, key: str) -> Table:
        """Return the table at this key; an empty one where there is none."""
        return Table(self.document, (*self.path, key), self.read(key, a_table, {}))

    def tables(self, key: str) -> list[Table]:
        """Return the tables of the array at this key."""
        rows = self.read(key, list_of(a_table, f"[[{key}]]"), ())
        return [Table(self.document, (*self.path, key, index), row) for index, row in enumerate(rows)]

    def title(self) -> str:
        names = [str(part) for part in self.path if isinstance(part, str)]
        in_array = bool(self.path) and isinstance(self.path[-1], int)
        return ("[[%s]]" if in_array else "[%s]") % ".".join(names) if names else "the file"

    def finish(self) -> None:
        for key in self.data:
            if key not in self.known:
                self.add_problem(key, f"{self.title()} has no key {key!r};", did_you_mean(key, self.known))
