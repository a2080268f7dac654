"""Every failure of an engine becomes one sentence with what to do."""

from __future__ import annotations

import errno
import os

import pytest

from builder.engine.errors import MissingSourceError, NotFoundError, RemovalInProgressError, is_transient, loss, refusal
from builder.errors import EngineLostError, EngineRefusedError, EngineTimeoutError


@pytest.mark.parametrize(
    ("explanation", "told"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "install nvidia-container-toolkit"),
        (
            'invalid mount config for type "bind": bind source path does not exist: /data/x y',
            "has no /data/x y: create it",
        ),
        ("error setting rlimit type 8: operation not permitted", "CAP_SYS_RESOURCE"),
        ("write /var/lib/docker/x: no space left on device", "free space"),
        ("network nowhere not found", "docker network create"),
    ],
)
def test_refusal_keeps_engine_message_and_adds_remedy(explanation: str, told: str) -> None:
    error = refusal("cannot start it", 500, explanation)
    assert error.message.startswith(f"cannot start it: {explanation}")
    assert told in error.message
    assert (error.status, error.exit_code) == (500, 16)


def test_refusal_without_message_names_status() -> None:
    assert refusal("cannot start it", 503, "").message == "cannot start it: the engine answered with status 503"


def test_refusal_404_is_not_found() -> None:
    assert isinstance(refusal("x", 404, "No such container: y"), NotFoundError)
    assert not isinstance(refusal("cannot remove is already in progress", 409, "Conflict"), RemovalInProgressError)
    assert not isinstance(refusal("x", 409, "Conflict"), NotFoundError)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOENT, "systemctl start docker"),
        (errno.ECONNREFUSED, "nothing listens there"),
        (errno.EACCES, "group docker"),
        (errno.ENETUNREACH, "Network is unreachable"),
    ],
)
def test_loss_names_innermost_cause(number: int, told: str) -> None:
    packed = Exception("Connection aborted.", OSError(number, os.strerror(number)))
    assert told in loss("cannot reach it", packed).message


def test_transient_errors_are_broken_connections_only() -> None:
    assert is_transient(EngineLostError("x"))
    for error in (EngineRefusedError("x"), NotFoundError("x"), EngineTimeoutError("x"), OSError("x")):
        assert not is_transient(error)


def test_refusal_of_missing_bind_carries_its_source() -> None:
    error = refusal("cannot create it", 400, "invalid mount config: bind source path does not exist: /data/x y")
    assert isinstance(error, MissingSourceError)
    assert error.source == "/data/x y"
