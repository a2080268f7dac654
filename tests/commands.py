"""The commands that messages, help and documents recommend, as the parser reads them, and other programs' commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from builder.cli import parser
from builder.cli.options import OPTIONS, OPTIONS_OF
from builder.cli.verbs import VERBS
from builder.errors import BuilderError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "docker/README.md")),
    *(ROOT / "builder").rglob("*.md"),
    *(ROOT / ".github").rglob("*.*"),
    *(ROOT / "docker" / "systemd").iterdir(),
]

#: The program, a word, and what may follow it on the line up to the end of the command.
COMMAND = re.compile(r"warm-cache ([a-z]+(?:-[a-z]+)*)\b([^`'\"|;&#)\n]*)")
OPTION = re.compile(r"(?<!\S)--([a-z][a-z-]*)")
#: A remedy that is another program's command.
_OTHER = re.compile(r"\b[Rr]un(?: there)?: (?:sudo )?(?:[A-Z_]+=\S+ )?([a-z][a-z-]+(?: [a-z][a-z-]+)?)")


def messages(path: Path) -> Iterator[str]:
    """Every text in the program, an f-string with its values left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values)


def texts() -> Iterator[str]:
    """Every text that people read."""
    for path in sorted((ROOT / "builder").rglob("*.py")):
        yield from messages(path)
    yield from (path.read_text(encoding="utf-8") for path in DOCUMENTS if path.is_file())


def recommended(values: Mapping[str, str], arguments: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return every recommended command as arguments of the program, by itself as a line.

    What follows a command in its sentence is found by the parser: the longest beginning of the line that it takes.
    values: by option, in place of the example's or placeholder's value. arguments: positional ones, by verb, or by verb
    and action.
    """
    found = {}
    for text in texts():
        for verb, rest in COMMAND.findall(text.replace("\\\n", " ")):
            if verb in VERBS and (argv := _parsed(verb, rest.split(), values, arguments)) is not None:
                found[" ".join(argv)] = argv
    return dict(sorted(found.items()))


def _parsed(
    verb: str, words: list[str], values: Mapping[str, str], arguments: Mapping[str, Sequence[str]]
) -> list[str] | None:
    """Return the command; None for a verb that is only mentioned. Raises AssertionError for one that is not taken."""
    for end, positional in ((end, yes) for end in range(len(words), -1, -1) for yes in (False, True)):
        argv = _concrete(verb, words[:end], values, arguments, positional and end > 0)
        try:
            parser.parse(argv, {})
        except (BuilderError, SystemExit):
            continue
        return argv
    assert not OPTION.search(" ".join(words)), f"warm-cache {verb} {' '.join(words)}: the parser does not take it"
    return None


def _concrete(
    verb: str,
    words: Sequence[str],
    values: Mapping[str, str],
    arguments: Mapping[str, Sequence[str]],
    positional: bool,
) -> list[str]:
    """Return the words with this machine's values in the place of the example's. positional: with its arguments."""
    own, argv = list(words), [verb]
    names = [action.name for action in VERBS[verb].actions]
    if own and own[0] in names:
        argv.append(own.pop(0))
    options: list[str] = []
    command = own[own.index("--") :] if "--" in own else []
    own = own[: len(own) - len(command)]
    while own:
        word = own.pop(0).rstrip(".,:") if len(own) == 1 else own.pop(0)
        if not word.startswith("--"):
            positional = True
        else:
            options.append(word)
            fields = {**OPTIONS, **OPTIONS_OF.get(verb, {})}.get(word[2:], {"action": "unknown"})
            if own and fields.get("action", "append") in ("append", "store") and not own[0].startswith("--"):
                example = own.pop(0).rstrip(".,:")
                options.append(values.get(word, example))
    wanted = [*arguments.get(" ".join(argv), ())] if positional else []
    argv += [*wanted, *options]
    if command:
        argv += ["--", "true"]
    if {"--profile", "--manifest"}.isdisjoint(options) and "manifest" in VERBS[verb].options and verb != "import-tests":
        at = argv.index("--") if "--" in argv else len(argv)
        argv[at:at] = ["--manifest", values["--manifest"]]
    return ["--manifest" if word == "--profile" else word for word in argv]


def other_programs() -> set[str]:
    """Return the other programs' commands that remedies name, by program and first word."""
    found: set[str] = set()
    for path in sorted((ROOT / "builder" / "run").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, _WITH_DOCSTRING)
        }
        found |= {name for text in messages(path) if text not in docstrings for name in _OTHER.findall(text)}
    return {name for name in found if not name.startswith("warm-cache")}


_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
