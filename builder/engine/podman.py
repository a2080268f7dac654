"""What Podman does in its own way behind Docker's API. docker/README.md has the whole list."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from builder.engine.api import Attachment, State
from builder.engine.errors import NotFoundError
from builder.engine.log_resume import PIECE, stored_form
from builder.errors import EngineRefusedError
from builder.host.deadlines import Deadline, poll

Frames = Iterator[tuple[int, bytes]]

#: Between two readings of a stored log: seconds, and how many times as long as the last one took.
_PAUSE, _SHARE = 1.0, 10.0


def is_podman(info: Mapping[str, Any]) -> bool:
    """Whether this is what a Podman says about itself."""
    return "BuildahVersion" in info


def is_between_states(error: BaseException) -> bool:
    """It refuses to remove a container at the very moment of its end."""
    return isinstance(error, EngineRefusedError) and "container state improper" in error.message


class Drained:
    """An attachment with all streams, of which only stdin is wanted.

    Podman's conmon hands the output to everybody who is attached, and blocks the container where one does not read it;
    for an attachment to stdin alone Podman does not.
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
        """Nothing is left for anybody else."""
        return 0

    def close(self) -> None:
        self._attachment.close()


def stored_log(read: Callable[[], Frames], state: Callable[[], State] | None) -> Frames:
    """The stored log as an engine would give it. read: the log as it is now, from its beginning. state: of its
    container, until whose end the log is followed; None for the log as it is now.
    """
    return as_json_file(read() if state is None else _followed(read, state))


def _followed(read: Callable[[], Frames], state: Callable[[], State]) -> Frames:
    """Read again and again: Podman's own follow loses most of what comes quickly, and gives no answer at all before
    there is something to say.
    """
    seen: dict[int, int] = {}
    while True:
        last, began = _is_over(state), time.monotonic()
        at: dict[int, int] = {}
        for stream, data in read():
            start = at.get(stream, 0)
            at[stream] = start + len(data)
            if new := data[max(0, seen.get(stream, 0) - start) :]:
                yield stream, new
                seen[stream] = at[stream]
        if last:
            return
        poll(lambda: _is_over(state), Deadline(max(_PAUSE, _SHARE * (time.monotonic() - began))), every=0.2)


def _is_over(state: Callable[[], State]) -> bool:
    try:
        return state().finished
    except NotFoundError:
        return True


def as_json_file(frames: Iterable[tuple[int, bytes]]) -> Frames:
    """Entries as json-file has them, made of Podman's, which are the very bytes in pieces of another size."""
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
