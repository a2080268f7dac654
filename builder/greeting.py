"""The first question to an engine behind a unix socket, asked before docker-py is there to ask it.

An engine takes 20 ms to describe itself, because it runs its runtime for that; importing docker-py takes longer. So the
question goes out first, and its answer, which also says what API the engine speaks, is read after the import.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any


class Greeting:
    """Connects and asks. Raises OSError where nothing listens. timeout: seconds for the answer."""

    def __init__(self, path: str, timeout: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self._socket.sendall(b"GET /info HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
        except BaseException:
            self.close()
            raise

    def answer(self) -> tuple[str | None, Mapping[str, Any]]:
        """The newest API version of the engine, and what it says about itself; None and nothing where it says neither.

        Raises OSError and HTTPException where what answers does not speak HTTP.
        """
        with http.client.HTTPResponse(self._socket, method="GET") as response:
            response.begin()
            version, data = response.getheader("Api-Version"), response.read()
        try:
            told = json.loads(data) if response.status == http.HTTPStatus.OK else None
        except (ValueError, RecursionError):
            told = None
        return version, told if isinstance(told, dict) else {}

    def close(self) -> None:
        self._socket.close()
