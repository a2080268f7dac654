"""What stands between a client and a registry in the field, for what a registry itself does not do on request.

A front passes requests on to the real registry. A test's rule sees each one first, and may answer, change or cut it.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import socketserver
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from builder.registry.client import RegistryClient
from builder.registry.reference import Reference, parse

_PIECE = 1 << 16


@dataclass
class Request:
    """One request as it arrived. body: read as it is passed on, not before."""

    method: str
    path: str
    headers: Mapping[str, str]
    handler: http.server.BaseHTTPRequestHandler

    def answer(self, status: int, body: bytes = b"", **headers: str) -> bool:
        """Answer in the place of the registry."""
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(body)))
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(body)
        self.handler.close_connection = True  # what it sends as a body is not read
        return True


#: True: it was answered. None or False: it is passed on. A number: the connection is cut after so many bytes of the
#: body, of the request where it has one, else of the answer; with LOST when the registry has answered.
LOST = 1 << 40
Rule = Callable[[Request], "bool | int | None"]


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a connection that a client gave up on is part of the tests."""


@dataclass
class Front:
    """A running front. requests: all that arrived, in their order."""

    upstream: str
    rule: Rule
    host: str = ""
    requests: list[Request] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"http://{self.host}"

    def reference(self, name: str) -> Reference:
        return parse(f"{self.host}/{name}")

    def client(self, name: str) -> RegistryClient:
        return RegistryClient(self.reference(name))


@contextlib.contextmanager
def front(upstream: str, rule: Rule, *, name: str = "127.0.0.1") -> Iterator[Front]:
    """Run a front before the registry at `upstream` (host:port). name: by which its clients know it."""
    made = Front(upstream, rule)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            request = Request(self.command, self.path, dict(self.headers.items()), self)
            made.requests.append(request)
            verdict = made.rule(request)
            if verdict is not True:
                cut = verdict if isinstance(verdict, int) and verdict is not False else None
                _pass_on(made, request, cut)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = _Server((name, 0), Handler)
    made.host = f"{name}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _pass_on(made: Front, request: Request, cut: int | None) -> None:
    handler = request.handler
    length = int(request.headers.get("Content-Length", 0))
    skipped = ("host", "content-length", "connection")
    headers = {name: value for name, value in request.headers.items() if name.lower() not in skipped}
    registry = http.client.HTTPConnection(made.upstream, timeout=30)
    with contextlib.closing(registry):
        registry.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        # The registry makes its addresses of this name.
        registry.putheader("Host", made.host)
        for name, value in headers.items():
            registry.putheader(name, value)
        if length or request.method in ("POST", "PUT"):
            registry.putheader("Content-Length", str(length))
        registry.endheaders()
        left = length
        while left:
            if cut is not None and length - left >= cut:
                return _cut(handler)
            piece = handler.rfile.read(min(_PIECE, left))
            if not piece:
                return None
            registry.send(piece)
            left -= len(piece)
        answer = registry.getresponse()
        if cut == LOST:
            return _cut(handler)
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                handler.send_header(name, value)
        handler.end_headers()
        sent = 0
        while request.method != "HEAD" and (piece := answer.read(_PIECE)):
            if cut is not None and not length and sent + len(piece) > cut:
                handler.wfile.write(piece[: cut - sent])
                return _cut(handler)
            handler.wfile.write(piece)
            sent += len(piece)
    return None


def _cut(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.shutdown(2)


@dataclass
class TokenServer:
    """A rule that wants a Bearer token of its own for every request, as ghcr.io, Docker Hub and Harbor do.

    login: NAME:PASSWORD in base64 that gets a token; anyone where it is None. lasting: seconds, as it says.
    """

    login: str | None = None
    lasting: int = 300
    realm: str = ""
    issued: list[str] = field(default_factory=list)
    scopes: list[str] = field(default_factory=list)
    valid: set[str] = field(default_factory=set)

    def __call__(self, request: Request) -> bool | None:
        url = urllib.parse.urlsplit(request.path)
        given = request.headers.get("Authorization", "")
        if url.path == "/token":
            if self.login is not None and given != f"Basic {self.login}":
                return request.answer(401, b'{"details": "incorrect username or password"}')
            return self._issue(request, urllib.parse.parse_qs(url.query))
        scope = f"repository:{url.path.removeprefix('/v2/').rpartition('/blobs')[0] or 'x'}:pull,push"
        if given.removeprefix("Bearer ") not in self.valid:
            realm = self.realm or f"http://{request.headers['Host']}/token"
            challenge = f'Bearer realm="{realm}",service="registry, of the tests",scope="{scope}"'
            body = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
            return request.answer(401, body, WWW_Authenticate=challenge)
        # The registry itself asks for nothing, and would not know what this header is.
        request.headers = {name: value for name, value in request.headers.items() if name != "Authorization"}
        return None

    def _issue(self, request: Request, query: Mapping[str, list[str]]) -> bool:
        token = f"t0ken-{len(self.issued)}"
        self.issued.append(token)
        self.scopes += query["scope"]
        self.valid.add(token)
        assert query["service"] == ["registry, of the tests"]
        return request.answer(200, json.dumps({"token": token, "expires_in": self.lasting}).encode())
