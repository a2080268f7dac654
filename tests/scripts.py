"""Small programs that a real container and the fake engine play alike: a list of steps, as the container's command."""

from __future__ import annotations

import base64
import json
from typing import Any

Step = tuple[str, Any]

#: On every container that tests make themselves, so that what one of them leaves behind can be found.
LABEL = "io.sglang.warm-cache.test"

#: Plays the steps inside a container. The fake engine plays them itself and never runs this.
PLAYER = """
import base64, json, os, signal, sys, threading, time
def write(fd, data):
    while data:
        data = data[os.write(fd, data):]
for name, value in json.loads(sys.argv[1]):
    if name in ("out", "err"):
        write(1 if name == "out" else 2, base64.b64decode(value))
    elif name == "on-term":
        signal.signal(signal.SIGTERM, signal.SIG_IGN if value is None else lambda *_, status=value: os._exit(status))
    elif name == "pause":
        threading.Event().wait(value)
    elif name == "hang":
        threading.Event().wait()
    elif name == "read":
        os.read(0, 1)
    elif name == "exit":
        os._exit(value)
"""


def out(data: bytes | str) -> Step:
    """Writes to stdout."""
    return "out", base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def err(data: bytes | str) -> Step:
    """Writes to stderr."""
    return "err", out(data)[1]


def on_term(status: int | None) -> Step:
    """From here on SIGTERM ends it with this status; None: it is ignored."""
    return "on-term", status


def pause(seconds: float) -> Step:
    """Lets time pass."""
    return "pause", seconds


HANG: Step = ("hang", None)
#: Waits for end-of-file on stdin.
READ: Step = ("read", None)


def leave(status: int) -> Step:
    """Ends with this status."""
    return "exit", status


def command(*steps: Step) -> list[str]:
    """The command of a container that plays these steps."""
    return ["python3", "-c", PLAYER, json.dumps(steps)]


def steps_of(argv: list[str]) -> list[Step] | None:
    """The steps in a command, or None for any other command."""
    if len(argv) == 4 and argv[2] == PLAYER:
        return [(name, value) for name, value in json.loads(argv[3])]
    return None
