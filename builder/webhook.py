"""Telling somebody elsewhere: one POST of JSON, whose failure is a remark and never the outcome.

The URL may hold a secret, as those of chat services do: it is never shown, and where it leads only by its host's name.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from builder.errors import UsageError

#: Seconds to connect, and between two bytes of the answer; and both once somebody wants this program to end.
TIMEOUT = (5.0, 10.0)
HURRIED = (1.0, 1.0)

_URL = re.compile(r"https?://[^\s/]+\S*", re.IGNORECASE)


def checked(url: str | None, place: str) -> str | None:
    """The URL, if it can be one. Raises UsageError, which names the place where it was said and not the URL."""
    if url is not None and not _URL.fullmatch(url):
        raise UsageError(f"{place}: a URL that begins with https:// or http:// is wanted (what was said is not shown)")
    return url


def post(url: str, document: Mapping[str, Any], *, hurried: bool = False) -> str:
    """Why it was not taken; "" where it was."""
    import requests

    host = urllib.parse.urlsplit(url).hostname or "its host"
    try:
        with requests.post(
            url, json=document, timeout=HURRIED if hurried else TIMEOUT, allow_redirects=False, stream=True
        ) as answer:
            return "" if answer.ok and not answer.is_redirect else f"{host} answered {answer.status_code}"
    except (requests.RequestException, ValueError, OSError) as error:
        # Its text would repeat the URL.
        return f"{host}: {type(error).__name__}"
