"""From a command line to what was said: a verb, its options and arguments, and the variables that stand for options.

A flag wins over the environment. Whatever is wrong is a UsageError that names where it was said.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from builder import __version__
from builder.cli.options import OPTIONS, STATUSES, VERBS, Verb, statuses
from builder.errors import UsageError
from builder.text import did_you_mean

ENVIRONMENT = "WARM_CACHE_"
SWITCHES = {
    **dict.fromkeys(("1", "true", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "no", "n", "off", ""), False),
}
#: Options that the program asks about for every verb, whether it has them or not.
SHARED_VALUES = ("manifest", "profile", "cache", "image", "models")
#: No line of a help text is longer.
WIDTH = 80


class CommandLineError(UsageError):
    """The words themselves are wrong. usage: how they would be right."""

    def __init__(self, message: str, verb: str | None) -> None:
        super().__init__(message)
        self.usage = f"usage: {usage(verb)}"


def usage(verb: str | None) -> str:
    """One line."""
    if verb is None:
        return "warm-cache VERB [option ...]"
    words = VERBS[verb]
    arguments = [
        (f"[{each.metavar}]" if each.optional else each.metavar) + (" ..." if each.many else "")
        for each in words.arguments
    ]
    return " ".join(["warm-cache", verb, *arguments, "[option ...]"]) + (
        " -- CMD [argument ...]" if words.needs == "command" else ""
    )


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process; --help and --version still do."""

    def __init__(self, verb: str | None = None, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, usage=usage(verb), **keywords)
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        text = text.replace("-v/--verbose: ", "--verbose: ")
        option, _, what = text.partition(": ")
        if what == "expected one argument":
            text = f"{option} wants a value"
        elif what.startswith("ignored explicit argument"):
            text = f"{option} takes no value"
        elif text.startswith("the following arguments are required: "):
            missing = text.partition(": ")[2]
            known = (
                [each.choices for each in VERBS[self.verb].arguments if each.metavar == missing] if self.verb else []
            )
            text = f"which {missing}?" + (f" One of {', '.join(known[0])}" if known and known[0] else "")
        raise CommandLineError(text, self.verb)

    def _print_message(self, message: str, file: Any = None) -> None:
        with contextlib.suppress(OSError, AttributeError):  # nobody there to read it
            super()._print_message(message, file)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(WIDTH, shutil.get_terminal_size((80, 24)).columns))


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def top(fill: Callable[[str, argparse.ArgumentParser], None] | None = None) -> argparse.ArgumentParser:
    """The help of the whole; it knows the verbs by name only. fill: what more each of them gets, for who completes
    words.
    """
    parser = _Parser(
        prog="warm-cache",
        description=_filled(
            "Compile every JIT kernel that sglang's test jobs will ask for into a persistent cache, prove it, and "
            "leave nothing behind."
        ),
        epilog=f"example: {VERBS['warm'].example}\n\n{STATUSES}",
    )
    parser.add_argument("--version", action="version", version=f"warm-cache {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=argparse.ArgumentParser)
    for name, verb in VERBS.items():
        added = verbs.add_parser(name, help=verb.help)
        if fill is not None:
            fill(name, added)
    return parser


def parser(name: str) -> argparse.ArgumentParser:
    """The options of this verb."""
    verb = VERBS[name]
    found = _Parser(
        name,
        prog=f"warm-cache {name}",
        description=_filled(verb.help[0].upper() + verb.help[1:] + "."),
        epilog="\n\n".join(
            [
                *map(_filled, filter(None, verb.details.split("\n\n"))),
                f"example: {verb.example}",
                _filled(statuses(name, verb)),
            ]
        ),
    )
    add_words(found, verb)
    return found


def add_words(parser: argparse.ArgumentParser, verb: Verb) -> list[argparse.Action]:
    """Gives a parser the verb's arguments and options. Which values those may have is looked at later, with the
    environment's (`_check`).
    """
    added = []
    for argument in verb.arguments:
        nargs = {(True, False): "+", (True, True): "*", (False, True): "?"}.get((argument.many, argument.optional))
        added.append(parser.add_argument(argument.name, metavar=argument.metavar, nargs=nargs, help=argument.help))
    for option in verb.options:
        flags = ["-v", "--verbose"] if option == "verbose" else [f"--{option}"]
        keywords = {keyword: value for keyword, value in OPTIONS[option].items() if keyword != "choices"}
        added.append(parser.add_argument(*flags, **keywords))
    return added


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Namespace:
    """Everything that was said, by flags and by the environment; `sources` tells which options came from a variable.

    Raises UsageError, and SystemExit after --help and --version.
    """
    words, command = _split(argv)
    name = _verb(words)
    said, rest = parser(name).parse_known_intermixed_args(
        words[1:], Namespace(verb=name, command=command, sources={}, json=False, **dict.fromkeys(SHARED_VALUES))
    )
    if rest:
        raise CommandLineError(_surplus(name, rest), name)
    _take(said, environ)
    _check(said)
    said.misspelt = misspelt(environ)
    return said


def unparsed(argv: Sequence[str], environ: Mapping[str, str]) -> Namespace:
    """What can be known of a command line that is wrong: the verb, if there is one, and whether JSON is wanted."""
    words, _ = _split(argv)
    verb = words[0] if words and words[0] in VERBS else None
    switch = SWITCHES.get(environ.get(f"{ENVIRONMENT}JSON", "").strip().lower(), False)
    owner = verb is not None and VERBS[verb].needs == "command"  # stdout is the command's
    return Namespace(verb=verb, json="--json" in words or (switch and not owner), verbose=False, sources={})


def place(said: Namespace, option: str) -> str:
    """Where an option's value came from: the flag, or the variable."""
    return str(said.sources.get(option, f"--{option}"))


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words and the wrapped command's, which begins after the first ``--`` and is nobody's to interpret."""
    words = list(argv)
    verb = VERBS.get(words[0]) if words else None
    at = words.index("--") if verb and verb.needs == "command" and "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _verb(words: list[str]) -> str:
    if not words:
        raise CommandLineError(f"which verb? One of {', '.join(VERBS)}", None)
    word = words[0]
    if word in ("-h", "--help", "--version"):
        top().parse_args([word])  # prints, and raises SystemExit
    if word in VERBS:
        return word
    if not word.startswith("-"):
        raise CommandLineError(f"there is no verb {word!r}; {did_you_mean(word, VERBS)}", None)
    if word.partition("=")[0].removeprefix("--") in OPTIONS or word == "-v":
        raise CommandLineError(f"{word} comes after the verb, which is one of {', '.join(VERBS)}", None)
    raise CommandLineError(f"there is no option {word!r}; see: warm-cache --help", None)


def _surplus(name: str, rest: list[str]) -> str:
    verb = VERBS[name]
    for word in rest:
        option = word.partition("=")[0]
        if not option.startswith("-") or option in ("-", "--"):
            continue
        others = [other for other, its in VERBS.items() if option.removeprefix("--") in its.options]
        if others:
            return f"{option} is no option of {name}, but of {', '.join(others)}"
        hint = _close(option, (f"--{known}" for known in verb.options)) or f"see: warm-cache {name} --help"
        return f"there is no option {option!r}; {hint}"
    more = "; the command follows after two dashes" if verb.needs == "command" else ""
    argument = next((word for word in rest if word != "--"), "--")
    return f"{name} takes no argument {argument!r}{more}"


def _close(word: str, known: Iterable[str]) -> str:
    import difflib  # only where something is wrong already

    found = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {found[0]}?" if found else ""


def _take(said: Namespace, environ: Mapping[str, str]) -> None:
    """What the environment says, where no flag does."""
    chosen = said.manifest is not None or said.profile is not None
    for option in VERBS[said.verb].options:
        name = option.replace("-", "_")
        variable = ENVIRONMENT + name.upper()
        value: Any = environ.get(variable)
        if not value or getattr(said, name) not in (None, False):
            continue
        if option in ("manifest", "profile") and chosen:
            continue  # a flag wins over the environment, also over the other way to say it
        action = OPTIONS[option].get("action")
        if action == "store_true":
            word = value.strip().lower()
            if word not in SWITCHES:
                raise UsageError(f"{variable}: a switch is 1 (true, yes, on) or 0 (false, no, off), found {value!r}")
            value = SWITCHES[word]
        elif action == "append":
            value = [part.strip() for part in value.split(",")]
        setattr(said, name, value)
        said.sources[option] = variable


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """Variables that are no option's and look like one's, a sentence each. Others with the prefix may be anybody's."""
    known = {option.replace("-", "_").upper() for option in OPTIONS}
    strange = {name.removeprefix(ENVIRONMENT) for name in environ if name.startswith(ENVIRONMENT)} - known
    if not strange:
        return []
    import difflib  # only where something may be wrong

    close = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in sorted(strange)}
    return [
        f"{ENVIRONMENT}{name} is no option's variable, and is not read; did you mean {ENVIRONMENT}{near[0]}?"
        for name, near in close.items()
        if near
    ]


def _check(said: Namespace) -> None:
    for option in VERBS[said.verb].options:
        value, where = getattr(said, option.replace("-", "_")), place(said, option)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                continue
            if not _is_text(text):
                raise UsageError(f"{where}: {text!r} is not valid UTF-8, and cannot be used")
            choices = OPTIONS[option].get("choices")
            if choices and text not in choices:
                message = f"{where} is {text!r}: one of {', '.join(choices)} is wanted"
                raise UsageError(message) if option in said.sources else CommandLineError(message, said.verb)
    for argument in VERBS[said.verb].arguments:
        value = getattr(said, argument.name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not _is_text(text):
                raise UsageError(f"{argument.metavar}: {text!r} is not valid UTF-8, and cannot be used")
            if argument.choices and text is not None and text not in argument.choices:
                message = f"{argument.metavar} is {text!r}: {did_you_mean(text, argument.choices)}"
                raise CommandLineError(message, said.verb)


def _is_text(value: str) -> bool:
    """Bytes that are not UTF-8 come as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
