"""Authorization at a registry: challenges answered with Basic credentials or with a token of the server they name.

Tokens are kept by scope, so that 100 blobs cost one token. Credentials are looked up when the registry first asks.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from builder.errors import RegistryRefusedError
from builder.registry.credentials import Credentials
from builder.text import printable, shortened

#: Seconds for which a token without a stated life is valid (the token specification's default), the least, the most.
_DEFAULT_LIFE, _LEAST_LIFE, _LONGEST_LIFE = 60.0, 10.0, 86400.0
#: The part of a token's life in which it is used: a request begun with it has to end with it.
_USED_PART = 0.8
#: Longer tokens are none. Characters.
_LONGEST_TOKEN = 1 << 16

_TOKEN = re.compile(r"[\x21-\x7e]+")
_SCHEME = re.compile(r"[\s,]*([A-Za-z][A-Za-z0-9._~+-]*)(?=[\s,]|$)(?!\s*=)")
_PARAMETER = re.compile(r'[\s,]*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))')


@dataclass(frozen=True)
class Challenge:
    """One scheme of a WWW-Authenticate header, in lower case, with its parameters."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class TokenAnswer:
    """What a token server answered. raw: at most what the caller of the server reads."""

    status: int
    raw: bytes


#: method, URL, headers, form → the answer. Raises for a URL that may not be requested.
Fetch = Callable[[str, str, Mapping[str, str], Mapping[str, str] | None], TokenAnswer]


def challenges(header: str) -> Iterator[Challenge]:
    """Yield the challenges of a WWW-Authenticate header; what does not parse ends them."""
    position = 0
    while found := _SCHEME.match(header, position):
        position, parameters = found.end(), {}
        while pair := _PARAMETER.match(header, position):
            quoted, plain = pair[2], pair[3]
            parameters[pair[1].lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            position = pair.end()
        yield Challenge(found[1].lower(), parameters)


class Authorization:
    """What authorizes requests to one registry. All methods may be called by any thread.

    host: of the registry, for messages. credentials: looks them up; called at most once.
    """

    def __init__(self, host: str, credentials: Callable[[], Credentials | None], fetch: Fetch) -> None:
        self._host = host
        self._find = credentials
        self._fetch = fetch
        self._lock = threading.RLock()
        self._looked_up = False
        self._credentials: Credentials | None = None
        self._basic = False
        self._tokens: dict[str, tuple[str, float]] = {}  # scope → token, end of its use
        self._secrets: set[str] = set()

    def header(self, scope: str) -> str | None:
        """Return the Authorization header for a request of this scope; None for none so far."""
        with self._lock:
            if self._basic and self._credentials:
                return _basic(self._credentials)
            token, end = self._tokens.get(scope, ("", 0.0))
            return f"Bearer {token}" if token and time.monotonic() < end else None

    def renew(self, header: str, scope: str, sent: str | None) -> None:
        """Get what answers this challenge. Raises RegistryRefusedError where nothing does.

        header: WWW-Authenticate of the 401. sent: the Authorization header of the refused request.
        """
        with self._lock:
            found = {each.scheme: each for each in reversed(list(challenges(header)))}
            if bearer := found.get("bearer"):
                if self.header(scope) in (None, sent):  # else another thread has renewed it meanwhile
                    self._tokens.pop(scope, None)
                    self._request_token(bearer.parameters, scope)
            elif "basic" in found:
                if self._known() is None:
                    raise self.refusal(401)
                if self._basic and sent:
                    raise self.refusal(401)
                self._basic = True
            else:
                schemes = ", ".join(printable(shortened(name, 30)) for name in found) or "none"
                raise RegistryRefusedError(
                    f"{self._host} wants a login in a way that this client does not know ({schemes}): "
                    "it knows Bearer and Basic",
                    status=401,
                )

    def refusal(self, status: int, what: str = "") -> RegistryRefusedError:
        """Return the error for 401 or 403. what: the request, for the sentence."""
        known = self._credentials
        login = f"docker login {self._host}"
        if known is None:
            why = f"{self._host} wants a login{what and f' to {what}'}, and there are no credentials for it: {login}"
        elif status == 403:
            why = f"{self._host} forbids {known.username or 'this login'} to {what or 'do this'}: ask its owner for it"
        else:
            why = f"{self._host} does not accept the login of {known.username or 'its token'}: log in anew: {login}"
        return RegistryRefusedError(why, status=status)

    def redacted(self, text: str) -> str:
        """Return the text without any secret that was sent or received here."""
        with self._lock:
            for secret in sorted(self._secrets, key=len, reverse=True):
                text = text.replace(secret, "<secret>")
        return text

    def _known(self) -> Credentials | None:
        if not self._looked_up:
            self._credentials = self._find()
            self._looked_up = True
            if self._credentials:
                self._secrets.update(self._credentials.secrets)
                self._secrets.add(_basic(self._credentials).removeprefix("Basic "))
        return self._credentials

    def _request_token(self, parameters: Mapping[str, str], scope: str) -> None:
        realm, service = parameters.get("realm", ""), parameters.get("service", "")
        # The registry's own word counts: behind some proxies a repository has another name than here.
        scope_wanted = parameters.get("scope") or scope
        known = self._known()
        query = {"service": service, "scope": scope_wanted} if service else {"scope": scope_wanted}
        if known and known.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": known.identity_token, "client_id": "warm-cache"}
            answer = self._fetch("POST", realm, {}, {**form, **query})
        else:
            parts = urllib.parse.urlsplit(realm)
            joined = "&".join(filter(None, (parts.query, urllib.parse.urlencode(query))))
            headers = {"Authorization": _basic(known)} if known else {}
            answer = self._fetch("GET", parts._replace(query=joined, fragment="").geturl(), headers, None)
        if answer.status in (401, 403):
            raise self.refusal(answer.status, "give a token")
        token, life = _token_of(answer)
        if not token:
            place = urllib.parse.urlsplit(realm).hostname or "its token server"
            raise RegistryRefusedError(
                f"{self._host}: its token server {printable(place)} gave no token (status {answer.status})",
                status=answer.status,
            )
        self._secrets.add(token)
        self._tokens[scope] = token, time.monotonic() + life * _USED_PART


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}".encode()
    return "Basic " + base64.b64encode(pair).decode("ascii")


def _token_of(answer: TokenAnswer) -> tuple[str, float]:
    """Return the token and the seconds for which it holds; "" for an answer that has none."""
    try:
        found = json.loads(answer.raw) if answer.status == 200 else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return "", 0.0
    token = found.get("token") or found.get("access_token")
    life = found.get("expires_in")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token) or len(token) > _LONGEST_TOKEN:
        return "", 0.0
    if not isinstance(life, (int, float)) or not life >= 0:  # NaN is not
        return token, _DEFAULT_LIFE
    return token, min(max(life, _LEAST_LIFE), _LONGEST_LIFE)
