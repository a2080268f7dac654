"""Requests to one registry: authorization, redirects, retries, deadlines, and failures in words.

Whatever may wait runs in a thread that can be left alone (`host.outside`): a name server that hangs, a header or a body
that arrives byte by byte.
"""

from __future__ import annotations

import queue
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from builder import __version__
from builder.errors import RegistryLostError, RegistryRefusedError, UsageError
from builder.host import outside
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.registry import credentials
from builder.registry.authorization import Authorization, TokenAnswer
from builder.registry.exchange import CHUNK, Answer, Body, Pieces, host_of, origin
from builder.registry.failures import PlainHttpError, TransientError, failure, retry_after
from builder.registry.reference import Reference, is_loopback
from builder.text import printable

if TYPE_CHECKING:
    import requests

T = TypeVar("T")

#: Seconds to connect, and between two packets of an answer.
_CONNECT, _BETWEEN = 10.0, 60.0
#: Seconds after which no byte sent or received counts as lost, also before an answer; and those after the last byte of
#: a blob, which some registries then copy to where it stays.
_STALL, _STORING = 90.0, 300.0
#: Attempts of a request that fails, and seconds for which requests are repeated to a registry that limits its rate.
_ATTEMPTS, _PATIENCE = 5, 300.0
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
#: Bytes of a token server's answer that are read.
_TOKEN_LIMIT = 1 << 18


@dataclass(frozen=True)
class Access:
    """How a registry is reached.

    insecure: plain http and certificates of unknown authorities are accepted, as by Docker's `insecure-registries`.
    ca_file: PEM certificates that are trusted in addition to the usual ones.
    deadline: ends every wait. cancel: ends every wait with Interrupted.
    """

    insecure: bool = False
    ca_file: Path | None = None
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    cancel: Cancel | None = None


