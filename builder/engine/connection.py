"""The connection to an engine: opening it, one request, and the one translator of failures.

docker-py is imported when the connection is opened, because the import costs a tenth of a second. Only requests that
are safe to repeat are retried; a create, start or build may have taken effect although its answer was lost, and its
caller has to check.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from builder.engine import answers
from builder.engine.errors import is_transient, loss, refusal
from builder.engine.gpu_request import uses_cdi
from builder.engine.podman import is_podman
from builder.engine.transport import PlainRequest, Tunnel, context_host, identity_of, is_this_machine, parse_version
from builder.errors import BuilderError, EngineLostError, EngineRefusedError
from builder.host.deadlines import retry_reads
from builder.text import readable

T = TypeVar("T")
E = TypeVar("E", bound="EngineConnection")

#: Engine 19.03, the first with device requests for GPUs.
MINIMUM_API = (1, 40)
DEFAULT_SOCKET = "unix:///var/run/docker.sock"

#: Seconds for requests that an engine answers from memory. One that takes longer is in trouble.
QUICK = 10.0
#: Bytes of a refusal's body that are read.
_BODY = 1 << 16
#: Characters of a path that a request needs no quoting for: all of an image's name.
_PLAIN = frozenset(string.ascii_letters + string.digits + "/:@._-")


class EngineConnection:
    """A connection to one engine, opened by `connect` or by the first request.

    url: None means ``DOCKER_HOST``, else the default socket.
    timeout: seconds for one answer.
    """

    def __init__(self, url: str | None = None, timeout: float = 60.0) -> None:
        self._given = url
        self._timeout = timeout
        self._client: Any = None
        self._local: bool | None = None
        self._is_greeted = False
        self._tunnel: Tunnel | None = None
        self.api_version = ""

    # --- opening -----------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The engine's address."""
        url = self._given or os.environ.get("DOCKER_HOST") or DEFAULT_SOCKET
        return url.rstrip("/") if url.startswith("unix:///") else url

    def connect(self: E) -> E:  # noqa: PYI019 - typing.Self is new in Python 3.11
        """Open the connection. Raises EngineLostError, with what to do, if no usable engine answers."""
        if self._client is None:
            try:
                with self._translated(f"cannot reach a container engine at {self._address()}"):
                    self._client = self._open()
            except EngineLostError as error:
                self.close()
                if self._given or os.environ.get("DOCKER_HOST") or not (host := context_host()):
                    raise
                raise EngineLostError(
                    f"{error.message}. The docker command's own context is not read; it uses {host}: set DOCKER_HOST"
                ) from error
            except BaseException:
                self.close()
                raise
        return self

    def greet(self: E) -> E:  # noqa: PYI019
        """Connect as far as `plain` needs it; any other request connects further. Raises as `connect` does.

        On a unix socket this spares a verb that only looks at an image the import of docker-py.
        """
        if self._client is None and self.url.startswith("unix://"):
            with contextlib.suppress(OSError):  # `connect` has the words for them
                with contextlib.closing(PlainRequest(self.url.removeprefix("unix://"), self._timeout)) as request:
                    newest, info = request.answer()
                if info and (parse_version(newest) or (0, 0)) >= MINIMUM_API:
                    self._know(info)
                    self._is_greeted = True
                    return self
        return self.connect()

    def plain(self, path: str) -> Mapping[str, Any] | None:
        """Return the JSON object at this path, without docker-py; None where there is none, or not so."""
        if self._client is not None or not self._is_greeted:
            return None
        if any(character not in _PLAIN for character in path):
            return None
        try:
            request = PlainRequest(self.url.removeprefix("unix://"), self._timeout, path)
            with contextlib.closing(request):
                return request.answer()[1] or None
        except OSError:
            return None

    def _know(self, info: Mapping[str, Any]) -> None:
        self._local = is_this_machine(info)
        self.podman = is_podman(info)
        self.identity = identity_of(info)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._tunnel is not None:
            self._tunnel.close()
            self._tunnel = None

    def _open(self) -> Any:
        url, environ = self.url, dict(os.environ)
        request = None
        if not url.startswith(("tcp://", "https://", "http://")):
            environ.pop("DOCKER_TLS_VERIFY", None)  # it says nothing about a socket, and docker-py refuses both
        if url.startswith("ssh://"):
            self._tunnel = Tunnel(url)
            url = self._tunnel.url
        elif url.startswith("unix://"):
            # Fails first if nothing listens there: docker-py would leak its half-made socket.
            request = PlainRequest(url.removeprefix("unix://"), self._timeout)
        with contextlib.closing(request) if request else contextlib.nullcontext():
            import docker
            from docker.utils import kwargs_from_env

            newest, info = request.answer() if request else (None, {})
        if info:
            self._know(info)
        # Not from_env(): it requests the version itself, and raises other errors.
        options = dict(kwargs_from_env(environment={**environ, "DOCKER_HOST": url}))
        api_client: Any = docker.APIClient
        new_client = functools.partial(api_client, timeout=self._timeout, **options)
        if newest is not None:
            self.api_version = self._negotiated(newest)
            # Assigned before the next request, so that close() closes it whatever happens.
            self._client = client = new_client(version=self.api_version)
            # An engine that is much newer than docker-py may refuse docker-py's version.
            if client.get(_url(client, "/_ping"), timeout=self._timeout).ok:
                return client
            client.close()
        with contextlib.closing(new_client(version="1.40")) as client:
            # Without a version in its path, every engine answers this.
            response = client.get(f"{client.base_url}/version", timeout=self._timeout)
            _raise_for_status(response)
            versions = answers.an_object(response.json())
        self.api_version = self._negotiated(versions.get("ApiVersion"), versions.get("MinAPIVersion"))
        self._client = client = new_client(version=self.api_version)
        response = client.get(_url(client, "/_ping"), timeout=self._timeout)
        _raise_for_status(response)
        return client

    def _negotiated(self, engines_newest: object, engines_oldest: object = None) -> str:
        """Return the newest API version that both sides know. Raises EngineLostError if there is none."""
        from docker.constants import DEFAULT_DOCKER_API_VERSION

        newest = parse_version(engines_newest)
        if newest is None:
            raise EngineLostError(f"the server at {self._address()} is no container engine: it gave no API version")
        if newest < MINIMUM_API:
            raise EngineLostError(
                f"the engine at {self._address()} is too old: it has API {newest[0]}.{newest[1]}, and device requests "
                f"need {MINIMUM_API[0]}.{MINIMUM_API[1]}. Update it to Docker Engine 19.03 or later"
            )
        oldest = parse_version(engines_oldest) or MINIMUM_API
        major, minor = max(oldest, min(newest, parse_version(DEFAULT_DOCKER_API_VERSION) or newest))
        return f"{major}.{minor}"

    @property
    def _quick(self) -> float:
        return min(QUICK, self._timeout)

    @property
    def _api(self) -> Any:
        if self._client is None:
            self.connect()
        return self._client

    def _address(self) -> str:
        if self._given or os.environ.get("DOCKER_HOST"):
            return f"{self.url} (DOCKER_HOST)"
        return f"{self.url} (DOCKER_HOST is not set)"

    # --- the engine itself -------------------------------------------------------------------------------------------

    @property
    def info(self) -> Mapping[str, Any]:
        """The engine's description of itself and its host."""
        return self._read(
            "cannot read the engine's description", lambda: answers.description(self._get("/info").json())
        )

    @property
    def local(self) -> bool:
        """Whether the engine's paths are ours, as far as this shows without a container.

        That is: a unix socket, the same host name and the same running kernel. A builder that runs in a container has
        another host name.
        """
        if self._local is None:
            self._local = self.url.startswith("unix://") and is_this_machine(self.info)
        return self._local

    @functools.cached_property
    def podman(self) -> bool:
        """Whether it is Podman behind Docker's API; docker/README.md lists what differs there."""
        return is_podman(self.info)

    @functools.cached_property
    def identity(self) -> str:
        """What distinguishes this engine from others, at whatever address it is reached."""
        return identity_of(self.info)

    @functools.cached_property
    def uses_cdi(self) -> bool:
        """Whether containers get their GPUs as CDI devices."""
        return uses_cdi(self.info, podman=self.podman, local=self.local)

    # --- requests ----------------------------------------------------------------------------------------------------

    def _get(self, path: str, *names: str, **options: Any) -> Any:
        return self._request("GET", path, *names, **options)

    def _request(self, method: str, path: str, *names: str, timeout: Any = None, **options: Any) -> Any:
        """Send one request; names fill the path's placeholders. Raises docker-py's and requests' errors as they are."""
        api = self._api
        self._check_listening()
        response = api.request(method, _url(api, path, *names), timeout=timeout or self._timeout, **options)
        _raise_for_status(response)
        return response

    def _check_listening(self) -> None:
        """Raise OSError if nothing listens on the socket; docker-py would leak one socket per attempt."""
        url = self._tunnel.url if self._tunnel else self.url
        if url.startswith("unix://"):
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
                probe.settimeout(self._timeout)
                probe.connect(url.removeprefix("unix://"))

    def _read(self, action: str, read: Callable[[], T]) -> T:
        """Return `read()`, retried while the connection breaks: only for requests that change nothing."""

        def translated() -> T:
            with self._translated(action):
                return read()

        return retry_reads(translated, is_transient)

    def _socket(self, response: Any) -> socket.socket:
        """Return the socket below a streamed response."""
        try:
            raw = _raw_socket(self._api, response)
        except AttributeError:  # the answer ended with its head, so there is no connection any more
            raise answers.ForeignAnswerError(None, "a stream") from None
        found: socket.socket = getattr(raw, "_sock", raw)
        return found

    @property
    def _long(self) -> dict[str, Any]:
        """Options of a request that may take hours and send nothing for minutes once the engine has accepted it."""
        return {"stream": True, "timeout": (self._timeout, None)}

    def _messages(self, response: Any, action: str) -> Iterator[Mapping[str, Any]]:
        """Yield the engine's progress messages, one JSON object a line. Raises EngineRefusedError for an error."""
        for line in self._iterated(response.iter_lines(), action):
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(message, dict):
                continue
            if message.get("error"):
                raise EngineRefusedError(f"{action}: {readable(str(message['error'])).strip()}")
            yield message

    # --- failures ----------------------------------------------------------------------------------------------------

    def _iterated(self, items: Iterable[T], action: str) -> Iterator[T]:
        """Yield the items; only their arrival is translated, because errors of the consumer are not the engine's."""
        iterator = iter(items)
        while True:
            with self._translated(action):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextlib.contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        """Turn every failure of an engine inside into an EngineLostError. action: begins the message, ``cannot …``."""
        try:
            yield
        except BuilderError:
            raise
        except Exception as error:
            explained = self._explained(action, error)
            if explained is None:
                raise
            raise explained from error

    def _explained(self, action: str, error: Exception) -> EngineLostError | None:
        """Return the error to raise instead; None if this is no failure of an engine."""
        import http.client

        import docker
        import urllib3

        if isinstance(error, RefusedResponse):
            return refusal(action, error.status, error.explanation)
        if isinstance(error, docker.errors.APIError):
            return refusal(action, error.status_code or 0, str(error.explanation or ""))
        # Answers that are not JSON, or not the engine's. To ask again would change nothing.
        if isinstance(error, (ValueError, RecursionError)):
            return EngineRefusedError(loss(action, error).message)
        # All errors of requests are OSErrors.
        lost = (
            docker.errors.DockerException,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
            OSError,
        )
        if isinstance(error, lost):
            return loss(action, error, hint=self._tunnel.last_error() if self._tunnel else "")
        return None


