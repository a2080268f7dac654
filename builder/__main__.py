"""``python -m builder`` is ``warm-cache``: both begin here, where Ctrl-C is quiet from the first line on."""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130


def main() -> int:
    """The exit status of one invocation, whenever a SIGINT comes."""
    heard = False
    try:
        import signal  # it loads others, and a SIGINT meanwhile is caught here already

        # Not so in the background of a script, which has it ignored.
        heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if heard:
            # Nothing is owed to anybody yet, and an exception in the middle of an import may be lost or shown.
            signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        from builder.cli.main import main as run

        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = run()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said; what is left takes moments
    return status


if __name__ == "__main__":
    sys.exit(main())
