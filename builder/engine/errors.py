"""What an engine's failures mean to people: each becomes one sentence that says what to do next.

Plain functions over statuses, words and exceptions, so that every case can be shown without an engine.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from builder.errors import EngineLostError, EngineRefusedError, EngineTimeoutError

_SOURCE = re.compile(r"bind source path does not exist: (.+?)\s*$")


class NotFoundError(EngineRefusedError):
    """The engine knows no such container, image, volume or path."""


def refusal(doing: str, status: int, explanation: str) -> EngineRefusedError:
    """The engine answered, and said no. ``doing`` begins the sentence: what could not be done."""
    text = f"{doing}: {explanation.strip().rstrip('.') or f'the engine answered with status {status}'}"
    remedy = _remedy(explanation)
    kind = NotFoundError if status == 404 else EngineRefusedError
    return kind(f"{text}. {remedy}" if remedy else text, status=status)


def loss(doing: str, error: BaseException, *, hint: str = "") -> EngineLostError:
    """The engine gave no answer, or the answer broke off. ``hint`` is what else is known, e.g. what ssh said."""
    causes = list(_causes(error))
    if any(_is_timeout(cause) for cause in causes):
        return EngineTimeoutError(
            f"{doing}: it took the question and gave no answer in time. Is it overloaded, or hanging? See its log."
        )
    number = next((cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno), None)
    what = hint or _words(number, causes)
    advice = {
        errno.ENOENT: "Start one (systemctl start docker), or set DOCKER_HOST to one that runs",
        errno.ECONNREFUSED: "Start it (systemctl start docker), or set DOCKER_HOST to one that runs",
        errno.EACCES: "Run as root or as a member of the group docker, or set DOCKER_HOST to an engine of yours",
    }
    said = advice.get(number or 0, "")
    if "bind address format" in what:  # docker-py's words for an address that is none
        said = "An engine's address is unix:///PATH, tcp://HOST:PORT or ssh://HOST"
    return EngineLostError(f"{doing}: {what.rstrip('.')}" + (f". {said}" if said else ""))


def is_transient(error: BaseException) -> bool:
    """Worth asking again: a connection that broke, not a refusal, and not an engine that has had its time."""
    return isinstance(error, EngineLostError) and not isinstance(error, (EngineRefusedError, EngineTimeoutError))


def _remedy(explanation: str) -> str:
    missing = _SOURCE.search(explanation)
    if missing:
        return f"The engine's host has no {missing[1]}: create it there, or correct the path"
    if explanation.startswith("No such image"):
        return "Somebody removed it meanwhile: run again"
    if "could not select device driver" in explanation:
        return "The engine has no GPU driver: install nvidia-container-toolkit and restart dockerd"
    if "error setting rlimit" in explanation:
        return "The engine may not raise this limit: it needs CAP_SYS_RESOURCE"
    if "no space left on device" in explanation:
        return "The engine's disk is full: free space below its data root"
    if "invalid mount option" in explanation:
        return "Podman takes a comma in a path for the end of it: use a path without one"
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
    """docker-py's callers see three kinds of it: TimeoutError, requests' ReadTimeout, and a ConnectionError that only
    says so.
    """
    return isinstance(error, TimeoutError) or type(error).__name__ in (
        "ReadTimeout",
        "ReadTimeoutError",
        "ConnectTimeout",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what lies below it, also where a library packs exceptions into arguments instead of chaining
    them.
    """
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        item = todo.pop(0)
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        todo += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]