class RefusedResponse(Exception):
    """A response whose status is none of success."""

    def __init__(self, status: int, explanation: str) -> None:
        super().__init__(explanation)
        self.status = status
        self.explanation = explanation


def _raise_for_status(response: Any) -> None:
    """Raise RefusedResponse with the explanation for a status of failure, whatever its body is."""
    status = int(response.status_code)
    if status < 400:
        return
    with contextlib.closing(response):
        body = next(response.iter_content(_BODY), b"")
        raise RefusedResponse(status, answers.explanation(body))


# --- private methods of docker-py ------------------------------------------------------------------------------------
# The only uses. docker-py's public calls have no timeout of their own for most requests, follow logs and attachments
# without one, and drop what the engine explains in an error's body; so requests go through its session, which knows the
# transport (unix, TCP with TLS), by these methods. pyproject.toml therefore keeps docker-py below 8.


def _url(api: Any, path: str, *names: str) -> str:
    """Return the request's URL with transport and API version; names are quoted."""
    url: str = api._url(path, *names)  # noqa: SLF001
    return url


def _raw_socket(api: Any, response: Any) -> Any:
    """Return the connection below a streamed response, or below one that upgraded its connection."""
    return api._get_raw_response_socket(response)  # noqa: SLF001


def add_build_credentials(api: Any, headers: dict[str, Any]) -> None:
    """Add the credentials of all registries in this user's docker configuration to a build's headers."""
    api._set_auth_headers(headers)  # noqa: SLF001
