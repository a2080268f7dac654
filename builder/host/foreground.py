"""Somebody else's command, run as if this program were not there: streams, signals and exit status pass through."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from builder.errors import BuilderError

#: What people and CI systems send to a process that they started.
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
)
#: As a shell says it.
CANNOT_RUN, NOT_FOUND = 126, 127

_SI_KERNEL = 0x80  # asm-generic/siginfo.h; a terminal's signals have it
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)


class CommandError(BuilderError):
    """The command could not be started. exit_code is a shell's: 127 for one that is not there, 126 for another
    reason.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(argv: Sequence[str], environ: Mapping[str, str], *, ignored: Collection[signal.Signals] = ()) -> int:
    """Runs the command and returns its exit status, 128 + N when signal N ended it. For the main thread; every other
    thread has its signals blocked.

    ignored: signals that whoever started this program wanted ignored (nohup), and that the command ignores as well.
    Raises CommandError. Signals are blocked before the command exists and waited for from then on, so that none is
    lost and none interrupts anything here; the command starts with the mask and the actions that this program had.
    """
    with _blocked({*FORWARDED, signal.SIGCHLD} - set(ignored)) as (watched, mask):
        for signum in ignored:
            signal.signal(signum, signal.SIG_IGN)
        defaults = [number for number in (*_PYTHON_IGNORES, signal.SIGTSTP) if number not in ignored]
        try:
            child = os.posix_spawnp(argv[0], list(argv), dict(environ), setsigmask=mask, setsigdef=defaults)
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise CommandError(f"cannot run {argv[0]}: {reason}", NOT_FOUND if missing else CANNOT_RUN) from None
        while (status := _ended(child)) is None:
            # The second is for a SIGCHLD that somebody's handler took.
            got = signal.sigtimedwait(watched, 1.0)
            if got is not None and got.si_signo != signal.SIGCHLD and not _has_it_already(child, got):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, got.si_signo)
        while signal.sigtimedwait(watched, 0):
            pass  # what came too late for the command is not for this program either
    return status


@contextlib.contextmanager
def _blocked(watched: set[signal.Signals]) -> Iterator[tuple[set[signal.Signals], Collection[int]]]:
    """These signals wait to be asked for; with them, the mask that was there before."""
    child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, the kernel would take the status away
    stop = signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # Ctrl-Z stops the command, and so this program with it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        yield watched, mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGTSTP, stop)
        signal.signal(signal.SIGCHLD, child)


def _ended(child: int) -> int | None:
    """The exit status, as a shell tells it; None while the command runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if not pid:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _has_it_already(child: int, got: Any) -> bool:
    """Ctrl-C reaches every process of the terminal's foreground group, and a second one means: at once."""
    with contextlib.suppress(ProcessLookupError):
        return bool(got.si_code == _SI_KERNEL) and os.getpgid(child) == os.getpgrp()
    return True
