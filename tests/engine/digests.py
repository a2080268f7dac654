"""A stub of Docker 29's image store in front of a real engine: there an image's id is the digest of its manifest.

What that engine was seen to answer is not here (none was met); what differs is known from its sources and issues
(docker/buildx #3952, moby #45458): the same image has another id, in every answer and every request, and the digests
of its layers stay. So ids are replaced on their way, both ways: the digest with its digits in reverse.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.engine.door import Door

_ID = re.compile(rb'"(?:Id|ImageID|Image|ID)":"sha256:([0-9a-f]{64})"')


class OtherStore(Door):
    """The engine, whose images have other ids here. refuse: a build whose base is an id fails at once."""

    def __init__(self, engine: str, path: Path) -> None:
        self._known: dict[bytes, bytes] = {}
        super().__init__(engine, path)

    def answered(self, data: bytes) -> bytes:
        """Return what the client gets of these bytes of the engine."""
        self._known |= {found[::-1]: found for found in _ID.findall(data)}
        for there, here in self._known.items():
            data = data.replace(here, there)
        return data

    def asks(self, data: bytes) -> bytes:
        """Return what the engine gets of these bytes of the client."""
        for there, here in self._known.items():
            data = data.replace(there, here)
        return data
