"""An engine behind ``ssh://``, as a unix socket of our own.

Every connection to the socket becomes one ``ssh HOST docker system dial-stdio`` with the connection as its stdin and
stdout, so the bytes never pass through this process. The system's ssh brings its configuration, agent and known hosts
along.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

from builder.errors import EngineLostError


class Tunnel:
    """Listens until closed. Raises EngineLostError where no ssh can be started for this address."""

    def __init__(self, url: str) -> None:
        self._command = [*_ssh(url), "docker", "system", "dial-stdio"]
        self._children: list[subprocess.Popen[bytes]] = []
        self._directory = Path(tempfile.mkdtemp(prefix="warm-cache-ssh-"))
        self._complaints = (self._directory / "stderr").open("ab")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self._directory / "docker.sock"
        self._listener.bind(str(path))
        self._listener.listen(16)
        self.url = f"unix://{path}"
        threading.Thread(target=self._serve, name="ssh-tunnel", daemon=True).start()

    def complaint(self) -> str:
        """The last thing ssh said, for a message that explains why the engine is lost."""
        with contextlib.suppress(OSError):
            lines = (self._directory / "stderr").read_text(errors="replace").strip().splitlines()
            return lines[-1][-300:] if lines else ""
        return ""

    def close(self) -> None:
        """Ends every connection, and removes the socket. May be called twice."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for child in self._children:
            child.kill()
            child.wait()
        self._children.clear()
        self._complaints.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, ValueError):
                # A session of its own: Ctrl-C in the terminal must reach this program, and not cut its connections.
                end = connection.fileno()
                child = subprocess.Popen(
                    self._command, stdin=end, stdout=end, stderr=self._complaints, start_new_session=True
                )
                self._children = [*(old for old in self._children if old.poll() is None), child]


def _ssh(url: str) -> list[str]:
    """The command that reaches this host, without questions that nobody would see."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or parts.hostname.startswith("-") or parts.path.strip("/"):
        raise EngineLostError(f"DOCKER_HOST {url!r} is not of the form ssh://[user@]host[:port]")
    if shutil.which("ssh") is None:
        raise EngineLostError(f"DOCKER_HOST is {url}, and there is no ssh here: install an OpenSSH client")
    command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30"]
    command += ["-l", parts.username] if parts.username else []
    command += ["-p", str(port)] if port else []
    return [*command, "--", parts.hostname]
