"""Text for people: names that a terminal can take, durations, sizes, ages, counts and near matches."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Controls of terminals, ends of lines, and characters that change the direction of writing.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: The same without tabs and Unicode's separators of lines.
_NOT_SHOWN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


def printable(text: str) -> str:
    """Return the text on one line, for any terminal and JSON reader: controls and undecodable bytes as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def readable(text: str) -> str:
    """Return the text without terminal sequences; other controls, newlines among them, as U+FFFD. Tabs stay."""
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    return _NOT_SHOWN.sub("\ufffd", text)


def displayed(text: str) -> str:
    """Return lines of text as any terminal takes them: controls but tabs and ends of lines as escapes."""
    return _NOT_SHOWN.sub(_escape, text) if _NOT_SHOWN.search(text.replace("\n", "")) else text


def _escape(found: re.Match[str]) -> str:
    return found[0] if found[0] == "\n" else found[0].encode("unicode_escape").decode("ascii")


def shortened(text: str, limit: int) -> str:
    """Return at most `limit` characters of the text, and an ellipsis where it has more."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def sentence(text: str) -> str:
    """Return the text with a full stop at its end."""
    text = text.rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def counted(number: int, noun: str) -> str:
    """Return ``1 task``, ``2 tasks``, ``2 entries``."""
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {re.sub('(?<![aeiou])y$', 'ie', noun)}s"


def size(count: float) -> str:
    """Return bytes in decimal units: ``51.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float | None) -> str:
    """Return ``3:41`` or ``1:02:03``; an en dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def span(seconds: float) -> str:
    """Return ``40 s``, ``3 min``, ``2.5 h``: an estimate, rounded to its accuracy."""
    if seconds < 90:
        return f"{max(1, round(seconds / 5) * 5 if seconds >= 10 else round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def age(seconds: float) -> str:
    """Return a past duration in one unit: ``3 d``, ``2 h``, ``5 min``, ``7 s``."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` where a known name is close to the word, else all known names."""
    import difflib  # only where something is wrong already

    names = sorted(known)
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f"did you mean {lower[close[0]]!r}?" if close else "known: " + ", ".join(names)
