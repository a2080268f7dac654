"""The verb `help`: the program's help, a verb's, or a page of the reference."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli import help_texts, parser
from builder.cli.invocation import Invocation
from builder.cli.options import Args
from builder.cli.verbs import VERBS
from builder.errors import UsageError
from builder.text import did_you_mean


@dataclass(frozen=True, kw_only=True)
class HelpArgs(Args):
    """Arguments of `help`."""

    topic: tuple[str, ...] = ()


def run(args: HelpArgs, invocation: Invocation) -> None:
    """Print what is asked for. Raises UsageError for a word that is neither a verb nor a topic."""
    invocation.report.text = _text(args.topic).rstrip("\n")


def _text(words: tuple[str, ...]) -> str:
    if not words:
        return help_texts.program()
    name, *rest = words
    pages = help_texts.topics()
    if name in VERBS:
        action = next((each for each in VERBS[name].actions if rest == [each.name]), None)
        if not rest or action:
            return parser.parser(name, action).format_help()
        raise UsageError(f"{name} has no action {' '.join(rest)!r}; see: warm-cache help {name}")
    if name in pages and not rest:
        return pages[name].read_text(encoding="utf-8")
    hint = did_you_mean(name, [*VERBS, *pages])
    raise UsageError(f"there is no verb and no topic {' '.join(words)!r}; {hint}")
