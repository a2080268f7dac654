"""The operator's commands around a run: ``[gpus] acquire`` takes this machine out of service, ``release`` puts it back.

Every acquire gets its release exactly once, whatever happens. The release is recorded on disk before acquire starts, in
the lease's directory, and the record is removed when release has succeeded. A builder that was killed leaves its record
behind, and the next sweep, which proves by the lease that the owner is dead, runs the release. A hook of a builder that
was killed is ended within seconds, so that an acquire never runs at the same time as its own release.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder import files, flock
from builder.host.deadlines import Deadline
from builder.processes import end_group

if TYPE_CHECKING:
    import subprocess

#: In a lease's directory: the release that its owner has recorded. The directory is kept until it has run.
PENDING_RELEASE = "release.json"

#: How many of the last lines of a hook's output a failure shows again.
_TAIL = 20
#: Seconds between SIGTERM and SIGKILL for a hook that takes too long.
_GRACE = 2.0
#: The same after a signal to the builder, which has 5 s for everything.
_HURRIED_GRACE = 0.5
#: A longer line of a hook's output is cut. Bytes.
_LONGEST_LINE = 8192

#: Runs the command line ($1) together with a guard in its process group. The guard reads a newline from stdin when the
#: command has ended, and end-of-file when the builder is dead: then it ends the group as the builder would have done.
_GUARDED = f"""
exec 3<&0 </dev/null
( {{ trap '' HUP INT TERM
    read -r _ <&3 && exit
    kill -TERM 0
    sleep {_GRACE}
    kill -KILL 0
  }} >/dev/null 2>&1 & )
exec 3<&-
exec /bin/sh -c "$1"
"""

Show = Callable[[str], None]


@dataclass(frozen=True)
class Hooks:
    """Command lines for /bin/sh.

    run_id: value of WARM_CACHE_RUN in their environment.
    timeout: seconds for each line.
    directory: their working directory; / if it is missing.
    """

    lines: tuple[str, ...]
    run_id: str
    timeout: float
    directory: str = "/"


@dataclass(frozen=True)
class HookFailure:
    """One command line that failed. tail: the last lines of its output."""

    text: str
    tail: tuple[str, ...]


def run(
    hooks: Hooks,
    environ: Mapping[str, str],
    show: Show,
    *,
    keep_going: bool = False,
    hurried: Callable[[], bool] = lambda: False,
) -> HookFailure | None:
    """Run the command lines one after the other; return the first failure.

    show: prints one line of output.
    keep_going: run the remaining lines after a failure.
    hurried: polled; once it returns true, the running line is ended before its timeout.
    """
    first = None
    for line in hooks.lines:
        failure = _run_line(line, hooks, environ, show, hurried)
        first = first or failure
        if failure is not None and not keep_going:
            break
    return first


def _run_line(
    line: str, hooks: Hooks, environ: Mapping[str, str], show: Show, hurried: Callable[[], bool]
) -> HookFailure | None:
    import subprocess  # most verbs run no hook

    show(f"$ {line}")
    tail: deque[str] = deque(maxlen=_TAIL)

    def emit(text: str) -> None:
        tail.append(text)
        show(text)

    with contextlib.ExitStack() as held:
        # Only this process has the writing end, so the kernel closes it when this process dies.
        reader, writer = os.pipe()
        held.callback(os.close, writer)
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDED, "sh", line],
                cwd=hooks.directory if os.access(hooks.directory, os.X_OK) else "/",
                env={**environ, "WARM_CACHE_RUN": hooks.run_id},
                stdin=reader,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C must reach the builder only, which ends its hooks in order.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return HookFailure(f"{line!r} cannot be started: {error}", ())
        finally:
            os.close(reader)
        limit = Deadline(hooks.timeout)
        try:
            _follow(process, emit, lambda: limit.expired or hurried())
        finally:
            stopped = process.poll() is None
            if stopped:
                end_group(process, _HURRIED_GRACE if hurried() else _GRACE)
            if process.stdout is not None:
                process.stdout.close()
        with contextlib.suppress(OSError):
            os.write(writer, b"\n")
    if stopped:
        why = f"did not end within {hooks.timeout:.0f} s" if limit.expired else "was interrupted"
        return HookFailure(f"{line!r} {why}", tuple(tail))
    if process.returncode:
        last = f": {tail[-1]}" if tail else ", without output"
        return HookFailure(f"{line!r} ended with status {process.returncode}{last}", tuple(tail))
    return None


def _follow(process: subprocess.Popen[bytes], emit: Show, stop: Callable[[], bool]) -> None:
    """Pass on the output until the process ends. A background process that keeps the pipe open is not waited for."""
    from subprocess import TimeoutExpired  # as above

    assert process.stdout is not None
    pipe = process.stdout.fileno()
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    rest, is_open = b"", True
    while not stop():
        ended = process.poll() is not None
        ready = bool(poller.poll(0 if ended else 50)) if is_open else False
        if ready:
            data = os.read(pipe, _LONGEST_LINE)
            if not data:
                is_open = False
                poller.unregister(pipe)
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) >= _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                emit(line.decode(errors="replace").rstrip("\r"))
        elif ended:
            break
        elif not is_open:
            with contextlib.suppress(TimeoutExpired):
                process.wait(0.05)
    if rest:
        emit(rest.decode(errors="replace"))


# --- the pending release ---------------------------------------------------------------------------------------------


def record_pending_release(directory: Path, release: Hooks) -> None:
    """Record in a lease's directory that this release must run even if this process dies. Raises OSError."""
    files.write_atomically(directory / PENDING_RELEASE, json.dumps(asdict(release)).encode())


def clear_pending_release(directory: Path) -> None:
    """Remove the record: the release has run."""
    (directory / PENDING_RELEASE).unlink(missing_ok=True)


def run_pending_release(directory: Path, environ: Mapping[str, str], show: Show) -> HookFailure | None:
    """Run the release that the dead owner of this lease directory recorded; return what failed. Raises OSError.

    A kernel lock on the record makes concurrent sweeps run it once.
    """
    with contextlib.ExitStack() as held:
        try:
            descriptor = flock.open_lock(directory / PENDING_RELEASE)
        except FileNotFoundError:
            return None
        held.callback(os.close, descriptor)
        if not flock.try_lock(descriptor):
            return HookFailure("another builder is running it", ())
        if not os.fstat(descriptor).st_nlink:
            return None
        release = _read(descriptor)
        failure = run(release, environ, show, keep_going=True) if release else None
        if failure is None:
            clear_pending_release(directory)
        return failure


def _read(descriptor: int) -> Hooks | None:
    """Return the recorded release; None for a record that is damaged."""
    with os.fdopen(os.dup(descriptor), encoding="utf-8", errors="replace") as file:
        try:
            data = json.load(file)
            release = Hooks(
                tuple(map(str, data["lines"])), str(data["run_id"]), float(data["timeout"]), str(data["directory"])
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return replace(release, timeout=max(0.0, release.timeout))
