"""The engine at another address, with a list of what was asked of it there."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from pathlib import Path

_REQUEST = re.compile(rb"^([A-Z]+) (/\S*) HTTP/1\.1\r\n", re.MULTILINE)


class Door:
    """Passes bytes on to the engine's unix socket, from another one (``path``) or from a port of this machine.

    An engine behind a port is one whose file system nobody can be sure to see.
    """

    def __init__(self, engine: str, path: Path | None = None) -> None:
        self._engine = engine.removeprefix("unix://")
        self._open: list[socket.socket] = []
        self.requests: list[str] = []
        if path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self.url = f"unix://{path}"
        else:
            self._listener = socket.socket(socket.AF_INET)
            self._listener.bind(("127.0.0.1", 0))
            self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._listener.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def asked(self, method: str) -> list[str]:
        """Paths of the requests with this method, without the version."""
        return [path for verb, path in (request.split(" ") for request in self.requests) if verb == method]

    def close(self) -> None:
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
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
            threading.Thread(target=self._pass, args=(engine, client), daemon=True).start()

    def _requests(self, client: socket.socket, engine: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 18):
                for method, path in _REQUEST.findall(data):
                    name = re.sub(rb"^/v1\.\d+", b"", path)
                    self.requests.append(f"{method.decode()} {name.decode()}")
                engine.sendall(self.asks(data))
        self._end(engine)

    def _pass(self, engine: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := engine.recv(1 << 18):
                client.sendall(self.answered(data))
        self._end(client)

    def asks(self, data: bytes) -> bytes:
        """Return what is passed on of these bytes to the engine."""
        return data

    def answered(self, data: bytes) -> bytes:
        """Return what is passed on of these bytes of the engine."""
        return data

    @staticmethod
    def _end(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_WR)
