"""Parse a command line and the WARM_CACHE_ variables into a verb and its frozen dataclass of arguments.

A flag takes precedence over a variable. Every mistake is a UsageError that names the flag or the variable.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from builder import __version__
from builder.cli import help_texts
from builder.cli.help_texts import Formatter, filled, rows, usage
from builder.cli.options import OPTIONS, OPTIONS_OF, Args
from builder.cli.statuses import statuses
from builder.cli.verb import Action
from builder.cli.verbs import VERBS
from builder.errors import UsageError
from builder.text import did_you_mean, printable

ENVIRONMENT = "WARM_CACHE_"
#: Variables of this name that are no option's: of jobs and hooks, and of this project's tests.
OTHERS = frozenset(
    (
        *("GPUS", "HOST", "IMAGE_ID", "INSIDE", "JOB", "MOUNT", "PRETEND", "RUN", "TEST"),
        *("BENCH_DIR", "BENCH_LAYER", "EXAMPLES", "FAULT_TABLE", "GPU_IMAGE", "GPU_PYTHON", "SOAK_SEED"),
        *("BUILD_OPTIONS", "STAND_IN", "STAND_IN_CACHE", "TESTS_COMPLETE", "TEST_IMAGE"),
    )
)
SWITCHES = {
    **dict.fromkeys(("1", "true", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "no", "n", "off", ""), False),
}


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line."""

    verb: str | None  # None: there was none, or an unknown one
    args: Args  # the verb's own dataclass, if the command line is right
    warnings: tuple[str, ...] = ()  # about the environment


class CommandLineError(UsageError):
    """A command line that does not parse. usage: the verb's usage line."""

    def __init__(self, message: str, verb: str | None) -> None:
        super().__init__(message)
        self.usage = f"usage: {usage(verb)}"


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would exit; --help and --version still raise SystemExit."""

    def __init__(self, verb: str | None = None, action: Action | None = None, **keywords: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=Formatter,
            usage=filled(f"usage: {usage(verb, action)}", indent=" " * 7)[7:],
            **keywords,
        )
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        text = text.replace("-v/--verbose: ", "--verbose: ")
        option, _, what = text.partition(": ")
        if what == "expected one argument":
            text = f"{option} needs a value"
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
        with contextlib.suppress(OSError, AttributeError):  # stdout is closed or full
            super()._print_message(message, file)


class _Top(_Parser):
    """The parser of the program's own help, whose verbs stand in groups."""

    def format_help(self) -> str:
        return help_texts.program()


