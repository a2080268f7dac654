"""What Podman does differently behind Docker's API. docker/README.md has the whole list."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from builder.engine.api import Attachment, State
from builder.engine.errors import BetweenStatesError, NotFoundError
from builder.engine.log_resume import PIECE, stored_form
from builder.host.deadlines import Deadline, poll

Frames = Iterator[tuple[int, bytes]]

#: Intermediate states of Podman → the engine's state that they belong to.
STATES: Mapping[str, str] = {
    "configured": "created",
    "initialized": "created",
    "stopping": "running",
    "stopped": "exited",
}

#: Pause between two reads of a stored log: at least so many seconds, and this multiple of the last read's duration.
_PAUSE, _PAUSE_FACTOR = 1.0, 10.0


def is_podman(info: Mapping[str, Any]) -> bool:
    """Return whether this is Podman's description of itself."""
    return "BuildahVersion" in info


def is_between_states(error: BaseException) -> bool:
    """Return whether Podman refused to remove a container because it was just ending."""
    return isinstance(error, BetweenStatesError)


class OutputDrain:
    """An attachment to all streams of which only stdin is used; the output is read and dropped.

    A client that is attached to stdin alone blocks a container of Podman after about 300 kB of output: conmon sends the
    output to every client, and Podman does not read it on behalf of this one.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        buffer = memoryview(bytearray(1 << 16))
        with contextlib.suppress(OSError, ValueError):
            while self._attachment.readinto(buffer):
                pass

    def readinto(self, buffer: memoryview) -> int:
        """Return 0: the output is dropped."""
        return 0

    def close(self) -> None:
        self._attachment.close()


def stored_log(read: Callable[[], Frames], state: Callable[[], State] | None) -> Frames:
    """Yield the stored log in the entries of Docker's json-file.

    read: returns the log as it is now, from its beginning.
    state: returns the container's state, and the log is followed to the container's end; None: the log as it is now.
    """
    return as_json_file(read() if state is None else _followed(read, state))


def _followed(read: Callable[[], Frames], state: Callable[[], State]) -> Frames:
    """Yield the log as it grows, by reading it repeatedly.

    Podman's own follow loses most of a fast output, and does not even answer before the first line.
    """
    seen: dict[int, int] = {}
    while True:
        last, began = _is_finished(state), time.monotonic()
        at: dict[int, int] = {}
        for stream, data in read():
            start = at.get(stream, 0)
            at[stream] = start + len(data)
            if new := data[max(0, seen.get(stream, 0) - start) :]:
                yield stream, new
                seen[stream] = at[stream]
        if last:
            return
        poll(lambda: _is_finished(state), Deadline(max(_PAUSE, _PAUSE_FACTOR * (time.monotonic() - began))), every=0.2)


def _is_finished(state: Callable[[], State]) -> bool:
    try:
        return state().finished
    except NotFoundError:
        return True


def as_json_file(frames: Iterable[tuple[int, bytes]]) -> Frames:
    """Yield json-file's entries from Podman's, which have the original bytes in pieces of another size."""
    held: dict[int, bytes] = {}
    for stream, data in frames:
        rest = held.get(stream, b"") + data
        at = 0
        while end := rest.find(b"\n", at, at + PIECE) + 1 or (at + PIECE if len(rest) - at >= PIECE else 0):
            yield stream, stored_form(rest[at:end]).encode()
            at = end
        held[stream] = rest[at:]
    for stream, rest in held.items():
        if rest:
            yield stream, stored_form(rest).encode()
