"""Telling somebody elsewhere: one POST of JSON, whose failure is a remark and never the outcome.

The URL may hold a secret, as those of chat services do: it is never shown, and where it leads only by its host's name.
"""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

from builder.errors import UsageError

#: Seconds to connect, and between two bytes of the answer; and both once somebody wants this program to end.
TIMEOUT = (5.0, 10.0)
HURRIED = (1.0, 1.0)
#: Seconds for all of it, a name server that hangs and an answer that comes byte by byte included.
ALTOGETHER, ALTOGETHER_HURRIED = 20.0, 2.0

_URL = re.compile(r"https?://[^\s/]+\S*", re.IGNORECASE)


def checked(url: str | None, place: str) -> str | None:
    """The URL, if it can be one. Raises UsageError, which names the place where it was said and not the URL."""
    if url is not None and not _URL.fullmatch(url):
        raise UsageError(f"{place}: a URL that begins with https:// or http:// is wanted (what was said is not shown)")
    return url


def post(url: str, document: Mapping[str, Any], *, hurried: bool = False) -> str:
    """Why it was not taken; "" where it was."""
    host = urllib.parse.urlsplit(url).hostname or "its host"
    limit, answer = ALTOGETHER_HURRIED if hurried else ALTOGETHER, [f"{host} did not answer in time"]
    # Neither the look-up of a name nor the sum of an answer's bytes can be given a time: only who waits can have one.
    thread = threading.Thread(
        target=lambda: answer.append(_post(url, host, document, HURRIED if hurried else TIMEOUT)), daemon=True
    )
    thread.start()
    thread.join(limit)
    return answer[-1]


def _post(url: str, host: str, document: Mapping[str, Any], timeout: tuple[float, float]) -> str:
    import requests

    try:
        with requests.post(url, json=document, timeout=timeout, allow_redirects=False, stream=True) as answer:
            return "" if answer.ok and not answer.is_redirect else f"{host} answered {answer.status_code}"
    except (requests.RequestException, ValueError, OSError) as error:
        # Its text would repeat the URL.
        return f"{host}: {type(error).__name__}"
