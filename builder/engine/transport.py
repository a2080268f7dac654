"""How an engine is reached: the first request on a unix socket, and a tunnel for ``ssh://``."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder import files
from builder.engine.podman import is_podman
from builder.errors import EngineLostError
from builder.host import temporary
from builder.text import printable

if TYPE_CHECKING:
    import subprocess

#: Bytes of the docker command's configuration that are read at most.
_CONFIG_LIMIT = 1 << 20
#: Bytes of an answer, and of it that are read at once.
_ANSWER_LIMIT, _CHUNK = 16 << 20, 64 << 10


class ForeignServerError(OSError):
    """What answers does not speak HTTP."""


class PlainRequest:
    """``GET`` on a unix socket without docker-py, whose import costs a tenth of a second, and http.client, whose
    import is a tenth of a check. Raises OSError if nothing listens.

    An engine takes 20 ms to describe itself (``/info``), because it starts its container runtime for that: what can be
    done meanwhile is done between construction and `answer`.

    timeout: seconds for the answer.
    """

    def __init__(self, path: str, timeout: float, target: str = "/info") -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            # In HTTP 1.0 the answer is one piece, which ends with the connection.
            self._socket.sendall(f"GET {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode("ascii"))
        except BaseException:
            self.close()
            raise

    def answer(self) -> tuple[str | None, Mapping[str, Any]]:
        """Return the engine's newest API version and its answer; None and an empty mapping if they are missing.

        Raises OSError, also if the server does not speak HTTP.
        """
        data = b""
        while len(data) <= _ANSWER_LIMIT and (more := self._socket.recv(_CHUNK)):
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        if not status.startswith("HTTP/1."):
            raise ForeignServerError(errno.EPROTO, "no answer of an engine")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        info = None
        if status.split()[1:2] == ["200"] and len(body) >= int(fields.get("content-length", "0") or 0):
            with contextlib.suppress(ValueError, RecursionError):
                info = json.loads(body)
        return fields.get("api-version"), info if isinstance(info, dict) else {}

    def close(self) -> None:
        self._socket.close()


def is_this_machine(info: Mapping[str, Any]) -> bool:
    """Return whether the engine of this description runs on our kernel, judged by host name and kernel release."""
    here = os.uname()
    return (info.get("Name"), info.get("KernelVersion")) == (here.nodename, here.release)


def identity_of(info: Mapping[str, Any]) -> str:
    """Return what distinguishes the engine of this description from others: its id, its host and its data directory.

    An id alone is shared by engines that began with the same /etc/docker/key.json: two on one machine, and machines
    that were copied. Podman makes up another id for each answer, so there it is none.
    """
    names = ("Name", "DockerRootDir") if is_podman(info) else ("ID", "Name", "DockerRootDir")
    return " ".join(str(info.get(name) or "") for name in names)


def parse_version(text: object) -> tuple[int, int] | None:
    """Return ``1.41`` as numbers; None for anything else."""
    parts = text.split(".") if isinstance(text, str) else []
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None


class Tunnel:
    """A unix socket that leads to an engine behind ``ssh://`` until closed. Raises EngineLostError if ssh is missing.

    Every connection to the socket becomes one ``ssh HOST docker system dial-stdio`` with the connection as its stdin
    and stdout, so the bytes never pass through this process. The system's ssh brings its configuration, agent and
    known hosts.
    """

    def __init__(self, url: str) -> None:
        self._command = [*_ssh(url), "docker", "system", "dial-stdio"]
        self._children: list[subprocess.Popen[bytes]] = []
        self._stack = contextlib.ExitStack()
        self._directory = self._stack.enter_context(temporary.directory("ssh"))
        self._stderr = (self._directory / "stderr").open("ab")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self._directory / "docker.sock"
        self._listener.bind(str(path))
        self._listener.listen(16)
        self.url = f"unix://{path}"
        threading.Thread(target=self._serve, name="ssh-tunnel", daemon=True).start()

    def last_error(self) -> str:
        """Return the last line that ssh printed on stderr, which explains why the engine is lost; empty if none."""
        with contextlib.suppress(OSError):
            lines = (self._directory / "stderr").read_text(errors="replace").strip().splitlines()
            return lines[-1][-300:] if lines else ""
        return ""

    def close(self) -> None:
        """End every connection and remove the socket. May be called twice."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for child in self._children:
            child.kill()
            child.wait()
        self._children.clear()
        self._stderr.close()
        self._stack.close()

    def _serve(self) -> None:
        import subprocess

        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, ValueError):
                end = connection.fileno()
                # In its own session: Ctrl-C in the terminal must not cut the connections of this program.
                child = subprocess.Popen(
                    self._command, stdin=end, stdout=end, stderr=self._stderr, start_new_session=True
                )
                self._children = [*(old for old in self._children if old.poll() is None), child]


def _ssh(url: str) -> list[str]:
    """Return the ssh command for this address; in batch mode, because its prompts could not be answered."""
    from urllib.parse import urlsplit  # only this needs it

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


def context_host(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the engine's address in the docker command's current context; None for the default one, or unknown.

    The context is that of DOCKER_CONTEXT, else ``currentContext`` in config.json; its folder is named by a digest.
    """
    folder = environ.get("DOCKER_CONFIG") or f"{environ.get('HOME', '')}/.docker"
    try:
        name = (
            environ.get("DOCKER_CONTEXT") or files.read_json(f"{folder}/config.json", _CONFIG_LIMIT)["currentContext"]
        )
        digest = hashlib.sha256(name.encode()).hexdigest()
        meta = files.read_json(f"{folder}/contexts/meta/{digest}/meta.json", _CONFIG_LIMIT)
        host = meta["Endpoints"]["docker"]["Host"]
    except (files.UnreadableError, KeyError, TypeError, AttributeError):
        return None
    return printable(host) if isinstance(host, str) else None
