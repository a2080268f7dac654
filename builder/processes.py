"""Processes of this machine: adopt, list and end descendants; describe an exit status. Linux, by /proc and prctl."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> None:
    """Make orphans of our children our children, setsid or not, so that they can be found and ended."""
    import ctypes  # with `subprocess` a tenth of the modules of a check, which starts nothing

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int | None = None) -> set[int]:
    """Return every process below `root` (default: this one), zombies included, as /proc shows it now."""
    parents = _parents()
    found: set[int] = set()
    wanted = {os.getpid() if root is None else root}
    while wanted:
        wanted = {pid for pid, parent in parents.items() if parent in wanted} - found
        found |= wanted
    return found


def kill_descendants(
    *, seconds: float = 5.0, spare: Iterable[int] = (), leave: Iterable[int] = (), keep: Iterable[int] = ()
) -> bool:
    """Send SIGKILL to all descendants, repeatedly, until none lives. Return False if some do after `seconds`.

    spare: direct children that another thread reaps; they are killed, and not waited for here.
    leave: processes that are not killed, nor anything below them. keep: processes that are not killed themselves.
    """
    limit = time.monotonic() + seconds
    spared, left_alone, kept = set(spare), set(leave), set(keep)
    while True:
        for pid in (left := _descendants_except(left_alone) - kept):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left - spared:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        remaining = _descendants_except(left_alone) - kept
        alive = {pid for pid in remaining if _state(pid) not in ("Z", "X", "")}
        if not alive:
            return True
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)


def end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a child that leads its own process group: SIGTERM to the group, `grace` seconds later SIGKILL."""
    from subprocess import TimeoutExpired

    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(TimeoutExpired):
            process.wait(grace)
            break
    # Processes of the group that ignored SIGTERM outlive their leader.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def shell_status(status: int) -> int:
    """Return the exit status that a shell reports for a wait status: 128 + N for signal N."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def reap(spare: Iterable[int] = ()) -> None:
    """Collect the status of orphans that have ended, so that no zombies remain. Leaves `spare` to others."""
    me = os.getpid()
    for pid, parent in _parents().items():
        if parent == me and pid not in spare:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def describe_status(status: int | None) -> str:
    """Return an exit status in words."""
    if status is None:
        return "still running"
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (the kernel does that when memory runs out)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _descendants_except(kept: set[int]) -> set[int]:
    """Return all descendants but these and what is below them."""
    found = descendants() - kept
    for pid in kept:
        found -= descendants(pid)
    return found


def _parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                found[int(entry.name)] = int(fields[1])
    return found


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name (which may hold spaces and brackets)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii", "replace").split()
    except OSError:
        return []
