"""Names of images in registries: ``host[:port]/repository[:tag][@sha256:digest]``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from builder.errors import UsageError
from builder.text import printable, shortened

#: The registry of names without a host, as every Docker client has it, and the host that serves its API.
DOCKER_HUB, DOCKER_HUB_API = "docker.io", "registry-1.docker.io"

#: The grammar of https://github.com/distribution/reference, without its historical exceptions.
_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
_PORT = re.compile(r"[0-9]{1,5}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LONGEST = 255

EXPECTED = "host[:port]/repository[:tag][@sha256:…]"


@dataclass(frozen=True)
class Reference:
    """The name of an image. At least the host and the repository are there.

    host: with its port, as it was written; ``docker.io`` for a name without one.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"

    @property
    def name(self) -> str:
        """Host and repository, without tag and digest."""
        return f"{self.host}/{self.repository}"

    @property
    def api_host(self) -> str:
        """The host, with its port, that serves the API."""
        return DOCKER_HUB_API if self.host in (DOCKER_HUB, f"index.{DOCKER_HUB}") else self.host

    @property
    def is_loopback(self) -> bool:
        """Return whether the registry is on this machine: engines take plain http from there, and so does this."""
        return is_loopback(self.host)

    def with_tag(self, tag: str) -> Reference:
        """Return this repository with another tag and no digest. Raises UsageError for what is no tag."""
        if not is_tag(tag):
            raise UsageError(f"{shortened(tag, 140)!r} is no tag: {_tag_rule()}")
        return replace(self, tag=tag, digest=None)


def is_tag(text: str) -> bool:
    """Return whether a registry takes this as a tag."""
    return bool(_TAG.fullmatch(text))


def is_loopback(host: str) -> bool:
    """Return whether a host, with or without a port, is this machine's loopback."""
    name, _ = _split_port(host)
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def parse(text: str, location: str = "REF") -> Reference:
    """Return the reference that a text names. Raises UsageError with what is wrong, and the nearest right text.

    location: the argument or key that the text is from.
    """
    shown = printable(shortened(text, 300))
    if "@" in text.partition("/")[0] and not _looks_like_digest(text.partition("@")[2]):
        # The value may be a password, so it is not shown.
        raise UsageError(f"{location}: a reference holds no credentials; log in instead: docker login HOST")

    def refuse(why: str, near: str = "") -> UsageError:
        remedy = f"did you mean {near}?" if near else f"expected {EXPECTED}"
        return UsageError(f"{location} {shown}: {why}; {remedy}")

    scheme, found, rest = text.partition("://")
    if found:
        raise refuse(f"a reference has no {printable(scheme)}:// in front", printable(shortened(rest, 300)))
    if not text.strip():
        raise UsageError(f"{location}: which image? Expected {EXPECTED}")
    name, at, digest = text.partition("@")
    if at and not DIGEST.fullmatch(digest):
        lower = digest.lower()
        why = f"{shortened(digest, 80)!r} is no digest: sha256: and 64 hexadecimal digits are wanted"
        raise refuse(why, f"{printable(name)}@{lower}" if DIGEST.fullmatch(lower) else "")
    head, slash, path = name.partition("/")
    if not (slash and _is_host(head)):
        head, path = DOCKER_HUB, name
    path, colon, tag = path.partition(":")
    if colon and not is_tag(tag):
        raise refuse(f"{shortened(tag, 140)!r} is no tag: {_tag_rule()}")
    host, port = _split_port(head)
    if not (_HOST.fullmatch(host) or _is_address(host)) or (port and not _is_port(port)):
        raise refuse(f"{head!r} is no host with a port")
    if head == DOCKER_HUB and path and "/" not in path:
        path = f"library/{path}"
    if not path:
        raise refuse("the repository is missing")
    if len(head) + 1 + len(path) > _LONGEST:
        raise refuse(f"a name has at most {_LONGEST} characters")
    for part in path.split("/"):
        if not _PART.fullmatch(part):
            near = part.lower()
            better = text.replace(part, near, 1) if part and _PART.fullmatch(near) else ""
            rule = "lower case letters and digits, with single separators (. _ __ -) between them"
            raise refuse(f"{part!r} is no part of a repository's name, which has {rule}", better)
    return Reference(head, path, tag if colon else None, digest if at else None)


def _looks_like_digest(text: str) -> bool:
    """Return whether this begins as a digest does: of a name without a host it follows before any slash."""
    return bool(re.match(r"[A-Za-z0-9]+:[0-9A-Fa-f]{32,}$", text))


def _is_host(head: str) -> bool:
    """Return whether the part before the first slash is a host, as Docker's clients decide it."""
    return "." in head or ":" in head or head.lower() == "localhost" or head != head.lower()


def _split_port(host: str) -> tuple[str, str]:
    if host.startswith("["):
        name, _, port = host.partition("]")
        return f"{name}]", port.removeprefix(":")
    name, _, port = host.partition(":")
    return name, port


def _is_address(host: str) -> bool:
    """Return whether this is an IPv6 address in brackets."""
    if not (host.startswith("[") and host.endswith("]")):
        return False
    try:
        return ipaddress.ip_address(host[1:-1]).version == 6
    except ValueError:
        return False


def _is_port(text: str) -> bool:
    return bool(_PORT.fullmatch(text)) and 0 < int(text) < 65536


def _tag_rule() -> str:
    return "at most 128 letters, digits, dots, dashes and underscores, the first no dot or dash"