def top(fill: Callable[[str, argparse.ArgumentParser], None] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the program's own help, which knows the verbs by name only.

    fill: is called with the name and the parser of each verb, and may add options to it.
    """
    parser = _Top(prog="warm-cache", description=help_texts.ABOUT)
    parser.add_argument("--version", action="version", version=f"warm-cache {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=argparse.ArgumentParser)
    for name, verb in VERBS.items():
        added = verbs.add_parser(name, help=verb.help)
        if fill is not None:
            fill(name, added)
    return parser


def parser(name: str, action: Action | None = None) -> argparse.ArgumentParser:
    """Return the parser of a verb, or of one of its actions."""
    verb = VERBS[name]
    text, example = (verb.help, verb.example) if action is None else (action.help, action.example)
    parts = [f"{filled(text[0].upper() + text[1:] + '.')}"]
    if verb.actions and action is None:
        parts.append("\n".join(["actions:", *rows([(each.name, each.help) for each in verb.actions])]))
    more = [f"More: warm-cache {name} ACTION --help"] if verb.actions and action is None else []
    found = _Parser(
        name,
        action,
        prog=f"warm-cache {name}" + (f" {action.name}" if action else ""),
        description="\n\n".join(parts),
        epilog="\n\n".join(
            [
                *map(filled, filter(None, verb.details.split("\n\n"))),
                *more,
                filled(f"example: {example}"),
                filled(statuses(name, verb)),
            ]
        ),
    )
    add_options(found, name, action)
    return found


def add_options(parser: argparse.ArgumentParser, name: str, action: Action | None = None) -> list[argparse.Action]:
    """Add the verb's arguments and options to a parser, without choices: `_check` has them, for variables too."""
    added, verb, own = [], VERBS[name], OPTIONS_OF.get(name, {})
    for argument in verb.arguments_of(action):
        nargs = {(True, False): "+", (True, True): "*", (False, True): "?"}.get((argument.many, argument.optional))
        added.append(parser.add_argument(argument.name, metavar=argument.metavar, nargs=nargs, help=argument.help))
    for option in verb.options_of(action):
        flags = ["-v", "--verbose"] if option == "verbose" else [f"--{option}"]
        words = {**OPTIONS[option], **own.get(option, {})}
        keywords = {keyword: value for keyword, value in words.items() if keyword != "choices"}
        added.append(parser.add_argument(*flags, **keywords))
    return added


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> CommandLine:
    """Return the verb and its arguments. Raises UsageError, and SystemExit after --help and --version."""
    words, command = _split(argv)
    name = _verb(words)
    verb = VERBS[name]
    # An action that does not follow its verb at once (`view --json list`) is an argument like any other.
    action = next((each for each in verb.actions if words[1:2] == [each.name]), None)
    found, rest = parser(name, action).parse_known_intermixed_args(words[2 if action else 1 :])
    if rest:
        raise CommandLineError(_surplus(name, rest, action), name)
    values = {**vars(found), **({"action": action.name} if action else {})}
    sources = _add_variables(name, verb.options_of(action), values, environ)
    _check(name, values, sources)
    _check_action(name, values)
    if verb.needs == "command":
        values["command"] = command
    given = {name: value for name, value in values.items() if value is not None}
    fixed = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return CommandLine(name, _dataclass(name)(**fixed, sources=sources), tuple(misspelt(environ)))


def unparsed(argv: Sequence[str], environ: Mapping[str, str]) -> CommandLine:
    """Return what is known of a wrong command line: the verb, if there is one, and whether it has --json."""
    words, _ = _split(argv)
    verb = words[0] if words and words[0] in VERBS else None
    switch = SWITCHES.get(environ.get(f"{ENVIRONMENT}JSON", "").strip().lower(), False)
    owner = verb is not None and VERBS[verb].needs == "command"  # stdout is the command's
    verbose = "-v" in words or "--verbose" in words
    return CommandLine(
        verb, Args(json="--json" in words or (switch and not owner), verbose=verbose), tuple(misspelt(environ))
    )


def module(verb: str) -> Any:
    """Return the module of a verb, which is loaded with the verb's first use: a check need not load all others."""
    return importlib.import_module(f"builder.cli.commands.{verb.replace('-', '_')}")


def _dataclass(verb: str) -> Callable[..., Args]:
    found: Callable[..., Args] = getattr(module(verb), verb.title().replace("-", "") + "Args")
    return found


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of this program, and those of a wrapped command, which follow the first ``--``."""
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


def _surplus(name: str, rest: list[str], action: Action | None) -> str:
    verb = VERBS[name]
    title = f"{name} {action.name}" if action else name
    for word in rest:
        option = word.partition("=")[0]
        if not option.startswith("-") or option in ("-", "--"):
            continue
        plain = option.removeprefix("--")
        others = [f"{name} {each.name}" for each in verb.actions if plain in each.own]
        others = others or [other for other, its in VERBS.items() if plain in its.options]
        if others:
            return f"{option} is no option of {title}, but of {', '.join(others)}"
        hint = _close(option, (f"--{known}" for known in verb.options)) or f"see: warm-cache {title} --help"
        return f"there is no option {option!r}; {hint}"
    more = "; the command follows after two dashes" if verb.needs == "command" else ""
    argument = next((word for word in rest if word != "--"), "--")
    return f"{title} takes no argument {argument!r}{more}"


def _close(word: str, known: Iterable[str]) -> str:
    import difflib  # only where something is wrong already

    found = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {found[0]}?" if found else ""


def _add_variables(
    verb: str, options: Iterable[str], values: dict[str, Any], environ: Mapping[str, str]
) -> dict[str, str]:
    """Add the values that variables give to options without a flag. Return the variables used, by option."""
    sources: dict[str, str] = {}
    chosen = bool(values.get("manifest") is not None or values.get("profile") is not None)
    for option in options:
        name = option.replace("-", "_")
        variable = ENVIRONMENT + name.upper()
        value: Any = environ.get(variable)
        if not value or values[name] not in (None, False):
            continue
        if option in ("manifest", "profile") and chosen:
            continue  # a flag takes precedence, also over the other way to name a manifest
        action = {**OPTIONS[option], **OPTIONS_OF.get(verb, {}).get(option, {})}.get("action")
        if action == "store_true":
            word = value.strip().lower()
            if word not in SWITCHES:
                raise UsageError(f"{variable}: a switch is 1 (true, yes, on) or 0 (false, no, off), found {value!r}")
            value = SWITCHES[word]
        elif action == "append":
            value = [part.strip() for part in value.split(",")]
        values[name] = value
        sources[option] = variable
    return sources


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable that looks like an option's, and is none's."""
    known = {option.replace("-", "_").upper() for option in OPTIONS}
    strange = {name.removeprefix(ENVIRONMENT) for name in environ if name.startswith(ENVIRONMENT)} - known - OTHERS
    if not strange:
        return []
    import difflib  # only where something may be wrong

    close = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.7) for name in sorted(strange)}
    return [
        f"{printable(ENVIRONMENT + name)} is no option's variable, and is not read"
        + (f"; did you mean {ENVIRONMENT}{matches[0]}?" if matches else "")
        for name, matches in close.items()
    ]