class Transport:
    """Sends requests to the registry of a reference. Contacts nothing until the first one."""

    def __init__(self, reference: Reference, access: Access) -> None:
        self._host = reference.host
        self._api_host = reference.api_host
        self._access = access
        self._authorization = Authorization(self._host, self._credentials, self._token)
        self._lock = threading.Lock()
        self._session: requests.Session | None = None
        self._base = ""

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def redacted(self, text: str) -> str:
        return self._authorization.redacted(text)

    def refuse(self, what: str, answer: Answer, *, name: str = "") -> RegistryRefusedError:
        """Return the error for an answer with an unexpected status. what: the request: ``read the tags``."""
        more = answer.error()
        more = f" ({more})" if more else ""
        if answer.status in (401, 403):
            refusal = self._authorization.refusal(answer.status, what)
            return RegistryRefusedError(refusal.message + more, status=answer.status)
        if answer.status == 404:
            return RegistryRefusedError(f"{self._host} has no {name or what}{more}", status=404)
        return RegistryRefusedError(
            f"{self._host} answered {answer.status} to the request to {what}{more}", status=answer.status
        )

    def retry(self, attempt: Callable[[], T], what: str) -> T:
        """Return `attempt()`, repeated while it raises TransientError and there is time. Raises RegistryLostError."""
        import tenacity

        def pause(state: tenacity.RetryCallState) -> float:
            after = _after(state)
            if after is None:
                return tenacity.wait_random_exponential(multiplier=0.2, max=10)(state)
            # Many clients get the same time, and must not all come back at it.
            return after + tenacity.wait_random(0, max(0.5, after / 2))(state)

        def ends(state: tenacity.RetryCallState) -> bool:
            after = _after(state)
            left = min(self._access.deadline.left(), _PATIENCE - (state.seconds_since_start or 0.0))
            return left <= (after or 0.0) or (after is None and state.attempt_number >= _ATTEMPTS)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=pause,
            stop=ends,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except TransientError as error:
            again = f"; it asks to wait {error.after:.0f} s more" if error.after else ""
            raise RegistryLostError(f"cannot {what}: {error}{again}") from None

    def send(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        what: str,
        expected: Collection[int],
        headers: Mapping[str, str] | None = None,
        body: Body | bytes | None = None,
        name: str = "",
    ) -> Answer:
        """Return the answer to one request, with one of the expected statuses. Raises TransientError.

        path: below the registry's address, or a whole URL. what: for messages, ``read the tags``. name: of what is
        requested, for the message that it is not there.
        """
        url = urllib.parse.urljoin(self.base(), path)
        for renewed in (False, True):
            sent = self._authorization.header(scope) if self._is_own(url) else None
            answer = self._follow(method, url, {**(headers or {})}, body, sent)
            if answer.status in expected:
                return answer
            with answer:
                if answer.status == 401 and self._is_own(answer.url) and not renewed:
                    self._authorization.renew(answer.headers.get("WWW-Authenticate", ""), scope, sent)
                    if isinstance(body, Body) and body.sent:
                        raise TransientError(f"the token of {self._host} ended while the blob was sent")
                    continue
                self._raise_transient(answer)
                raise self.refuse(what, answer, name=name)
        raise AssertionError("unreachable")

    def wait_for(self, action: Callable[[], T], host: str, body: Body | None = None) -> T:
        """Return `action()`, waited for as long as bytes move. Raises TransientError, RegistryLostError, Interrupted.

        body: what the action sends.
        """
        import requests
        import urllib3

        self.check(host)
        started = time.monotonic()

        def give_up() -> bool:
            moved = max(started, body.moved) if body else started
            limit = _STORING if body is not None and body.sent == len(body) else _STALL
            is_stopped = self._access.cancel is not None and self._access.cancel.is_set
            return is_stopped or time.monotonic() - moved > limit

        try:
            return outside.call(action, host, self._access.deadline.left(), give_up=give_up)
        except outside.StuckError:
            if body is not None:
                body.stopped = True
            self.check(host)
            raise TransientError(f"{host} took no byte, or gave no answer, in time") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if body is not None and body.error is not None:
                raise body.error from None
            raise failure(error, host) from None

    def next_of(self, pieces: Pieces, host: str) -> bytes:
        """Return the next piece of an answer. Raises TransientError, RegistryLostError, Interrupted."""
        started = time.monotonic()
        while True:
            self.check(host)
            try:
                found = pieces.get(timeout=min(0.1, self._access.deadline.left()))
            except queue.Empty:
                if time.monotonic() - started > _STALL:
                    raise TransientError(f"{host} gave less than {CHUNK >> 20} MiB in {_STALL:.0f} s") from None
                continue
            if isinstance(found, Exception):
                raise failure(found, host)
            return found

    def pause(self, failures: int) -> None:
        """Wait before a broken transfer is resumed: longer with each failure in a row."""
        self._sleep(min(0.1 * 2**failures, 5.0))

    def check(self, host: str = "") -> None:
        """Raise Interrupted after a signal, and RegistryLostError at the deadline."""
        if self._access.cancel is not None:
            self._access.cancel.check()
        if self._access.deadline.expired:
            raise RegistryLostError(f"{host or self._host}: the deadline passed before it was done")

    def base(self) -> str:
        """Return the registry's address. https, but where plain http is allowed and spoken."""
        with self._lock:
            if not self._base:
                self._base = self.retry(self._probe, f"reach {self._host}")
            return self._base

    def allowed(self, url: str) -> str:
        """Return the URL if a request may go there. Raises RegistryRefusedError: plain http, or no address at all."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, _ = parts.hostname or "", parts.port
        except ValueError:
            host = ""
        if not host or parts.scheme not in ("http", "https"):
            raise RegistryRefusedError(f"{self._host} names an address that is none")
        if parts.scheme == "https" or self._access.insecure or (is_loopback(self._api_host) and is_loopback(host)):
            return url
        raise RegistryRefusedError(
            f"{self._host} sends this client on to {printable(host)} over plain http, which only --insecure allows "
            "(a proxy in front of a registry has to pass on X-Forwarded-Proto)"
        )

    # --- one request --------------------------------------------------------------------------------------------------

    def _follow(
        self, method: str, url: str, headers: dict[str, str], body: Body | bytes | None, authorization: str | None
    ) -> Answer:
        """Return the answer after redirects. Credentials go to the registry itself and to no other place."""
        for _ in range(_MOST_REDIRECTS + 1):
            own = {"Authorization": authorization} if authorization and self._is_own(url) else {}
            answer = self._one(method, url, {**headers, **own}, body)
            location = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or not location:
                return answer
            answer.close()
            if method not in ("GET", "HEAD"):
                raise RegistryRefusedError(f"{self._host} redirects a {method}, which this client does not follow")
            url = self.allowed(urllib.parse.urljoin(url, location))
        raise RegistryRefusedError(f"{self._host} redirects more than {_MOST_REDIRECTS} times")

    def _one(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | bytes | Mapping[str, str] | None
    ) -> Answer:
        session = self._opened()
        host = host_of(self.allowed(url))
        # Without this a proxy of the environment would get what is meant for this machine.
        proxies = {"no_proxy": urllib.parse.urlsplit(url).hostname or ""} if is_loopback(host) else None

        def request() -> requests.Response:
            return session.request(
                method,
                url,
                headers=dict(headers),
                data=body,  # type: ignore[arg-type] # an iterable with a length is as good as a file
                allow_redirects=False,
                stream=True,
                timeout=(_CONNECT, _STORING if isinstance(body, Body) else _BETWEEN),
                proxies=proxies,
                verify=not self._access.insecure,
            )

        return Answer(self.wait_for(request, host, body if isinstance(body, Body) else None), self)

    def _credentials(self) -> credentials.Credentials | None:
        return credentials.find(self._host, timeout=min(credentials.HELPER_TIMEOUT, self._access.deadline.left()))

    def _token(self, method: str, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None) -> TokenAnswer:
        """Ask a token server. A redirect is not followed: it would carry the credentials."""
        with self._one(method, self.allowed(url), headers, form) as answer:
            self._raise_transient(answer)
            return TokenAnswer(answer.status, answer.read(_TOKEN_LIMIT, "a token"))

    def _probe(self) -> str:
        """Return the address under which the registry answers. Raises TransientError, or why it may not be used."""
        secure, plain = f"https://{self._api_host}/", f"http://{self._api_host}/"
        try:
            with self._one("GET", f"{secure}v2/", {}, None):
                return secure
        except PlainHttpError as error:
            if not (self._access.insecure or is_loopback(self._api_host)):
                raise RegistryRefusedError(f"{error}. Pass --insecure if plain http is meant") from None
        with self._one("GET", f"{plain}v2/", {}, None):
            return plain

    def _raise_transient(self, answer: Answer) -> None:
        """Raise TransientError if the status means that a later request may succeed."""
        if answer.status in (408, 425, 429, 500, 502, 503, 504):
            after = retry_after(answer.headers.get("Retry-After", ""))
            if answer.status == 429 and after is None:
                after = 1.0
            more = answer.error()
            kind = "limits its rate: it " if answer.status == 429 else ""
            raise TransientError(
                f"{host_of(answer.url)} {kind}answered {answer.status}" + (f" ({more})" if more else ""), after
            )

    def _opened(self) -> requests.Session:
        if self._session is None:
            import requests

            session = requests.Session()
            session.headers.update({"User-Agent": f"warm-cache/{__version__}", "Accept-Encoding": "identity"})
            session.auth = _unchanged  # or requests would send what ~/.netrc has, to whatever host a redirect names
            if self._access.ca_file is not None:
                session.mount("https://", _trusting(self._access.ca_file))
            if self._access.insecure:
                import urllib3

                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
            self._session = session
        return self._session

    def _is_own(self, url: str) -> bool:
        return origin(url) == origin(self._base)

    def _sleep(self, seconds: float) -> None:
        seconds = min(seconds, self._access.deadline.left())
        if self._access.cancel is not None:
            self._access.cancel.wait(seconds)
        else:
            threading.Event().wait(seconds)
        self.check()


def _after(state: Any) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.after if isinstance(error, TransientError) else None


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _trusting(ca_file: Path) -> requests.adapters.HTTPAdapter:
    """Return an adapter that trusts these certificates too. Raises UsageError."""
    import requests.adapters
    import urllib3.util.ssl_

    context = urllib3.util.ssl_.create_urllib3_context()
    try:
        context.load_verify_locations(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        why = getattr(error, "reason", None) or error.strerror
        raise UsageError(f"--ca-file {printable(str(ca_file))} holds no certificates in PEM ({why})") from None

    class Trusting(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
            super().init_poolmanager(*arguments, ssl_context=context, **keywords)

        def proxy_manager_for(self, *arguments: Any, **keywords: Any) -> Any:
            return super().proxy_manager_for(*arguments, ssl_context=context, **keywords)

    return Trusting()
