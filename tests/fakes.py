"""A container engine by hand, for tests of what the builder does around one. `tests/contract` holds it to the real
one's behaviour.

It plays the steps of `tests.scripts`, in threads; it has no images but names, and no mounts but a check that bind
sources exist.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from builder.engine.api import ContainerSpec, Image, ListedContainer, State
from builder.engine.errors import NotFoundError, refusal
from builder.engine.log_resume import stored_form
from builder.errors import EngineLostError, EngineRefusedError
from tests import scripts

PIECE = 16 << 10


class FakeAttachment:
    """One end of a socket pair."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours

    def readinto(self, buffer: memoryview) -> int:
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        finally:
            self._socket.close()


@dataclass
class FakeContainer:
    """What the fake engine knows about one container."""

    id: str
    spec: ContainerSpec
    status: str = "created"
    exit_code: int = 0
    oom_killed: bool = False
    error: str = ""
    stored: list[tuple[int, bytes]] = field(default_factory=list)
    outputs: list[socket.socket] = field(default_factory=list)
    stdin: socket.socket | None = None
    stdin_closed: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)
    on_term: int | None = 128 + 15
    changed: threading.Condition = field(default_factory=threading.Condition)
    writing: threading.Lock = field(default_factory=threading.Lock)
    _partial: dict[int, bytes] = field(default_factory=lambda: {1: b"", 2: b""})

    def write(self, stream: int, data: bytes) -> None:
        """Output of the program: to whoever is attached, and into the stored log."""
        with self.writing:
            self._write(stream, data)

    def _write(self, stream: int, data: bytes) -> None:
        for output in list(self.outputs):
            try:
                output.sendall(struct.pack(">BxxxL", stream, len(data)) + data)
            except OSError:
                self.outputs.remove(output)
                output.close()
        with self.changed:
            *lines, rest = (self._partial[stream] + data).split(b"\n")
            for line in lines:
                self._store(stream, line + b"\n")
            while len(rest) >= PIECE:
                self._store(stream, rest[:PIECE])
                rest = rest[PIECE:]
            self._partial[stream] = rest
            self.changed.notify_all()

    def _store(self, stream: int, line: bytes) -> None:
        for at in range(0, len(line), PIECE):
            self.stored.append((stream, stored_form(line[at : at + PIECE]).encode()))

    def end(self, status: int) -> None:
        """The program is over; the first status counts."""
        with self.changed:
            if self.ended.is_set():
                return
            for stream, rest in self._partial.items():
                if rest:
                    self._store(stream, rest)
            self.status, self.exit_code = "exited", status
            self.ended.set()
            self.changed.notify_all()
        self.cut()
        if self.stdin is not None:
            self.stdin.close()

    def cut(self) -> None:
        """Breaks every attachment to the output."""
        for output in self.outputs:
            output.close()
        self.outputs.clear()


