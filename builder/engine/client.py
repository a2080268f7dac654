"""The only module that talks to docker-py. Everything it raises is an EngineLostError or an EngineRefusedError.

docker-py is imported when an engine is connected to, because the import costs a tenth of a second. Only what may be
asked twice is tried again; a create, start or build whose answer was lost may have happened, and its caller has to
look.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import math
import os
import posixpath
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from builder.engine.api import Attachment, ContainerSpec, Found, Image, Mount, State
from builder.engine.attachment import Connection
from builder.engine.errors import NotFoundError, is_transient, loss, refusal
from builder.engine.podman import Drained, is_between_states, is_podman, stored_log
from builder.engine.pull_progress import PullProgress
from builder.engine.streams import Demux
from builder.engine.transport import Greeting, is_this_machine, version
from builder.engine.tunnel import Tunnel
from builder.engine.volumes import Volumes, found_in
from builder.errors import BuilderError, EngineLostError, EngineRefusedError, EngineTimeoutError
from builder.host.deadlines import Deadline, poll, retry_reads
from builder.text import readable

__all__ = ["ContainerSpec", "Engine", "EngineTimeoutError", "Found", "Image", "Mount", "NotFoundError", "State"]

#: Engine 19.03, the first with device requests for GPUs.
MINIMUM_API = (1, 40)
DEFAULT_SOCKET = "unix:///var/run/docker.sock"

#: Seconds for questions that an engine answers from memory. One that takes longer is in trouble: who asks has to know.
QUICK = 10.0
#: Seconds for a start: the GPU driver's hook initialises every GPU when nothing keeps them awake.
START = 120.0


class Engine(Volumes):
    """One engine. url None means ``DOCKER_HOST``, else the default socket; timeout in seconds for one answer.

    Nothing is contacted before `connect`, or the first question.
    """

    def __init__(self, url: str | None = None, timeout: float = 60.0) -> None:
        self._given = url
        self._timeout = timeout
        self._client: Any = None
        self._local: bool | None = None
        self._tunnel: Tunnel | None = None
        self.api_version = ""

    # --- the connection ----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the engine is looked for."""
        return self._given or os.environ.get("DOCKER_HOST") or DEFAULT_SOCKET

    def connect(self) -> Engine:
        """Raises EngineLostError, in words for whoever has to start one, when no usable engine answers."""
        if self._client is None:
            try:
                with self._translated(f"cannot reach a container engine at {self._place()}"):
                    self._client = self._open()
            except BaseException:
                self.close()
                raise
        return self

    def close(self) -> None:
        """Lets go of the engine. May be called twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._tunnel is not None:
            self._tunnel.close()
            self._tunnel = None

    def _open(self) -> Any:
        url = self.url
        greeting = None
        if url.startswith("ssh://"):
            self._tunnel = Tunnel(url)
            url = self._tunnel.url
        elif url.startswith("unix://"):
            # Where nothing listens this fails first: docker-py would leave its half-made socket behind.
            greeting = Greeting(url.removeprefix("unix://"), self._timeout)
        with contextlib.closing(greeting) if greeting else contextlib.nullcontext():
            import docker
            from docker.utils import kwargs_from_env

            said, info = greeting.answer() if greeting else (None, {})
        if info:
            self._local = is_this_machine(info)
            self.podman = is_podman(info)
        # Never from_env(): that one asks for the version with errors of its own.
        options = dict(kwargs_from_env(environment={**os.environ, "DOCKER_HOST": url}))
        api_client: Any = docker.APIClient
        new_client = functools.partial(api_client, timeout=self._timeout, **options)
        if said is not None:
            self.api_version = self._agree(said)
            # Ours at once, so that whatever happens next closes it.
            self._client = client = new_client(version=self.api_version)
            # An engine that is much newer than docker-py may not speak docker-py's version any more.
            if client.get(client._url("/_ping"), timeout=self._timeout).ok:  # noqa: SLF001
                return client
            client.close()
        with contextlib.closing(new_client(version="1.40")) as client:
            answer = client.version(api_version=False)
        known = answer if isinstance(answer, dict) else {}
        self.api_version = self._agree(known.get("ApiVersion"), known.get("MinAPIVersion"))
        return new_client(version=self.api_version)

    def _agree(self, engines_newest: object, engines_oldest: object = None) -> str:
        """The newest version of the API that both sides know. Raises EngineLostError when there is none for us."""
        from docker.constants import DEFAULT_DOCKER_API_VERSION

        newest = version(engines_newest)
        if newest is None:
            raise EngineLostError(f"what answers at {self._place()} is no container engine: it gave no API version")
        if newest < MINIMUM_API:
            raise EngineLostError(
                f"the engine at {self._place()} is too old: it has API {newest[0]}.{newest[1]}, and device requests "
                f"need {MINIMUM_API[0]}.{MINIMUM_API[1]}. Update it to Docker Engine 19.03 or later"
            )
        oldest = version(engines_oldest) or MINIMUM_API
        major, minor = max(oldest, min(newest, version(DEFAULT_DOCKER_API_VERSION) or newest))
        return f"{major}.{minor}"

    @property
    def _quick(self) -> float:
        return min(QUICK, self._timeout)

    @property
    def _api(self) -> Any:
        if self._client is None:
            self.connect()
        return self._client

    def _place(self) -> str:
        if self._given or os.environ.get("DOCKER_HOST"):
            return f"{self.url} (DOCKER_HOST)"
        return f"{self.url} (DOCKER_HOST is not set)"

    @property
    def info(self) -> Mapping[str, Any]:
        """What the engine says about itself and its host."""
        answer: Mapping[str, Any] = self._read("cannot ask the engine about itself", lambda: self._get("/info").json())
        return answer

    @property
    def local(self) -> bool:
        """Whether the engine's paths are ours, as far as it can be told without a container: a unix socket, the same
        host name and the same running kernel. A builder in a container of its own has another host name.
        """
        if self._local is None:
            self._local = self.url.startswith("unix://") and is_this_machine(self.info)
        return self._local

    @functools.cached_property
    def podman(self) -> bool:
        """Whether it is Podman behind Docker's API: docker/README.md says what is different there."""
        return is_podman(self.info)

    # --- images ------------------------------------------------------------------------------------------------------

    def image(self, ref: str) -> Image | None:
        """The image the engine has under this name or id, or None."""
        try:
            data = self._read(f"cannot look for the image {ref}", lambda: self._get("/images/{0}/json", ref).json())
        except NotFoundError:
            return None
        config = data.get("Config") or {}
        return Image(
            id=data["Id"],
            ref=ref,
            digests=tuple(data.get("RepoDigests") or ()),
            labels=config.get("Labels") or {},
            env=dict(entry.partition("=")[::2] for entry in config.get("Env") or ()),
            workdir=config.get("WorkingDir") or "",
            size=data.get("Size") or 0,
        )

    def pull(self, ref: str, on_progress: Callable[[str], None] = lambda text: None) -> Image:
        """Pulls, and says how far it is when that has changed: layers, and bytes of those being loaded."""
        from docker.utils import parse_repository_tag

        doing = f"cannot pull {ref}"
        with self._translated(doing):
            name, tag = parse_repository_tag(ref)
            where = {"fromImage": name, "tag": tag or "latest"}
            headers = self.credentials(name)
            response = self._request("POST", "/images/create", params=where, headers=headers, **self._long)
        progress = PullProgress(where["tag"])
        with contextlib.closing(response):
            for message in self._messages(response, doing):
                if text := progress.text(message):
                    on_progress(f"{ref}: {text}")
        image = self.image(ref)
        if image is None:
            raise EngineRefusedError(f"{doing}: the engine pulled it and does not have it", status=404)
        return image

    def credentials(self, name: str) -> Mapping[str, Any]:
        """What this user's docker login says about the registry of a repository, as a header."""
        from docker import auth

        registry, _ = auth.resolve_repository_name(name)
        found = auth.get_config_header(self._api, registry)
        return {"X-Registry-Auth": found} if found else {}

    def ask(self, doing: str, method: str, path: str, *names: str, **options: Any) -> Any:
        """One question beyond those of this class, asked once; the answer's JSON, None for an empty one."""
        with self._translated(doing):
            answer = self._request(method, path, *names, **options)
            return answer.json() if answer.content else None

    def build(
        self,
        context: bytes,
        *,
        tag: str,
        labels: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> Image:
        """Builds from a tar with a Dockerfile, line by line. Raises EngineRefusedError whose notes are the last
        lines.
        """
        doing = f"building {tag} failed"
        options = {"t": tag, "labels": json.dumps(dict(labels or {})), "rm": 1, "forcerm": 1}
        headers = {"Content-Type": "application/x-tar"}
        with self._translated(doing):
            self._api._set_auth_headers(headers)  # noqa: SLF001 - docker-py has no public way to it
            response = self._request("POST", "/build", params=options, headers=headers, data=context, **self._long)
        tail: deque[str] = deque(maxlen=20)
        try:
            with contextlib.closing(response):
                for message in self._messages(response, doing):
                    for line in str(message.get("stream", "")).splitlines():
                        if text := readable(line).rstrip():
                            tail.append(text)
                            on_line(text)
        except EngineRefusedError as error:
            error.notes = tuple(tail)
            raise
        image = self.image(tag)
        if image is None:
            raise EngineRefusedError(
                f"{doing}: the engine built it and does not have it", status=404, notes=tuple(tail)
            )
        return image

    @property
    def _long(self) -> dict[str, Any]:
        """For what may take hours and be silent for minutes, once the engine has taken it on."""
        return {"stream": True, "timeout": (self._timeout, None)}

    def _messages(self, response: Any, doing: str) -> Iterator[Mapping[str, Any]]:
        """The engine's progress, one JSON object a line; an error among them is the end."""
        for line in self._iterated(response.iter_lines(), doing):
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(message, dict):
                continue
            if message.get("error"):
                raise EngineRefusedError(f"{doing}: {readable(str(message['error'])).strip()}")
            yield message

    # --- containers --------------------------------------------------------------------------------------------------

    def create(self, spec: ContainerSpec) -> str:
        """Creates and returns the id. Never tried again: when the answer is lost, look for the name."""
        with self._translated(f"cannot create {spec.name}"):
            answer = self._request("POST", "/containers/create", params={"name": spec.name}, json=spec.body())
            return str(answer.json()["Id"])

    def start(self, container: str) -> None:
        with self._translated(f"cannot start {container[:12]}"):
            self._request("POST", "/containers/{0}/start", container, timeout=max(START, self._timeout))

    def state(self, container: str) -> State:
        data = self._read(
            f"cannot look at {container[:12]}",
            lambda: self._get("/containers/{0}/json", container, timeout=self._quick).json()["State"],
        )
        return State.told(data, knows_memory=not self.podman)

    def stop(self, container: str, grace: float) -> None:
        seconds = max(0, math.ceil(grace))
        with self._translated(f"cannot stop {container[:12]}"):
            self._request(
                "POST", "/containers/{0}/stop", container, params={"t": seconds}, timeout=seconds + self._timeout
            )

    def remove(self, container: str, *, force: bool = False) -> None:
        try:
            retry_reads(lambda: self._remove(container, force), is_between_states)
        except NotFoundError:
            return
        except EngineRefusedError as error:
            # Another client is at it already.
            if "in progress" not in error.message or not poll(
                lambda: self._is_gone(container), Deadline(QUICK), every=0.05
            ):
                raise

    def _remove(self, container: str, force: bool) -> None:
        with self._translated(f"cannot remove {container[:12]}"):
            self._request("DELETE", "/containers/{0}", container, params={"v": 1, "force": int(force)})

    def _is_gone(self, container: str) -> bool:
        try:
            self.state(container)
        except NotFoundError:
            return True
        return False

    def containers(self, labels: Sequence[str]) -> list[Found]:
        params = {"all": 1, "filters": json.dumps({"label": list(labels)})}
        listing = self._read("cannot list containers", lambda: self._get("/containers/json", params=params).json())
        return [found_in(entry) for entry in listing]

    # --- streams -----------------------------------------------------------------------------------------------------

    def attach_output(self, container: str) -> Attachment:
        return self._attach(container, {"stdout": 1, "stderr": 1, "stream": 1})

    def attach_stdin(self, container: str) -> Attachment:
        if not self.podman:
            return self._attach(container, {"stdin": 1, "stream": 1})
        return Drained(self._attach(container, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}))

    def _attach(self, container: str, params: Mapping[str, int]) -> Attachment:
        """A connection of its own. docker-py's own attach has no timeout before the engine's first answer."""
        headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
        with self._translated(f"cannot attach to {container[:12]}"):
            response = self._request(
                "POST", "/containers/{0}/attach", container, params=params, headers=headers, stream=True
            )
            return Connection(self._socket(response), response)

    def _socket(self, response: Any) -> socket.socket:
        raw = self._api._get_raw_response_socket(response)  # noqa: SLF001 - docker-py has no public way to it
        found: socket.socket = getattr(raw, "_sock", raw)
        return found

    def log_frames(self, container: str, *, follow: bool, tail: int | None = None) -> Iterator[tuple[int, bytes]]:
        if self.podman:
            read = functools.partial(self._log_frames, container, False, tail)
            return stored_log(read, functools.partial(self.state, container) if follow else None)
        return self._log_frames(container, follow, tail)

    def _log_frames(self, container: str, follow: bool, tail: int | None) -> Iterator[tuple[int, bytes]]:
        params = {"stdout": 1, "stderr": 1, "follow": int(follow), "tail": "all" if tail is None else tail}
        doing = f"cannot read the log of {container[:12]}"
        with self._translated(doing):
            response = self._request("GET", "/containers/{0}/logs", container, params=params, stream=True)
            if follow:
                self._socket(response).settimeout(None)
        return self._frames(response, doing)

    def _frames(self, response: Any, doing: str) -> Iterator[tuple[int, bytes]]:
        demux = Demux()
        with contextlib.closing(response):
            for chunk in self._iterated(response.raw.stream(1 << 18, decode_content=False), doing):
                yield from demux.whole(chunk)

    # --- files -------------------------------------------------------------------------------------------------------

    def archive(self, container: str, path: str) -> Generator[bytes, None, None]:
        """The tar of a path in a container that need not run. Raises NotFoundError at once when there is none."""
        doing = f"cannot read {path} in {container[:12]}"
        # requests offers gzip by itself, the engine takes the offer, and what is read below is what is on the wire.
        how: dict[str, Any] = {"params": {"path": path}, "headers": {"Accept-Encoding": "identity"}, "stream": True}
        with self._translated(doing):
            response = self._request("GET", "/containers/{0}/archive", container, **how)
        return self._chunks(response, doing)

    def _chunks(self, response: Any, doing: str) -> Generator[bytes, None, None]:
        with contextlib.closing(response):
            yield from self._iterated(response.raw.stream(1 << 20, decode_content=False), doing)

    def link_target(self, container: str, path: str) -> str | None:
        """Where a symbolic link leads, relative to the directory it lies in; empty for anything else, None when it is
        missing.
        """
        try:
            response = self._read(
                f"cannot look at {path} in {container[:12]}",
                lambda: self._request(
                    "HEAD", "/containers/{0}/archive", container, params={"path": path}, timeout=self._quick
                ),
            )
        except NotFoundError:
            return None
        status = json.loads(base64.b64decode(response.headers.get("X-Docker-Container-Path-Stat", "e30=")))
        target = str(status.get("linkTarget") or "")
        # The engine resolves it inside the container, to an absolute path. Podman says this very path, link or not.
        target = "" if target == path else target
        return posixpath.relpath(target, posixpath.dirname(path)) if target.startswith("/") else target

    # --- one request, one translator ---------------------------------------------------------------------------------

    def _get(self, path: str, *names: str, **options: Any) -> Any:
        return self._request("GET", path, *names, **options)

    def _request(self, method: str, path: str, *names: str, timeout: Any = None, **options: Any) -> Any:
        api = self._api
        self._knock()
        url = api._url(path, *names)  # noqa: SLF001 - knows the transport and the version
        response = api.request(method, url, timeout=timeout or self._timeout, **options)
        api._raise_for_status(response)  # noqa: SLF001 - gives the engine's words, not only its status
        return response

    def _knock(self) -> None:
        """Raises OSError when nothing listens on the socket; docker-py would leave one of its own open each time."""
        url = self._tunnel.url if self._tunnel else self.url
        if url.startswith("unix://"):
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as knock:
                knock.settimeout(self._timeout)
                knock.connect(url.removeprefix("unix://"))

    def _read(self, doing: str, read: Callable[[], Any]) -> Any:
        def translated() -> Any:
            with self._translated(doing):
                return read()

        return retry_reads(translated, is_transient)

    def _iterated(self, items: Iterable[Any], doing: str) -> Iterator[Any]:
        """The items, with only their arrival under the translator: what the caller does with them is not the engine's
        fault.
        """
        iterator = iter(items)
        while True:
            with self._translated(doing):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except BuilderError:
            raise
        except Exception as error:
            explained = self._explained(doing, error)
            if explained is None:
                raise
            raise explained from error

    def _explained(self, doing: str, error: Exception) -> EngineLostError | None:
        """What it means; None for what is no failure of an engine."""
        import docker
        import urllib3

        if isinstance(error, docker.errors.APIError):
            return refusal(doing, error.status_code or 0, str(error.explanation or ""))
        # requests' own errors are OSErrors, all of them.
        lost = (
            docker.errors.DockerException,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
            OSError,
            ValueError,
        )
        if isinstance(error, lost):
            return loss(doing, error, hint=self._tunnel.complaint() if self._tunnel else "")
        return None
