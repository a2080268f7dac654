"""``python -m builder`` is ``warm-cache``: both begin here, where Ctrl-C is quiet from the first line on."""

from __future__ import annotations

import gc
import os
import sys

_INTERRUPTED = 130


def main() -> int:
    """Run one invocation; return its exit status, also for a SIGINT at any moment."""
    handled = False
    status = _INTERRUPTED
    before: set[object] = set()
    try:
        import signal  # inside the try: it imports other modules, and a SIGINT may arrive meanwhile

        # Background jobs of a script have SIGINT ignored, and keep it so.
        handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if handled:
            # Nothing is to be cleaned up yet, and an exception inside an import may be lost or printed.
            signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        import threading

        before = set(threading.enumerate())
        gc.disable()  # modules stay: to look for garbage among them while they are loaded takes a tenth of a check
        from builder.cli.main import main as run

        gc.freeze()
        gc.enable()
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = run()
        _flush()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the result is written; the interpreter only has to exit
    if before and not before.issuperset(threading.enumerate()):
        # A thread that waits for something outside may never end, and the interpreter would wait for locks that it
        # holds. Everything that has to be given back was given back before.
        os._exit(status)
    return status


def _flush() -> None:
    """Write what a help text left; a closed reader or a full disk shall not be a traceback at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
