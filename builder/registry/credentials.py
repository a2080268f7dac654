"""Credentials of a registry, from where ``docker login`` keeps them: config.json, or a program that it names.

docker-py finds and reads the file (``DOCKER_CONFIG``, else ``~/.docker/config.json``). The program
(``docker-credential-NAME get``) is started here, because docker-py waits for it without limit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder import files
from builder.errors import RegistryRefusedError
from builder.processes import end_group
from builder.text import printable, shortened

#: Seconds for a credential helper's answer: some of them ask a server, none may ask a person.
HELPER_TIMEOUT = 30.0
#: More bytes are no config.json, and no answer of a helper.
_LIMIT = 1 << 20
#: The user name of helpers for a secret that is a token (docker-py has the same).
_TOKEN_USER = "<token>"  # noqa: S105 - no password
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Credentials:
    """A user name with a password, or a token that is exchanged for others. No secret is in its repr."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may hold."""
        return tuple(filter(None, (self.password, self.identity_token)))


def find(host: str, *, timeout: float = HELPER_TIMEOUT) -> Credentials | None:
    """Return the credentials that this user has for a registry; None for none: anonymous.

    Raises RegistryRefusedError for a file or a helper that does not give what it should. timeout: of a helper, seconds.
    """
    import docker.auth
    import docker.utils.config

    found = docker.utils.config.find_config_file()
    if found is None:
        return None
    path = str(found)
    try:
        config = docker.auth.load_config(config_dict=_read(Path(path)))
        name = config.get_credential_store(host)
        if not isinstance(name, str | None):
            raise TypeError
    except RegistryRefusedError:
        raise
    except Exception:  # noqa: BLE001 - docker-py raises what the shape of the file makes it raise; its text may hold secrets
        raise RegistryRefusedError(
            f"{path} does not have the form that docker login writes (auths, credsStore, credHelpers): mend it, "
            f"or log in anew: docker login {host}"
        ) from None
    if name:
        server = docker.auth.INDEX_URL if host == docker.auth.INDEX_NAME else host
        if held := _ask_helper(name, server, path, timeout):
            return held
    entry = docker.auth.AuthConfig({"auths": dict(config.auths)}).resolve_authconfig(host)
    return _credentials(entry) if entry else None


def _read(path: Path) -> dict[str, Any]:
    """Return the object in config.json. Raises RegistryRefusedError."""
    try:
        found = files.read_json(os.path.realpath(path), _LIMIT)  # a mounted secret is a link
    except files.UnreadableError as error:
        raise RegistryRefusedError(f"{path} {error}: it holds the logins of registries") from None
    if not isinstance(found, dict):
        raise RegistryRefusedError(f"{path} is no JSON object, as docker login writes it")
    return found or {"auths": {}}  # docker-py would look for an older file


def _credentials(entry: dict[str, Any]) -> Credentials | None:
    """Return what an entry of docker-py holds; None for an empty one, which names a registry and no user."""
    lower = {str(name).lower(): value for name, value in entry.items() if isinstance(value, str)}
    found = Credentials(lower.get("username", ""), lower.get("password", ""), lower.get("identitytoken", ""))
    return found if found.secrets else None


def _ask_helper(name: str, server: str, path: str, timeout: float) -> Credentials | None:
    """Return what a credential helper has for a server; None where it has nothing. Raises RegistryRefusedError."""
    program = f"docker-credential-{name}"
    found = shutil.which(program) if _HELPER.fullmatch(name) else None
    if found is None:
        raise RegistryRefusedError(
            f"{path} names the credential helper {shortened(name, 60)!r}, and there is no program "
            f"{printable(shortened(program, 80))} on PATH: install it, or log in without it"
        )
    # In a new session: a helper that hangs may have started others, which keep its pipe open.
    process = subprocess.Popen(
        [found, "get"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process:
        try:
            output, _ = process.communicate(server.encode(), timeout)
        except BaseException as error:
            end_group(process, 0.5)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RegistryRefusedError(
                f"{program} gave no credentials for {server} within {timeout:.0f} s; try: echo {server} | {program} get"
            ) from None
    if process.returncode:
        # The reason is on stdout, and its text alone distinguishes "none" from a failure.
        said = printable(shortened(output[:400].decode("utf-8", "replace").strip(), 200))
        if "credentials not found" in said.lower():
            return None
        raise RegistryRefusedError(f"{program} failed for {server} (exit status {process.returncode}): {said}")
    try:
        answer = json.loads(output) if len(output) <= _LIMIT else None
    except (ValueError, RecursionError):
        answer = None
    user, secret = (answer.get("Username"), answer.get("Secret")) if isinstance(answer, dict) else (None, None)
    if not isinstance(user, str) or not isinstance(secret, str):
        raise RegistryRefusedError(f"{program} gave no Username and Secret for {server}")
    if not secret:
        return None
    return Credentials(identity_token=secret) if user == _TOKEN_USER else Credentials(user, secret)
