"""Failures of an engine in words: each becomes one sentence with what to do next.

Plain functions over statuses, texts and exceptions, so that every case can be tested without an engine.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from builder.errors import EngineLostError, EngineRefusedError, EngineTimeoutError, PreflightError

_SOURCE = re.compile(r"bind source path does not exist: (.+?)\s*$")


class NotFoundError(EngineRefusedError):
    """The engine has no such container, image, volume or path."""


class MissingSourceError(EngineRefusedError):
    """The engine's host does not have the source of a bind."""

    def __init__(self, message: str, source: str, *, status: int = 400) -> None:
        super().__init__(message, status=status)
        self.source = source


class NoGpuDriverError(EngineRefusedError):
    """The engine knows no driver for GPUs. It refuses at start, not at create."""


class GpuToolkitError(EngineRefusedError):
    """The container toolkit could not hand out the GPUs."""


class NoInitError(EngineRefusedError):
    """Podman's host lacks the init that every container gets."""


class UnfitImageError(EngineRefusedError):
    """The image's own settings or files keep every container of it from starting."""


class BetweenStatesError(EngineRefusedError):
    """Podman removes no container that is just ending: a retry may succeed."""


class RemovalInProgressError(EngineRefusedError):
    """Another client is removing the container at this moment."""


class LinkLoopError(EngineRefusedError):
    """The path leads through too many symbolic links."""


class UnsupportedVersionError(EngineRefusedError):
    """The engine speaks newer versions of its API than this client alone: this machine lacks a newer client."""

    exit_code = PreflightError.exit_code


#: An engine has no codes for these, only a text. They are recognised here and nowhere else.
_KINDS: tuple[tuple[str, type[EngineRefusedError]], ...] = (
    ("could not select device driver", NoGpuDriverError),  # … "" with capabilities: [[gpu]]
    ("nvidia-container-cli", GpuToolkitError),
    ("CDI device injection failed", GpuToolkitError),
    ("container-init binary not found", NoInitError),
    ("unable to find user", UnfitImageError),  # … nosuchuser: no matching entries in passwd file
    ("no matching entries in", UnfitImageError),
    ("Are you trying to mount a directory onto a file", UnfitImageError),
    ("not a directory", UnfitImageError),  # runc: what the mount is to lie on is a file
    ("container state improper", BetweenStatesError),
    ("is already in progress", RemovalInProgressError),  # removal of container … is already in progress
    ("too many links", LinkLoopError),
    ("is too old. Minimum supported API version", UnsupportedVersionError),
)


def refusal(action: str, status: int, explanation: str) -> EngineRefusedError:
    """Return the error for a request that the engine refused. action: begins the sentence, ``cannot start X``."""
    text = f"{action}: {explanation.strip().rstrip('.') or f'the engine answered with status {status}'}"
    missing = _SOURCE.search(explanation)
    if missing:
        remedy = f"The engine's host has no {missing[1]}: create it there, or correct the path"
        return MissingSourceError(f"{text}. {remedy}", missing[1], status=status)
    remedy = _remedy(explanation)
    known = NotFoundError if status == 404 else EngineRefusedError
    kind = next((each for phrase, each in _KINDS if phrase in explanation), known)
    return kind(f"{text}. {remedy}" if remedy else text, status=status)


#: Words of docker-py and of urllib for an address that is none.
_MALFORMED = ("bind address format", "bind address protocol", "Port could not be cast", "Port out of range")


def loss(action: str, error: BaseException, *, hint: str = "") -> EngineLostError:
    """Return the error for a request without an answer, or with one that broke off. hint: ssh's last error."""
    causes = list(_causes(error))
    if any(_is_timeout(cause) for cause in causes):
        return EngineTimeoutError(
            f"{action}: it accepted the request and gave no answer in time. Is it overloaded, or hanging? See its log."
        )
    number = next((cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno), None)
    text = hint or _words(number, causes)
    advice = {
        errno.ENOENT: "Start one (systemctl start docker), or set DOCKER_HOST to one that runs",
        errno.ECONNREFUSED: "Start it (systemctl start docker), or set DOCKER_HOST to one that runs",
        errno.EACCES: "Run as root or as a member of the group docker, or set DOCKER_HOST to an engine of yours",
    }
    remedy = advice.get(number or 0, "")
    if any(words in text for words in _MALFORMED) or number == errno.EINVAL:
        text, remedy = "that is no address", "An engine's address is unix:///PATH, tcp://HOST:PORT or ssh://HOST"
    return EngineLostError(f"{action}: {text.rstrip('.')}" + (f". {remedy}" if remedy else ""))


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may help: for a broken connection, not for a refusal or a timeout."""
    return isinstance(error, EngineLostError) and not isinstance(error, (EngineRefusedError, EngineTimeoutError))


def _remedy(explanation: str) -> str:
    if explanation.startswith("No such image"):
        return "It was removed meanwhile: run again"
    if "is too old. Minimum supported API version" in explanation:
        return "Install a newer docker-py: pip install --upgrade docker"
    if "could not select device driver" in explanation:
        return "The engine has no GPU driver: install nvidia-container-toolkit and restart dockerd"
    if "unresolvable CDI devices" in explanation or "CDI device injection failed" in explanation:
        return "Make the CDI specification anew: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    if "driver/library version mismatch" in explanation:
        return "The driver was updated while it was loaded: restart the machine, or load its modules anew"
    if "error setting rlimit" in explanation:
        return "The engine may not raise this limit: it needs CAP_SYS_RESOURCE"
    if "no space left on device" in explanation:
        return "The engine's disk is full: free space below its data root"
    if "invalid mount option" in explanation:
        return "Podman ends a path at a comma: use a path without one"
    if explanation.startswith(("network ", "container create: unable to find network")) and "not found" in explanation:
        return "Create it (docker network create), or set [container] network"
    return ""


def _words(number: int | None, causes: list[BaseException]) -> str:
    if number == errno.ENOENT:
        return "there is no such socket"
    if number == errno.ECONNREFUSED:
        return "nothing listens there"
    if number == errno.EACCES:
        return "permission denied"
    innermost = causes[-1]
    return str(innermost).strip() or type(innermost).__name__


def _is_timeout(error: BaseException) -> bool:
    """Return whether this is a timeout. Those of requests and urllib3 are known by name, so as not to import them."""
    return isinstance(error, TimeoutError) or type(error).__name__ in (
        "ReadTimeout",
        "ReadTimeoutError",
        "ConnectTimeout",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, including those that libraries pack into arguments instead of chaining them."""
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        item = todo.pop(0)
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        todo += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]
