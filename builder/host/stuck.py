"""Ends the program when one of its threads is stuck in a file system that does not answer.

A call on a hung file system (NFS without its server, a FUSE server that is stopped) cannot be interrupted from inside
the process: no signal handler runs, and no other thread can end it. Any path may be on one, and it may hang in the
middle of a walk, so no look at the beginning is enough. A daemon thread compares, twice a second, what the other
threads of this program are doing: one that has run nothing at all for a while, and whose innermost Python frame is in
a module that works with files, waits for a file system.

Our own waits are not in such modules, or wake up at least once a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from builder.beneath import Tree
from builder.host.deadlines import Deadline
from builder.host.outside import start_thread

#: Seconds for which one call may take no time of a processor: a busy disk answers within that.
PATIENCE = 20.0
#: Seconds after which a signal that no handler can receive ends the program.
SIGNAL_PATIENCE = 3.0
#: Seconds between two looks.
_EVERY = 0.5
#: Threads that are watched besides the main one, by how their names begin: those of tasks.
WATCHED = "task "

_HOME = f"{Path(__file__).resolve().parents[1]}{os.sep}"
#: Modules that wait for nothing but files, in this package and in Python's library.
_OURS = (
    "beneath.py", "files.py", "flock.py", "recording.py", "cache/", "run/", "manifest/", "engine/lease.py",
    "host/gpu_locks.py", "host/hooks.py",
)  # fmt: skip
#: But for this one: a manifest may be a pipe, which its reader waits for.
_PIPES = "manifest/load.py"
_LIBRARY = ("pathlib", "posixpath", "genericpath", "os", "shutil", "glob", "tempfile", "tarfile")
_LIBRARY_NAMES = frozenset(
    name for each in _LIBRARY for name in (f"<frozen {each}>", str(Path(os.__file__).with_name(f"{each}.py")))
) | {str(Path(os.__file__).with_name("pathlib") / name) for name in ("__init__.py", "_local.py", "_os.py")}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StuckWatch:
    """Watches the thread that makes it, and those of tasks, from `start` to `stop`.

    on_stuck: called once, in a thread of its own: what was used, in words, the signal that waits to be handled (None:
    there is none), and whether it is the main thread. It has to end the process.
    """

    def __init__(self, on_stuck: Callable[[str, int | None, bool], None], patience: float = PATIENCE) -> None:
        self._on_stuck = on_stuck
        self._patience = patience
        self._main = threading.current_thread()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. Where there is no room for one more thread, nothing is watched."""
        with contextlib.suppress(RuntimeError):
            self._thread = start_thread(self._run, "stuck-watch")

    def stop(self) -> None:
        """End, and wait for the end."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_EVERY)

    def _run(self) -> None:
        since: dict[int, tuple[object, Deadline, Deadline]] = {}
        while not self._stopped.wait(_EVERY):
            frames, seen = sys._current_frames(), {}  # noqa: SLF001 - documented, in spite of its name
            for thread in threading.enumerate():
                frame = frames.get(thread.ident or 0)
                if frame is None or not (thread is self._main or thread.name.startswith(WATCHED)):
                    continue
                if not _is_about_files(frame):
                    continue
                number = thread.native_id or 0
                state = (id(frame), frame.f_lasti, _switches(number))
                known = since.get(number)
                if known is None or known[0] != state:
                    known = (state, Deadline(self._patience), Deadline(SIGNAL_PATIENCE))
                seen[number] = known
                is_main = thread is self._main
                waiting = next(iter(signal.sigpending().intersection(_ENDING)), None) if is_main else None
                if known[1].expired or (waiting is not None and known[2].expired):
                    self._on_stuck(_used(frame), waiting, is_main)
                    return
            del frames
            since = seen


def _is_about_files(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    if name.startswith(_HOME):
        return name[len(_HOME) :].startswith(_OURS) and not name.endswith(_PIPES)
    return name in _LIBRARY_NAMES


def _switches(thread: int) -> tuple[str, ...]:
    """Return how often a thread was given a processor, in the kernel's words; these numbers grow whenever it runs."""
    try:
        status = Path(f"/proc/self/task/{thread}/status").read_text("ascii", "replace")
    except OSError:
        return ()
    return tuple(line for line in status.splitlines() if "_ctxt_switches:" in line)


def _used(frame: FrameType | None) -> str:
    """Return the path that is nearest to a call in the frames that lead to it; "" for none."""
    for each in _outwards(frame):
        for value in list(each.f_locals.values()):
            if isinstance(value, Tree):
                return str(value.path / str(each.f_locals.get("name", "")))
            if isinstance(value, (str, os.PathLike)) and str(value).startswith("/"):
                return str(value)
    return ""


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
