"""An attachment over a connection that was an HTTP request before it was hijacked."""

from __future__ import annotations

import contextlib
import socket
from typing import Any


class Connection:
    """Keeps ``response``, because collecting it would close the connection."""

    def __init__(self, connection: socket.socket, response: Any) -> None:
        self._socket = connection
        self._response = response
        self._closed = False
        # Silence is no failure: a compiler may say nothing for many minutes.
        connection.settimeout(None)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self._socket.recv_into(buffer)
        except OSError:
            if self._closed:
                return 0
            raise

    def close(self) -> None:
        self._closed = True
        # Closing alone leaves a reader in another thread waiting, and the engine without its end-of-file.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, ValueError):
            self._response.close()
        self._socket.close()
