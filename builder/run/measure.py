"""Writes the metrics of a verb to its file, once, however the verb ends; a failure to write is a warning."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from builder import __version__
from builder.errors import BuilderError, DefectError, Interrupted
from builder.host import outside
from builder.host.cancel import Cancel
from builder.report import metrics
from builder.report.metrics import Samples, Verb
from builder.report.results import Report
from builder.text import printable

#: Seconds that the file has to take them.
_TIMEOUT = 10.0


def exit_status(cancel: Cancel, error: BaseException | None) -> int:
    """Return the exit status that the command line will have."""
    if cancel.signum is not None:
        return Interrupted(cancel.signum).exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(signal.SIGINT).exit_code
    if isinstance(error, BuilderError):
        return error.exit_code
    return 0 if error is None else DefectError.exit_code


@contextlib.contextmanager
def measured(
    report: Report, cancel: Cancel, verb: Verb, path: Path | None, series: str, add: Callable[[Samples, int], None]
) -> Iterator[None]:
    """Write the metrics when the block ends, however it ends. path: None for no file.

    series: label ``manifest`` of all metrics. add: adds the verb's own, with the exit status.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        if path is not None:
            with cancel.shield():
                write(report, cancel, verb, path, series, lambda samples: add(samples, exit_status(cancel, error)))


def write(report: Report, cancel: Cancel, verb: Verb, path: Path, series: str, add: Callable[[Samples], None]) -> None:
    """Write a verb's metrics, and those of other verbs that the file has. add: adds the verb's own."""
    samples = Samples(verb, {"manifest": series, "cache": report.cache})

    def replace() -> None:
        samples.keep(metrics.before(path))
        samples.add("build_info", 1, version=__version__)
        add(samples)
        metrics.write(path, samples)

    try:
        outside.call(replace, "its file system", _TIMEOUT, give_up=cancel.left_too_late)
    except OSError as error:
        report.warnings.append(f"metrics could not be written to {printable(str(path))}: {error.strerror}")
    except outside.StuckError as error:
        report.warnings.append(f"metrics could not be written to {printable(str(path))}: {error}")


def since(samples: Samples, name: str, is_so: bool | None) -> None:
    """Add since when something is so: the time of before, or now; 0 where it is not so. None: nothing is known."""
    if is_so is not None:
        samples.add(name, (samples.before(name) or time.time()) if is_so else 0)