class FakeEngine:
    """images: names it has. refuse: called with an operation's name and its container's spec before each; may raise."""

    def __init__(self, images: Sequence[str] = ("tiny:1",)) -> None:
        self.images = set(images)
        self.all: dict[str, FakeContainer] = {}
        self.lost = False
        self.hook: Callable[[str, ContainerSpec | None], None] = lambda operation, spec: None
        self.calls: list[str] = []
        self.created: list[ContainerSpec] = []
        self.identity = ""
        self._ids = itertools.count(1)

    # --- as the real one ---

    def image(self, ref: str) -> Image | None:
        self._call("image", None)
        return Image(id=f"sha256:{ref}", ref=ref) if ref in self.images else None

    def create(self, spec: ContainerSpec) -> str:
        self._call("create", spec)
        if spec.image not in self.images:
            raise NotFoundError(f"cannot create {spec.name}: No such image: {spec.image}", status=404)
        for mount in spec.mounts:
            if mount.kind == "bind" and not os.path.lexists(mount.source):
                what = f"invalid mount config: bind source path does not exist: {mount.source}"
                raise refusal(f"cannot create {spec.name}", 400, what)
        if any(container.spec.name == spec.name for container in self.all.values()):
            raise EngineRefusedError(f"cannot create {spec.name}: Conflict. The name is already in use", status=409)
        container = FakeContainer(f"{next(self._ids):064x}", spec)
        self.all[container.id] = container
        self.created.append(spec)
        return container.id

    def start(self, container: str) -> None:
        it = self._get("start", container)
        if it.spec.network not in ("none", "host", "bridge"):
            it.error = f"network {it.spec.network} not found"
            raise NotFoundError(f"cannot start {container[:12]}: {it.error}", status=404)
        steps = scripts.steps_of(list(it.spec.command)) or [scripts.err("init: no such program\n"), scripts.leave(127)]
        it.status = "running"
        threading.Thread(target=self._play, args=(it, steps), name="fake-container", daemon=True).start()

    def state(self, container: str) -> State:
        it = self._get("state", container)
        return State(it.status, it.exit_code, it.oom_killed)

    def stop(self, container: str, grace: float) -> None:
        it = self._get("stop", container)
        if it.status != "running":
            return
        it.stopping.set()
        if it.on_term is not None:
            it.end(it.on_term)
        elif not it.ended.wait(grace):
            it.end(137)

    def remove(self, container: str, *, force: bool = False) -> None:
        self._call("remove", self.all[container].spec if container in self.all else None)
        it = self.all.get(container)
        if it is None:
            return
        if it.status == "running":
            if not force:
                raise EngineRefusedError(f"cannot remove {container[:12]}: it is running", status=409)
            it.end(137)
        it.cut()
        del self.all[container]

    def attach_output(self, container: str) -> FakeAttachment:
        it = self._get("attach_output", container)
        ours, theirs = socket.socketpair()
        it.outputs.append(theirs)
        return FakeAttachment(ours)

    def attach_stdin(self, container: str) -> FakeAttachment:
        it = self._get("attach_stdin", container)
        ours, it.stdin = socket.socketpair()
        return FakeAttachment(ours)

    def log_frames(self, container: str, *, follow: bool, tail: int | None = None) -> Iterator[tuple[int, bytes]]:
        it = self._get("log_frames", container)
        return self._entries(it, follow, 0 if tail is None else max(0, len(it.stored) - tail))

    def containers(self, labels: Sequence[str]) -> list[ListedContainer]:
        self._call("containers", None)
        wanted = [label.partition("=") for label in labels]
        return [
            ListedContainer(it.id, it.spec.name, it.status, it.spec.labels)
            for it in self.all.values()
            if all(
                name in it.spec.labels and (not equals or it.spec.labels[name] == value)
                for name, equals, value in wanted
            )
        ]

    # --- behind it ---

    def _call(self, operation: str, spec: ContainerSpec | None) -> None:
        self.calls.append(operation)
        if self.lost:
            raise EngineLostError("the engine is away")
        self.hook(operation, spec)

    def _get(self, operation: str, container: str) -> FakeContainer:
        it = self.all.get(container)
        self._call(operation, it.spec if it else None)
        if it is None:
            raise NotFoundError(f"No such container: {container}", status=404)
        return it

    @staticmethod
    def _entries(it: FakeContainer, follow: bool, at: int) -> Iterator[tuple[int, bytes]]:
        while True:
            with it.changed:
                while follow and len(it.stored) == at and not it.ended.is_set():
                    it.changed.wait()
                entries = it.stored[at:]
            yield from entries
            at += len(entries)
            if not follow or (it.ended.is_set() and at == len(it.stored)):
                return

    @staticmethod
    def _play(it: FakeContainer, steps: list[scripts.Step]) -> None:
        for name, value in steps:
            if it.ended.is_set():
                return
            if name in ("out", "err"):
                it.write(1 if name == "out" else 2, base64.b64decode(value))
            elif name == "on-term":
                it.on_term = value
            elif name in ("pause", "hang"):
                it.ended.wait(value)
            elif name == "read":
                if it.stdin is not None:
                    it.stdin.recv(1)
            elif name == "exit":
                it.end(value)
        it.end(0)


def is_locked(path: Path) -> bool:
    """Whether any process holds an exclusive lock on this file."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# --- HTTP on a unix socket -------------------------------------------------------------------------------------------


@contextmanager
def listening(path: Path, answer: Callable[[bytes], bytes | None]) -> Iterator[str]:
    """A unix socket whose every request gets this answer; None: silence."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            held.append(connection)
            request = connection.recv(65536)
            reply = answer(request) if request else b""
            if reply:
                connection.sendall(reply)
            if reply is not None:
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"unix://{path}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)
        for connection in held:
            connection.close()


def http(body: object, status: str = "200 OK") -> bytes:
    data = json.dumps(body).encode() if not isinstance(body, bytes) else body
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
