"""A place to run single containers of the tiny image in, with an engine that can be disturbed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builder.engine.api import ContainerSpec
from builder.engine.client import Engine
from builder.engine.container import ContainerOutcome, Deadlines, Sinks, run_container
from builder.engine.lease import Lease
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline, poll
from builder.job import Job
from tests.scripts import LABEL, Step, command

#: What a program in a container needs to speak the protocol.
PRELUDE = """
import json, os, signal, sys, threading, time
job = json.loads(os.environ["WARM_CACHE_JOB"])
def event(name, **fields):
    line = "@warmup " + job["nonce"] + " " + json.dumps({"event": name, **fields}) + "\\n"
    os.write(1, line.encode())
    return len(line)
"""


class Workshop:
    """Runs containers the way the builder does. Everything is small and quick unless a test says otherwise."""

    def __init__(self, engine: Engine, image: str, directory: Path) -> None:
        self.engine = engine
        self.image = image
        self.directory = directory
        self.mark = os.urandom(6).hex()
        self.cancel = Cancel()
        self.shown: list[tuple[str, str]] = []
        self.heard: list[Any] = []
        self.log_path = directory / "task.log"
        self.lease = Lease(directory, run_id=self.mark, engine=engine.identity)

    def spec(self, *steps: Step, source: str = "", **more: Any) -> ContainerSpec:
        """The container of a test: steps, or a program that may use the prelude."""
        fields: dict[str, Any] = {
            "image": self.image,
            "name": f"test-{os.urandom(6).hex()}",
            "command": ["python3", "-c", PRELUDE + source] if source else command(*steps),
            "labels": {LABEL: self.mark},
            "network": "none",
            "shm_size": 64 << 20,
        }
        return ContainerSpec(**fields | more)

    def run(
        self, *steps: Step, engine: Any = None, deadlines: Any = None, spec: Any = None, **more: Any
    ) -> ContainerOutcome:
        limits: dict[str, float] = {"task": 60, "silence": 60, "start": 60, "grace": 2}
        options = {name: more.pop(name) for name in ("on_event", "budget", "display") if name in more}
        display = options.pop("display", lambda stream, line: self.shown.append((stream, line)))
        return run_container(
            engine or self.engine,
            spec or self.spec(*steps, **more),
            job=Job(mode="run", nonce=self.lease.nonce, mount="/jit"),
            lease=self.lease,
            deadlines=Deadlines(**limits | (deadlines or {})),
            cancel=self.cancel,
            sinks=Sinks(log_path=self.log_path, display=display),
            **{"on_event": self.heard.append, **options},
        )

    def left(self) -> list[str]:
        """Containers of this test that the engine still has."""
        return [found.name for found in self.engine.containers([f"{LABEL}={self.mark}"])]

    def ids(self) -> list[str]:
        return [found.id for found in self.engine.containers([f"{LABEL}={self.mark}"])]

    def log(self) -> dict[str, bytes]:
        """Each stream's lines as the file has them."""
        found = {b"out": b"", b"err": b""}
        for line in self.log_path.read_bytes().split(b"\n")[:-1]:
            found[line[:3]] += line[5:] + b"\n"
        return {name.decode(): data for name, data in found.items()}


class Proxy:
    """A unix socket before the engine's, that can cut attachments after so many bytes, hang, and go away.

    before: called with what a client asks, before the engine gets it.
    """

    def __init__(self, path: Path, engine: str) -> None:
        self.url = f"unix://{path}"
        self.cut_after: int | None = None
        self.cuts = 0
        self.hang = False
        self.before: Callable[[bytes], object] = lambda request: None
        self._engine = engine.removeprefix("unix://")
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        for end in (self._listener, *self._open):
            self._end(end)
            end.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(self._engine)
            self._open += [client, engine]
            threading.Thread(target=self._requests, args=(client, engine), daemon=True).start()

    def _requests(self, client: socket.socket, engine: socket.socket) -> None:
        data = self._receive(client)
        output = b"/attach" in data and b"stdout=1" in data and b"stdin=1" not in data
        threading.Thread(target=self._answers, args=(client, engine, output), daemon=True).start()
        while data:
            if self.hang:
                return
            self.before(data)
            try:
                engine.sendall(data)
            except OSError:  # closed meanwhile
                break
            data = self._receive(client)
        self._end(engine)

    def _answers(self, client: socket.socket, engine: socket.socket, output: bool) -> None:
        passed, in_body = 0, False
        while data := self._receive(engine):
            if self.hang:
                return
            if output and self.cut_after is not None and (in_body or not data.startswith(b"HTTP/")):
                data = data[: self.cut_after - passed]
                passed += len(data)
            in_body = in_body or data.startswith(b"HTTP/")
            try:
                client.sendall(data)
            except OSError:
                break
            if output and self.cut_after is not None and passed >= self.cut_after:
                self.cuts += 1
                break
        self._end(client)

    @staticmethod
    def _receive(end: socket.socket) -> bytes:
        try:
            return end.recv(65536)
        except OSError:
            return b""

    @staticmethod
    def _end(end: socket.socket) -> None:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def when_ready(shop: Workshop, act: Callable[[], object]) -> threading.Thread:
    """Acts once the container has said that it is ready."""

    def run() -> None:
        if poll(lambda: ("out", "ready") in shop.shown, Deadline(20), every=0.01):
            act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def check(outcome: ContainerOutcome, ended: str, status: int | None) -> None:
    assert (outcome.ended, outcome.exit_code, outcome.problems) == (ended, status, [])
    assert outcome.log_complete


class Disturbed:
    """The engine, with something before or after one of its operations."""

    def __init__(self, engine: Engine, **disturbances: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        self._engine = engine
        self._disturbances = disturbances

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._engine, name)
        disturbance = self._disturbances.get(name)
        if disturbance is None:
            return real
        return lambda *arguments, **options: disturbance(lambda: real(*arguments, **options), arguments)


def raising(error: BaseException, *, after: bool) -> Callable[[Callable[..., Any], tuple[Any, ...]], Any]:
    def disturb(call: Callable[[], Any], _arguments: tuple[Any, ...]) -> Any:
        if after:
            answer = call()
            if hasattr(answer, "close"):
                answer.close()
        raise error

    return disturb
