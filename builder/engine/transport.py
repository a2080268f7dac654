"""The first question to an engine behind a unix socket, asked before docker-py is there to ask it.

An engine takes 20 ms to describe itself, because it runs its runtime for that; importing docker-py takes longer. So the
question goes out first, and its answer, which also says what API the engine speaks, is read after the import.
"""

from __future__ import annotations

import http.client
import json
import os
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


def is_this_machine(info: Mapping[str, Any]) -> bool:
    """Whether an engine that says this of itself runs on the kernel that we run on, as far as names tell."""
    here = os.uname()
    return (info.get("Name"), info.get("KernelVersion")) == (here.nodename, here.release)


def version(text: object) -> tuple[int, int] | None:
    """``1.41`` as numbers; None for anything else."""
    parts = text.split(".") if isinstance(text, str) else []
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None
