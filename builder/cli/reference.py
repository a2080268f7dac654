"""Generates pages of the reference from the program: commands, exit statuses, metrics, JSON.

``python3 -m builder.cli.reference`` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from builder import errors
from builder.cli import json_page
from builder.cli.help_texts import PAGES, usage
from builder.cli.options import OPTIONS, OPTIONS_OF
from builder.cli.statuses import MEANS, MEANS_OF, REMEDIES, codes
from builder.cli.verb import GROUPS, SHARED, Action, Verb
from builder.cli.verbs import VERBS
from builder.report import metrics

COMMANDS, STATUSES, METRICS, JSON = (PAGES / f"{name}.md" for name in ("commands", "exit-statuses", "metrics", "json"))
_GENERATED = "This page is generated: `python3 -m builder.cli.reference`."
_COMMANDS = f"""\
# Commands

`warm-cache VERB [option ...]`, or `python3 -m builder VERB …`. `warm-cache help VERB` prints this for one verb.

Every option can be given as a variable, too: `--lock-timeout 5m` is `WARM_CACHE_LOCK_TIMEOUT=5m`; a switch is 1 or 0,
and an option that may be repeated is a list with commas. A flag takes precedence over a variable, a variable over the
manifest, and the manifest over the default; `warm-cache config` shows which one it was. Durations are `90s`, `20m`,
`1h30m`, `14d`; a bare number is seconds. Sizes are `200G`, `512M` (powers of 1024).

{_GENERATED}
"""
_STATUSES = f"""\
# Exit statuses

A script can rely on these numbers; none of them will change its meaning. Where several apply, the first of these
counts: a signal, 1, 16, 13, 14, 11. Only `hold` ends with the status of the command that it runs.

{_GENERATED}
"""
_METRICS = f"""\
# Metrics and the webhook

`refresh`, `check`, `pull` and `report` write metrics with `--metrics FILE`, in the text format of Prometheus' textfile
collector, by one rename, however they end. They may share a file: each replaces its own metrics and leaves the others.
All have the labels `manifest` (its path, or the profile) and `cache`. What a run did not measure keeps its value of the
run before, where the last column says so. `report --audits DIR --metrics FILE` adds up the audits of many runners, on
one machine. A dashboard and rules for alerts are in `docker/grafana/` of the repository.

{_GENERATED}

| metric | type | labels | meaning | by | kept |
| --- | --- | --- | --- | --- | --- |
"""
_WEBHOOK = """
## The webhook

`WARM_CACHE_WEBHOOK=URL` (or `--webhook`, which other users of the machine can read in the list of processes) gets one
POST when a refresh ends, with a JSON document:

| field | meaning |
| --- | --- |
| `text` | one sentence for people; chat services show it |
| `schema` | 1 |
| `verb` | `refresh` |
| `host` | name of the machine |
| `exit` | exit status |
| `error` | why it is not 0; null where it is |
| `image` | `ref`, `id`, and `pulled`: whether it was pulled now |
| `toolchain`, `cache` | as in the JSON of `refresh` |
| `tasks` | how many tasks are in each state |
| `freed` | bytes that were removed from the cache |
| `seconds` | how long it took |

