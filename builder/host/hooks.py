"""The operator's own commands around a run: ``[gpus] acquire`` takes this machine out of service, ``release`` puts it
back.

Every acquire gets its release, exactly once and whatever happens. What is owed is on disk before acquire starts,
beside the lease file, and goes when release has succeeded; a builder that was killed leaves it there, and the next
sweep, which proves by the lease that the owner is dead, does what is written. A command of a builder that was killed
is ended within seconds, so that an acquire does not go on beside its own release.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from builder import files, flock
from builder.engine.lease import DEBT
from builder.host.deadlines import Deadline

#: Lines of a hook's output that a failure shows again.
_TAIL = 20
#: Seconds between SIGTERM and SIGKILL for a hook that takes too long.
_GRACE = 2.0
#: Longer lines of a hook are cut into several.
_LINE = 8192

#: The line ($1) beside a guard of its process group, which gets a newline on stdin when the line has ended, and
#: end-of-file when the builder is dead: then the line is ended as the builder would have ended it.
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
    """Command lines, for /bin/sh. run_id: what they find in WARM_CACHE_RUN. timeout: seconds for each line."""

    lines: tuple[str, ...]
    run_id: str
    timeout: float
    directory: str = "/"


@dataclass(frozen=True)
class Failure:
    """What went wrong with one line, as a sentence, and what it said last."""

    text: str
    tail: tuple[str, ...]


def run(
    hooks: Hooks,
    environ: Mapping[str, str],
    show: Show,
    *,
    all_of_them: bool = False,
    hurried: Callable[[], bool] = lambda: False,
) -> Failure | None:
    """Runs the lines one after the other, and returns the first failure. The first failure is the end of it, unless
    ``all_of_them``. ``hurried`` ends a line before its time-out.
    """
    first = None
    for line in hooks.lines:
        failure = _run_line(line, hooks, environ, show, hurried)
        first = first or failure
        if failure is not None and not all_of_them:
            break
    return first


def _run_line(
    line: str, hooks: Hooks, environ: Mapping[str, str], show: Show, hurried: Callable[[], bool]
) -> Failure | None:
    show(f"$ {line}")
    tail: deque[str] = deque(maxlen=_TAIL)

    def said(text: str) -> None:
        tail.append(text)
        show(text)

    with contextlib.ExitStack() as held:
        # Only we have the end that writes, and the kernel closes it when we are no more.
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
                # A terminal's Ctrl-C is for the builder, which ends its hooks in order.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return Failure(f"{line!r} cannot be started: {error}", ())
        finally:
            os.close(reader)
        limit = Deadline(hooks.timeout)
        try:
            _follow(process, said, lambda: limit.over or hurried())
        finally:
            stopped = process.poll() is None
            if stopped:
                _end(process)
            if process.stdout is not None:
                process.stdout.close()
        with contextlib.suppress(OSError):
            os.write(writer, b"\n")
    if stopped:
        why = f"did not end within {hooks.timeout:.0f} s" if limit.over else "was interrupted"
        return Failure(f"{line!r} {why}", tuple(tail))
    if process.returncode:
        last = f": {tail[-1]}" if tail else ", and said nothing"
        return Failure(f"{line!r} ended with status {process.returncode}{last}", tuple(tail))
    return None


def _follow(process: subprocess.Popen[bytes], said: Show, enough: Callable[[], bool]) -> None:
    """Passes on what it says until it ends. What it leaves in the background may keep the pipe: that is no output of
    its own.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    rest, is_open = b"", True
    while not enough():
        over = process.poll() is not None
        ready = bool(poller.poll(0 if over else 50)) if is_open else False
        if ready:
            data = os.read(pipe, _LINE)
            if not data:
                is_open = False
                poller.unregister(pipe)
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) >= _LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                said(line.decode(errors="replace").rstrip("\r"))
        elif over:
            break
        elif not is_open:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
    if rest:
        said(rest.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            break
    # Whoever ignored the first signal in the group goes as well.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# --- what is owed ----------------------------------------------------------------------------------------------------


def owe(directory: Path, release: Hooks) -> None:
    """Writes down, in a lease's directory, what has to be done even if this process does not live to do it."""
    files.write_atomically(directory / DEBT, json.dumps(asdict(release)).encode("ascii"))


def settled(directory: Path) -> None:
    """Nothing is owed any more."""
    (directory / DEBT).unlink(missing_ok=True)


def settle(directory: Path, environ: Mapping[str, str], show: Show) -> Failure | None:
    """Does what the dead owner of this directory owes. Two who come at once do it once. Raises OSError."""
    with contextlib.ExitStack() as held:
        try:
            descriptor = flock.open_lock(directory / DEBT)
        except FileNotFoundError:
            return None
        held.callback(os.close, descriptor)
        if not flock.try_lock(descriptor):
            return Failure("another builder is at it", ())
        if not os.fstat(descriptor).st_nlink:
            return None
        release = _read(descriptor)
        failure = run(release, environ, show, all_of_them=True) if release else None
        if failure is None:
            settled(directory)
        return failure


def _read(descriptor: int) -> Hooks | None:
    """None for what nobody can do anything with."""
    with os.fdopen(os.dup(descriptor), encoding="utf-8", errors="replace") as file:
        try:
            data = json.load(file)
            release = Hooks(
                tuple(map(str, data["lines"])), str(data["run_id"]), float(data["timeout"]), str(data["directory"])
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return replace(release, timeout=max(0.0, release.timeout))