def _check(name: str, values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Raise UsageError for a value that is not UTF-8, or none of its choices."""
    for option in VERBS[name].options:
        location = sources.get(option, f"--{option}")
        for text in _texts(values.get(option.replace("-", "_"))):
            if not _is_text(text):
                raise UsageError(f"{location}: {text!r} is not valid UTF-8, and cannot be used")
            choices = OPTIONS[option].get("choices")
            if choices and text not in choices:
                message = f"{location} is {text!r}: one of {', '.join(choices)} is wanted"
                raise UsageError(message) if option in sources else CommandLineError(message, name)
    for argument in VERBS[name].arguments:
        for text in _texts(values.get(argument.name)):
            if not _is_text(text):
                raise UsageError(f"{argument.metavar}: {text!r} is not valid UTF-8, and cannot be used")
            if argument.choices and text not in argument.choices:
                raise CommandLineError(f"{argument.metavar} is {text!r}: {did_you_mean(text, argument.choices)}", name)


def _check_action(name: str, values: Mapping[str, Any]) -> None:
    """Raise CommandLineError for an argument that an action needs, or an option or argument that it does not take."""
    verb = VERBS[name]
    action = next((each for each in verb.actions if each.name == values.get("action")), None)
    if action is None:
        return
    title = f"{name} {action.name}"
    for argument in verb.arguments:
        given = values.get(argument.name) not in (None, [])
        if argument.name in action.arguments and not given:
            raise CommandLineError(f"{title} needs a {argument.metavar}: the {argument.help}", name)
        if given and argument.name not in (*action.arguments, "action"):
            raise CommandLineError(f"{title} takes no {argument.metavar}, found {values[argument.name]!r}", name)
    for option in verb.own:
        if values.get(option.replace("-", "_")) and option not in action.own:
            raise CommandLineError(_surplus(name, [f"--{option}"], action), name)


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _is_text(value: str) -> bool:
    """Return whether a value is valid UTF-8: other bytes are lone surrogates in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