It is sent once; redirects are not followed, and an answer other than 2xx, or none within 20 s, is a warning and changes
no exit status. No message shows the URL, which may hold a secret.
"""
_UNWRITTEN = (
    "12 also takes the place of 0 where a result could not be written (a full disk, a closed stdout): a result that is "
    "not delivered is no success. A reader that closes the pipe (`| head`) is no failure."
)


def commands() -> str:
    """Return the page of all verbs, in Markdown."""
    lines = [_COMMANDS]
    for group in GROUPS:
        names = [name for name, verb in VERBS.items() if verb.group == group]
        links = ", ".join(f"[{name}](#{name})" for name in names)
        if names:
            lines.append(f"- {group}: {links}")
    lines += ["", "## Options that many verbs have", "", *_table(_common())]
    for group in GROUPS:
        for name, verb in VERBS.items():
            if verb.group == group:
                lines += _verb(name, verb)
    return "\n".join([*lines, ""])


def exit_statuses() -> str:
    """Return the page of the exit statuses, in Markdown."""
    lines = [_STATUSES, "| status | means | what to do |", "| --- | --- | --- |"]
    for code, text in MEANS.items():
        lines.append(f"| {code} | {text} | {REMEDIES[code]} |")
    lines.append(f"| 129, 130, 143 | a signal: SIGHUP, SIGINT, SIGTERM | {REMEDIES[130]} |")
    lines += ["", "## By verb", "", "Beside a signal's.", "", "| verb | statuses |", "| --- | --- |"]
    for name, verb in VERBS.items():
        own = {code: text for code, text in MEANS_OF.get(name, {}).items() if code in codes(verb)}
        parts = [f"{code} ({own[code]})" if code in own else str(code) for code in codes(verb)]
        lines.append(f"| `{name}` | {', '.join(parts) or 'the command’s; 2 usage'} |")
    lines += [
        "",
        _UNWRITTEN,
        "",
        "## In the program",
        "",
        "| status | error |",
        "| --- | --- |",
    ]
    for error in _errors():
        lines.append(f"| {error.exit_code} | `{error.__name__}`: {' '.join((error.__doc__ or '').split())} |")
    return "\n".join([*lines, ""])


def metrics_page() -> str:
    """Return the page of metrics and the webhook, in Markdown."""
    rows = []
    for metric in metrics.TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        cells = (metric.type, labels, _cell(metric.help), ", ".join(metric.by), "yes" if metric.kept else "–")
        rows.append(f"| `{metrics.PREFIX}{metric.name}` | {' | '.join(cells)} |")
    return _METRICS + "\n".join(rows) + "\n" + _WEBHOOK


def write() -> None:
    COMMANDS.write_text(commands(), encoding="utf-8")
    STATUSES.write_text(exit_statuses(), encoding="utf-8")
    METRICS.write_text(metrics_page(), encoding="utf-8")
    JSON.write_text(json_page.page(), encoding="utf-8")


def _errors() -> list[type[errors.BuilderError]]:
    """Return the classes of errors with an exit status of their own, by status."""
    found = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.BuilderError) and "exit_code" in vars(each)
    ]
    return sorted((each for each in found if each is not errors.BuilderError), key=lambda each: each.exit_code)


def _common() -> list[tuple[str, dict[str, Any]]]:
    return [(name, OPTIONS[name]) for name in SHARED["engine"]]


def _verb(name: str, verb: Verb) -> Iterator[str]:
    yield from ["", f"## {name}", "", f"{verb.help[0].upper()}{verb.help[1:]}.", ""]
    yield from ["```", usage(name), "```", ""]
    for paragraph in verb.details.split("\n\n"):
        yield from [" ".join(paragraph.split()), ""]
    if verb.arguments:
        yield from ["| argument | meaning |", "| --- | --- |"]
        for argument in verb.arguments:
            yield f"| `{argument.metavar}` | {_cell(argument.help)}{' (optional)' if argument.optional else ''} |"
        yield ""
    if verb.actions:
        yield from ["| action | does | its own options |", "| --- | --- | --- |"]
        yield from (_action(each) for each in verb.actions)
        yield ""
    common = [option for option in verb.options if option in SHARED["engine"]]
    if common:
        yield from ["Common options: " + ", ".join(f"`--{option}`" for option in common) + ".", ""]
    own = [
        (option, {**OPTIONS[option], **OPTIONS_OF.get(name, {}).get(option, {})})
        for option in verb.options
        if option not in SHARED["engine"] or option in OPTIONS_OF.get(name, {})
    ]
    if own:
        yield from [*_table(own), ""]
    yield from ["```sh", verb.example, "```"]


def _action(action: Action) -> str:
    options = ", ".join(f"`--{option}`" for option in action.own) or "–"
    return f"| `{action.name}` | {_cell(action.help)} | {options} |"


def _table(options: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield from ["| option | value | meaning |", "| --- | --- | --- |"]
    for name, words in options:
        value = f"`{_cell(words['metavar'])}`" if "metavar" in words else "switch"
        yield f"| `--{name}` | {value} | {_cell(words['help'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    write()
