"""Questions to the server that a recipe runs, on the container's own loopback."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from typing import Any

from builder.agent.process import Child

HOST = "127.0.0.1"


class Client:
    """Talks to one port. ``port`` 0 means: choose a free one."""

    def __init__(self, port: int, api_key: str | None = None) -> None:
        self.port = port or _free_port()
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # The environment may name a proxy; the server is here.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, child: Child, path: str, body: dict[str, Any] | None = None, *, seconds: float) -> tuple[int, str]:
        """Status and text of the answer; status 0 when there was none. Notices meanwhile what befalls the child.

        Raises Failed (a crash line) and Stopped (a signal) without waiting for the answer.
        """
        answers: list[tuple[int, str]] = []

        def exchange() -> None:
            answers.append(self._exchange(path, body, seconds))

        worker = threading.Thread(target=exchange, daemon=True)
        worker.start()
        child.wait(lambda: not worker.is_alive(), seconds + 5)
        worker.join(1.0 if child.ended else 0.1)
        return answers[0] if answers else (0, "")

    def _exchange(self, path: str, body: dict[str, Any] | None, seconds: float) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{HOST}:{self.port}{path}", data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return answer.status, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError) as error:
            return 0, str(error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
