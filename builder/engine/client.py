"""The engine, as the rest of the program uses it: containers, their streams and their files; images and volumes.

Everything that `Engine` raises is an EngineLostError, which includes EngineRefusedError and EngineTimeoutError.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import math
import posixpath
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from builder.engine import answers
from builder.engine.api import Attachment, ContainerSpec, ListedContainer, State
from builder.engine.errors import NotFoundError, RemovalInProgressError
from builder.engine.images import Images
from builder.engine.podman import STATES, OutputDrain, is_between_states, stored_log
from builder.engine.streams import Demux, HijackedConnection
from builder.engine.volumes import Volumes, listed_containers, may_mount
from builder.host.deadlines import Deadline, poll, retry_reads

T = TypeVar("T")

#: Seconds for a start: the GPU driver's hook initialises every GPU that no process keeps awake.
START_TIMEOUT = 120.0


class Engine(Images, Volumes):
    """One engine: keeps the promises of `api.Containers` with docker-py. Nothing is sent before the first request."""

    # --- containers --------------------------------------------------------------------------------------------------

    def create(self, spec: ContainerSpec) -> str:
        """Create a container and return its id. Never retried: if the answer is lost, look for the name."""
        with self._translated(f"cannot create {spec.name}"):
            body = spec.body(cdi=bool(spec.gpus) and self.uses_cdi)
            answer = self._request("POST", "/containers/create", params={"name": spec.name}, json=body)
            return answers.required_text(answers.an_object(answer.json()), "Id")

    def start(self, container: str) -> None:
        with self._translated(f"cannot start {container[:12]}"):
            self._request("POST", "/containers/{0}/start", container, timeout=max(START_TIMEOUT, self._timeout))

    def state(self, container: str) -> State:
        podman = self.podman

        def read(found: Mapping[str, Any]) -> State:
            state = answers.inner(found, "State")
            status = answers.required_text(state, "Status")
            return State(
                status=STATES.get(status, status),
                exit_code=answers.number(state, "ExitCode"),
                oom_killed=bool(state.get("OOMKilled")) or (None if podman else False),
            )

        return self._inspected(container, read)

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
        except RemovalInProgressError:
            if not poll(lambda: self._is_removed(container), Deadline(self._quick), every=0.05):
                raise

    def _remove(self, container: str, force: bool) -> None:
        with self._translated(f"cannot remove {container[:12]}"):
            self._request("DELETE", "/containers/{0}", container, params={"v": 1, "force": int(force)})

    def _is_removed(self, container: str) -> bool:
        try:
            self.state(container)
        except NotFoundError:
            return True
        return False

    def containers(self, labels: Sequence[str]) -> list[ListedContainer]:
        params = {"all": 1, "filters": json.dumps({"label": list(labels)})}
        return self._read(
            "cannot list containers", lambda: listed_containers(self._get("/containers/json", params=params).json())
        )

    def containers_with_gpus(self) -> list[ListedContainer]:
        """Return the running containers that were given GPUs."""
        listing = self._read("cannot list containers", lambda: listed_containers(self._get("/containers/json").json()))
        return [container for container in listing if self._inspected(container.id, _has_gpus)]

    def powerful_users(self, sources: Collection[str]) -> list[str]:
        """Return names of running containers that mount one of these sources and have CAP_SYS_ADMIN."""
        found = {container.id: container.name for _, container in self.mounting(sources)}
        return sorted(name for known, name in found.items() if self._inspected(known, may_mount))

    def _inspected(self, container: str, read: Callable[[Mapping[str, Any]], T]) -> T:
        return self._read(
            f"cannot inspect {container[:12]}",
            lambda: read(answers.an_object(self._get("/containers/{0}/json", container, timeout=self._quick).json())),
        )

    # --- streams -----------------------------------------------------------------------------------------------------

    def attach_output(self, container: str) -> Attachment:
        return self._attach(container, {"stdout": 1, "stderr": 1, "stream": 1})

    def attach_stdin(self, container: str) -> Attachment:
        if not self.podman:
            return self._attach(container, {"stdin": 1, "stream": 1})
        return OutputDrain(self._attach(container, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}))

    def _attach(self, container: str, params: Mapping[str, int]) -> Attachment:
        """Open a connection for these streams. docker-py's own attach waits without limit for the engine's answer."""
        headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
        with self._translated(f"cannot attach to {container[:12]}"):
            response = self._request(
                "POST", "/containers/{0}/attach", container, params=params, headers=headers, stream=True
            )
            return HijackedConnection(self._socket(response), response)

    def log_frames(self, container: str, *, follow: bool, tail: int | None = None) -> Iterator[tuple[int, bytes]]:
        if self.podman:
            read = functools.partial(self._log_frames, container, False, tail)
            return stored_log(read, functools.partial(self.state, container) if follow else None)
        return self._log_frames(container, follow, tail)

    def _log_frames(self, container: str, follow: bool, tail: int | None) -> Iterator[tuple[int, bytes]]:
        params = {"stdout": 1, "stderr": 1, "follow": int(follow), "tail": "all" if tail is None else tail}
        action = f"cannot read the log of {container[:12]}"
        with self._translated(action):
            response = self._request("GET", "/containers/{0}/logs", container, params=params, stream=True)
            if follow:
                self._socket(response).settimeout(None)
        return self._iterated(_frames(response), action)

    # --- files -------------------------------------------------------------------------------------------------------

    def archive(self, container: str, path: str) -> Generator[bytes, None, None]:
        """Return the tar of a path in a container, running or not. Raises NotFoundError at once if it is missing."""
        action = f"cannot read {path} in {container[:12]}"
        # requests offers gzip by default and the engine accepts, but the bytes below are read undecoded.
        headers = {"Accept-Encoding": "identity"}
        with self._translated(action):
            response = self._request(
                "GET", "/containers/{0}/archive", container, params={"path": path}, headers=headers, stream=True
            )
        return self._chunks(response, action)

    def upload(self, container: str, path: str, archive: Iterator[bytes]) -> None:
        """Unpack a tar in a directory of a container, running or not, whose root file system can be written."""
        with self._translated(f"cannot write to {path} in {container[:12]}"):
            headers = {"Content-Type": "application/x-tar"}
            params = {"path": path, "noOverwriteDirNonDir": "true"}
            self._request(
                "PUT", "/containers/{0}/archive", container, params=params, headers=headers, data=archive, **self._long
            ).close()

    def _chunks(self, response: Any, action: str) -> Generator[bytes, None, None]:
        with contextlib.closing(response):
            yield from self._iterated(response.raw.stream(1 << 20, decode_content=False), action)

    def link_target(self, container: str, path: str) -> str | None:
        """Return a symbolic link's target, relative to its directory; "" if it is no link, None if it is missing."""

        def read() -> str:
            response = self._request(
                "HEAD", "/containers/{0}/archive", container, params={"path": path}, timeout=self._quick
            )
            status = json.loads(base64.b64decode(response.headers.get("X-Docker-Container-Path-Stat", "e30=")))
            return answers.text(answers.an_object(status), "linkTarget")

        try:
            target = self._read(f"cannot look at {path} in {container[:12]}", read)
        except NotFoundError:
            return None
        # The engine resolves it to an absolute path in the container. Podman gives this same path for what is no link.
        target = "" if target == path else target
        return posixpath.relpath(target, posixpath.dirname(path)) if target.startswith("/") else target


def _has_gpus(found: Mapping[str, Any]) -> bool:
    host = answers.inner(found, "HostConfig")
    return bool(host.get("DeviceRequests")) or host.get("Runtime") == "nvidia"


def _frames(response: Any) -> Iterator[tuple[int, bytes]]:
    demux = Demux()
    with contextlib.closing(response):
        for chunk in response.raw.stream(1 << 18, decode_content=False):
            yield from demux.whole(chunk)
