"""Webhook: POST the outcome of a refresh as JSON. A failure is a warning and never changes the outcome.

The URL may hold a secret, as those of chat services do: messages name its host only.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping

from builder.errors import UsageError
from builder.host import outside
from builder.host.outside import GiveUp, StuckError, never

#: Seconds to connect, and between two bytes of the answer.
TIMEOUT = (5.0, 10.0)
#: Seconds for the whole request, with a name server that hangs and an answer that arrives byte by byte.
ALTOGETHER = 20.0


def checked(url: str | None, place: str) -> str | None:
    """Return the URL. Raises UsageError, which names the option or variable and not the value, if it is none."""
    if url is not None and not _is_url(url):
        raise UsageError(f"{place}: expected a URL that begins with https:// or http:// (the value is not shown)")
    return url


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        _ = parts.port  # a property that refuses what is no port
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and parts.hostname
    return bool(known) and not re.search(r"[\s\x00-\x20\x7f]", text)


def post(url: str, document: Mapping[str, object], *, give_up: GiveUp = never) -> str:
    """Send the document; return why it was not accepted, or "". give_up: polled; true ends the wait."""
    host = urllib.parse.urlsplit(url).hostname or "its host"
    try:
        # requests has no limit for a name look-up or for a whole answer, so the limit is on waiting for the thread.
        return outside.call(lambda: _post(url, host, document), host, ALTOGETHER, give_up=give_up)
    except StuckError:
        return f"{host} did not answer in time"
    except Exception as error:  # noqa: BLE001 - whatever a URL makes of the client, it is a remark. Its text has the URL
        return f"{host}: {type(error).__name__}"


def _post(url: str, host: str, document: Mapping[str, object]) -> str:
    import requests

    with requests.post(url, json=document, timeout=TIMEOUT, allow_redirects=False, stream=True) as answer:
        return "" if answer.ok and not answer.is_redirect else f"{host} answered {answer.status_code}"
