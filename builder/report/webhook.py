"""Webhook: POST the outcome of a refresh as JSON. A failure is a warning and never changes the outcome.

The URL may hold a secret, as those of chat services do: messages name its host only.
"""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

from builder.errors import UsageError

#: Seconds to connect, and between two bytes of the answer; HURRIED: after a signal.
TIMEOUT = (5.0, 10.0)
HURRIED = (1.0, 1.0)
#: Seconds for the whole request, with a name server that hangs and an answer that arrives byte by byte.
ALTOGETHER, ALTOGETHER_HURRIED = 20.0, 2.0

_URL = re.compile(r"https?://[^\s/]+\S*", re.IGNORECASE)


def checked(url: str | None, place: str) -> str | None:
    """Return the URL. Raises UsageError, which names the option or variable and not the value, if it is none."""
    if url is not None and not _URL.fullmatch(url):
        raise UsageError(f"{place}: expected a URL that begins with https:// or http:// (the value is not shown)")
    return url


def post(url: str, document: Mapping[str, Any], *, hurried: bool = False) -> str:
    """Send the document; return why it was not accepted, or ""."""
    host = urllib.parse.urlsplit(url).hostname or "its host"
    limit, answer = ALTOGETHER_HURRIED if hurried else ALTOGETHER, [f"{host} did not answer in time"]
    # requests has no limit for a name look-up or for a whole answer, so the limit is on waiting for the thread.
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
        # The error's own text would repeat the URL.
        return f"{host}: {type(error).__name__}"
