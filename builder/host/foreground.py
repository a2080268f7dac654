"""Runs a command in the foreground: its streams, signals and exit status are those of this program."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from builder.errors import BuilderError
from builder.processes import shell_status

#: Signals that people and CI systems send to a process that they started.
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
)
#: A shell's exit statuses for a command that it cannot start.
CANNOT_RUN, NOT_FOUND = 126, 127

_SI_KERNEL = 0x80  # asm-generic/siginfo.h; the code of signals that a terminal sends
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)


class CommandError(BuilderError):
    """The command could not be started. exit_code is a shell's: 127 for a missing command, 126 otherwise."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(argv: Sequence[str], environ: Mapping[str, str], *, ignored: Collection[signal.Signals] = ()) -> int:
    """Run the command and return its exit status, 128 + N if signal N ended it. Raises CommandError.

    Only for the main thread; every other thread must have these signals blocked. They are blocked here before the
    command exists and received by sigtimedwait from then on, so that none is lost and none interrupts this function.
    The command starts with the signal mask and actions that this program was started with.

    ignored: signals that this program was started to ignore (nohup); the command ignores them as well.
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
        while (status := _poll(child)) is None:
            # The timeout covers a SIGCHLD that an earlier handler consumed.
            got = signal.sigtimedwait(watched, 1.0)
            if got is not None and got.si_signo != signal.SIGCHLD and not _reached(child, got):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, got.si_signo)
        while signal.sigtimedwait(watched, 0):
            pass  # signals that arrived too late for the command are not meant for this program either
    return status


@contextlib.contextmanager
def _blocked(watched: set[signal.Signals]) -> Iterator[tuple[set[signal.Signals], Collection[int]]]:
    """Block these signals; yields them and the previous mask."""
    child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, the kernel discards the exit status
    stop = signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # Ctrl-Z stops this program together with the command
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        yield watched, mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGTSTP, stop)
        signal.signal(signal.SIGCHLD, child)


def _poll(child: int) -> int | None:
    """Return the exit status in a shell's form; None while the command runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return shell_status(status) if pid else None


def _reached(child: int, got: Any) -> bool:
    """Return whether the command got this signal already, or has ended.

    Ctrl-C reaches the whole foreground group of the terminal; sending it again would look like a second Ctrl-C, which
    many programs take for an order to quit immediately.
    """
    with contextlib.suppress(ProcessLookupError):
        return bool(got.si_code == _SI_KERNEL) and os.getpgid(child) == os.getpgrp()
    return True
