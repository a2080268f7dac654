"""``python -m builder`` is ``warm-cache``: both begin here, where Ctrl-C is quiet from the first line on."""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130


def main() -> int:
    """Run one invocation; return its exit status, also for a SIGINT at any moment."""
    handled = False
    try:
        import signal  # inside the try: it imports other modules, and a SIGINT may arrive meanwhile

        # Background jobs of a script have SIGINT ignored, and keep it so.
        handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if handled:
            # Nothing is to be cleaned up yet, and an exception inside an import may be lost or printed.
            signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        from builder.cli.main import main as run

        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = run()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the result is written; the interpreter only has to exit
    return status


if __name__ == "__main__":
    sys.exit(main())
