"""What `--help` shows, at the width of the terminal: usage lines, columns, and the page of the program itself."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from builder.cli.statuses import STATUSES
from builder.cli.verb import GROUPS, Action
from builder.cli.verbs import VERBS

ABOUT = (
    "Compile every JIT kernel that sglang's test jobs will need into a persistent cache, prove it, and leave nothing "
    "behind."
)
#: The reference, for `help` and for GitHub.
PAGES = Path(__file__).parents[1] / "docs"
#: Columns of the longest and of the shortest line, and of a terminal that is too narrow for two columns of text.
_WIDEST, _NARROWEST, _NARROW = 80, 20, 60


def usage(verb: str | None, action: Action | None = None) -> str:
    """Return the usage line of a verb, of one of its actions, or of the program."""
    if verb is None:
        return "warm-cache VERB [option ...]"
    words = VERBS[verb]
    arguments = [
        (f"[{each.metavar}]" if each.optional and action is None else each.metavar) + (" ..." if each.many else "")
        for each in words.arguments_of(action)
    ]
    names = [verb, *([action.name] if action else [])]
    return " ".join(["warm-cache", *names, *arguments, "[option ...]"]) + (
        " -- CMD [argument ...]" if words.needs == "command" else ""
    )


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Lays options out in two columns, narrower ones on a narrow terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28 if _width() > _NARROW else 16, width=_width())


def topics() -> dict[str, Path]:
    """Return the pages of the reference, by the word after `help`."""
    return {path.stem: path for path in sorted(PAGES.glob("*.md"))}


def filled(text: str, indent: str = "", first: str = "") -> str:
    """Return the text in lines of this terminal. No word is cut: names are searched for, and copied."""
    return textwrap.fill(
        text,
        _width(),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def rows(entries: Sequence[tuple[str, str]], room: int = 0) -> Iterator[str]:
    """Yield names, each with its text beside it, or below it on a narrow terminal. room: columns for the names."""
    room = room or _room(entries)
    for name, text in entries:
        if _width() > _NARROW:
            yield filled(text, " " * room, f"  {name:<{room - 2}}")
        else:
            yield f"  {name}"
            yield filled(text, " " * 4, " " * 4)


def program() -> str:
    """Return the help of the program: what it is for, its verbs by group, topics, and exit statuses."""
    lines = [filled(f"usage: {usage(None)}"), "", filled(ABOUT), ""]
    room = _room([(name, "") for name in VERBS])
    for group in GROUPS:
        members = [(name, verb.help) for name, verb in VERBS.items() if verb.group == group]
        if members:
            lines += [f"{group}:", *rows(members, room), ""]
    lines += [
        filled("More: warm-cache help VERB, warm-cache help TOPIC"),
        filled(f"Topics: {', '.join(topics())}"),
        "",
        filled(f"example: {VERBS['warm'].example}"),
        "",
        filled(STATUSES),
    ]
    return "\n".join(lines) + "\n"


def _room(entries: Sequence[tuple[str, str]]) -> int:
    return max(len(name) for name, _ in entries) + 4


def _width() -> int:
    """Return the columns of a help text on this terminal."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((80, 24)).columns))
