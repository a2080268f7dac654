"""What Podman does in its own way behind Docker's API. docker/README.md has the whole list."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

from builder.errors import EngineRefusedError
from builder.spec import Attachment


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
