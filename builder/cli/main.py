"""Run one verb: argv, environment and signals in, one exit status out. The only caller of print."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from builder.cache.reasons import by_cost, rank
from builder.cli import parser
from builder.cli.invocation import Invocation
from builder.cli.parser import CommandLine, CommandLineError
from builder.cli.signals import Signals
from builder.cli.verbs import VERBS
from builder.errors import (
    CANNOT_RUN,
    BuilderError,
    DefectError,
    Interrupted,
    PreflightError,
    ProblemsError,
    UsageError,
)
from builder.host import outside, stuck
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline, poll
from builder.manifest import policy
from builder.report import github
from builder.report.console import PATIENCE, Console, harmless
from builder.report.results import Report, Text
from builder.report.tables import TASK_COLUMNS, task_table
from builder.text import counted, displayed, printable, sentence

#: The message of Python's RuntimeError where no more threads may be started.
NO_THREAD = "can't start new thread"
#: Seconds after a signal for which a full stream without a reader is waited for; and without a signal, where nobody
#: sits at a terminal.
READING, READER = 1.0, 60.0
#: Seconds that a run has to end in order once one of its tasks is stuck in a file system, and that its outcome takes.
ORDERLY, LAST = 6.0, 5.0
#: Locations of problems for which there is something to see on this machine all the same.
DEMO = frozenset({"GPUs", "engine"})
#: Third-party packages: import name → name to install.
PACKAGES = {name: name for name in ("docker", "psutil", "requests", "rich", "tenacity")} | {"pynvml": "nvidia-ml-py"}
#: Errors of a machine that lacks something, wherever they are raised: no defect of this program.
SHORTAGES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
)


def main(argv: Sequence[str] | None = None, *, environ: Mapping[str, str] | None = None) -> int:
    """Run one verb, and return its exit status. Every BuilderError ends here as one message."""
    environ = dict(os.environ if environ is None else environ)
    argv = sys.argv[1:] if argv is None else argv
    try:
        line = parser.parse(argv, environ)
    except SystemExit as stop:  # argparse has printed a help text
        return int(stop.code or 0)
    except UsageError as error:
        return _Program(parser.unparsed(argv, environ), environ).finish(error)
    except Exception as raised:  # noqa: BLE001 - parsing loads the verb's module, and a machine may lack what that takes
        program = _Program(parser.unparsed(argv, environ), environ)
        return program.finish(program.unexpected(raised))
    assert line.verb is not None
    return _Program(line, environ).run(line.verb)


class _Program:
    """One run of one verb: streams, report, signals, and the mapping from errors to exit statuses."""

    def __init__(self, line: CommandLine, environ: Mapping[str, str]) -> None:
        self.line = line
        self.environ = environ
        self.started = time.monotonic()
        self.report = Report(line.verb, warnings=list(line.warnings))
        self.status = 0
        #: Set where a task is stuck in a file system. ending: held by the thread that reports the outcome.
        self.stuck: BuilderError | None = None
        self.ending = threading.Lock()
        self.watch = stuck.StuckWatch(self._end_stuck, stuck.PATIENCE)
        self.cancel = Cancel()
        self.signals = Signals(self.cancel)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # for terminals that are not UTF-8
        verb = VERBS[line.verb] if line.verb is not None else None
        owned = verb is not None and (verb.text or verb.needs == "command")  # stdout is for a result alone
        stream = _or_nowhere(sys.stderr if line.args.json or owned else sys.stdout)
        terminal = stream.isatty() and environ.get("TERM") not in ("dumb", "") and "NO_COLOR" not in environ
        self.console = Console(
            stream,
            terminal=terminal,
            github=environ.get("GITHUB_ACTIONS") == "true",
            width=shutil.get_terminal_size((80, 24)).columns,
            verbose=line.args.verbose,
            hurried=self._gave_up,
        )

    def run(self, verb: str) -> int:
        invocation = Invocation(
            verb, self.line.args, self.environ, self.console, self.report, self.cancel, self.signals
        )
        error: BuilderError | None = None
        self.watch.start()
        try:
            policy.current()  # one that cannot be trusted refuses every verb
            self.status = parser.module(verb).run(self.line.args, invocation) or 0
        except BuilderError as raised:
            error = raised
        except KeyboardInterrupt:
            error = Interrupted(signal.SIGINT)
        except Exception as raised:  # noqa: BLE001 - every failure ends as a sentence
            error = self.unexpected(raised)
        self.report.seconds = time.monotonic() - self.started
        if self.stuck is not None:
            error = self.stuck
        elif self.cancel.signum is not None and not isinstance(error, Interrupted):
            if error is not None:
                self.report.warnings.append(error.message)  # of several reasons the signal is the first
            error = Interrupted(self.cancel.signum)
        return self.finish(error, invocation.prune_logs)

    def unexpected(self, raised: Exception) -> BuilderError:
        """Return the error for an exception that is being handled, and write its traceback if asked for."""
        if self.line.args.verbose:
            import traceback  # nothing else needs it

            self.console.say(traceback.format_exc().rstrip())
        return _unexpected(raised)

    def finish(self, error: BuilderError | None, tidy: Callable[[], None] = lambda: None) -> int:
        """Report the outcome, and return the exit status. tidy: is called after that."""
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # the watch reports it, and ends the process
        try:
            status = self._finish(error)
            tidy()
        except KeyboardInterrupt:
            return Interrupted(signal.SIGINT).exit_code
        except Interrupted as stopped:
            return stopped.exit_code
        finally:
            self.signals.restore()
            self.watch.stop()
        return status

    def _end_stuck(self, used: str, signum: int | None, is_main: bool) -> None:
        """End the process: its main thread or one of its tasks is stuck in a file system. In the watch's thread.

        Containers that are left end by their leases.
        """
        place = f" (in use: {printable(used)})" if used else ""
        error: BuilderError = PreflightError(
            f"{CANNOT_RUN}: a file system has not answered for {stuck.PATIENCE:.0f} s{place}. Is its server gone? "
            "Mount it again, or name another directory"
        )
        if signum is not None:
            self.report.warnings.append(f"a file system does not answer{place}")
            error = Interrupted(signum)
        if not is_main:
            self.stuck = error
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            poll(self.ending.locked, Deadline(ORDERLY), every=0.1)
        if not self.ending.acquire(blocking=False):
            return  # the main thread ends after all
        self.report.seconds = time.monotonic() - self.started
        with contextlib.suppress(Exception):
            outside.call(lambda: self._finish(error), "the outcome", LAST)
        os._exit(error.exit_code)

    def _finish(self, error: BuilderError | None) -> int:
        status = error.exit_code if error else self.status
        report, console = self.report, self.console
        for warning in report.warnings:
            console.say(f"warning: {warning}")
        if changed := report.changed_sources:
            console.annotate("kernel sources changed", changed, "warning")
        if report.verb in ("warm", "check", "refresh") and report.tasks:
            self._report_tasks(error)
        unwritten = self._print_text() if report.text is not None and not self.line.args.json else []
        if error is not None:
            self._report_error(error)
        problems = github.write_files(report, status, error, self.environ, self._gave_up) if console.github else []
        for problem in problems:
            report.warnings.append(problem)
            console.say(f"warning: {problem}")
        # For `env` the file of outputs is a place of its result.
        unwritten += problems[:1] if report.verb == "env" else []
        if self.line.args.json:
            if report.text is not None:
                report.add(Text(str(report.verb), report.text))
            unwritten += self._print(report.document(status, error), "the JSON document")
        elif self._shows:
            unwritten += self._shown()
        if unwritten and status:
            console.say(f"warning: {unwritten[0]}")
        elif unwritten:
            # A result that is not delivered is no success, whatever it is.
            error = PreflightError(unwritten[0])
            status = error.exit_code
            self._report_error(error)
        console.close(self._patience)
        if self.signals.late and (console.stuck or unwritten):
            return Interrupted(self.signals.late).exit_code
        return status

    @property
    def _patience(self) -> float | None:
        """Seconds that the last output waits for a reader: without limit where a person is there, who can end it."""
        return None if any(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)) else READER

    def _gave_up(self) -> bool:
        return self.cancel.is_due(READING) or self.cancel.requests > 1 or bool(self.signals.late)

    def _print_text(self) -> list[str]:
        """Write the verb's text, ahead of what is wrong with it; return as `_print` does."""
        text = self.report.text or ""
        if self.report.verb not in ("view", "audit"):
            return self._print(text, "the result")  # for programs
        shown = displayed(text)  # names of jobs and files may hold commands
        return self._print(harmless(shown) if self.console.github else shown, "the result")

    def _print(self, text: str, what: str) -> list[str]:
        """Write a result to stdout; return why it could not be written. A reader that closed it is no failure."""
        self.console.flush(PATIENCE)
        if self.console.stuck and self.console.writes_to(sys.stdout):
            why = "nobody reads it"
        elif sys.stdout is None:
            why = "stdout is closed"
        else:
            out = Console(sys.stdout, terminal=False, hurried=self._gave_up)
            out.write(text)
            out.close(self._patience)
            why = _failure(out)
        return self._unwritten(what, why)

    @property
    def _shows(self) -> bool:
        """Return whether the result is what this verb says on stdout."""
        verb = self.line.verb
        return verb is not None and (VERBS[verb].shown or bool(getattr(self.line.args, "dry_run", False)))

    def _shown(self) -> list[str]:
        """Wait until all output is on stdout; return why it is not there, as `_print` does."""
        if sys.stdout is None:
            return self._unwritten("the result", "stdout is closed")
        self.console.flush(self._patience)
        return self._unwritten("the result", _failure(self.console))

    def _unwritten(self, what: str, why: str) -> list[str]:
        if not why:
            return []
        problem = f"{what} could not be written: {why}"
        self.report.warnings.append(problem)
        return [problem]

    def _report_tasks(self, error: BuilderError | None) -> None:
        report = self.report
        total = len(report.tasks)
        if error is None and all(task.state == "warm" and task.seconds is None for task in report.tasks):
            for text in dict.fromkeys(task.proven_by.sentence for task in report.tasks if task.proven_by):
                if text:
                    self.console.say(text)
            unproven = [task.label for task in report.tasks if task.proven == "nothing-claimed"]
            if unproven:
                self.console.say(f"{', '.join(unproven)}: nothing-claimed, so that nothing on disk is vouched for")
            claimed = by_cost({family for task in report.tasks for family in task.entries})
            more = f" Vouched for: {', '.join(claimed)}." if claimed else ""
            more += " Nothing to do." if report.verb == "warm" else ""
            self.console.say(
                f"warm-cache: {total} of {counted(total, 'task')} warm for toolchain {report.toolchain} "
                f"({report.image_ref}).{more}"
            )
            return
        if report.verb == "warm" and getattr(self.line.args, "dry_run", False):
            return  # the plan has them
        self.console.table(TASK_COLUMNS, task_table(report.tasks))
        for task in report.tasks:
            if task.log and task.state in ("failed", "partial", "skipped"):
                self.console.say(f"log of {task.label}: {task.log}")
        kinds = [
            f"{report.count(state)} {state}"
            for state in ("warmed", "warm", "cold", "partial", "skipped", "failed")
            if report.count(state)
        ]
        self.console.say(f"{', '.join(kinds)} in {report.seconds:.1f} s.")

    def _report_error(self, error: BuilderError) -> None:
        lines = [error.usage] if isinstance(error, CommandLineError) else []
        problems = error.problems if isinstance(error, ProblemsError) else ()
        if problems and error.message != str(problems[0]):
            lines.append(f"error: {error.message} ({counted(len(problems), 'problem')}):")
            width = max(len(problem.location) for problem in problems)
            lines += [
                _hanging(f"  {problem.location:<{width}}  ", sentence(f"{problem.text} {problem.remedy}"))
                for problem in problems
            ]
            if error.exit_code == PreflightError.exit_code and DEMO.intersection(each.location for each in problems):
                lines.append("To see the program work without GPUs (from a checkout): make demo.")
        else:
            lines.append("error: " + sentence(error.message))
        lines[-1] += f" Exit {error.exit_code}."
        if error.notes:
            lines.append("last line:" if len(error.notes) == 1 else "last lines:")
            lines += [f"  │ {note}" for note in error.notes]
        # Errors belong on stderr, which is the console's own stream with --json, for env and for hold.
        self.console.flush(PATIENCE)
        stream = self.console
        if not stream.writes_to(sys.stderr):
            stream = Console(_or_nowhere(sys.stderr), terminal=False, github=self.console.github, hurried=self._gave_up)
        stream.say("\n".join(lines))
        if stream is not self.console:
            stream.close(PATIENCE)
        github.annotate(self.console, self.report, error, rank, self.environ.get("GITHUB_WORKSPACE", ""))


def _hanging(head: str, text: str) -> str:
    """Return a head and the text beside it; on a terminal in lines of its width, which cut no word."""
    if sys.stderr is None or not sys.stderr.isatty():
        return head + text
    import textwrap  # only where something is wrong

    indent = min(len(head), 12)
    columns = max(indent + 20, shutil.get_terminal_size((80, 24)).columns)
    return textwrap.fill(
        text,
        columns,
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _failure(out: Console) -> str:
    """Return why a console's stream did not take all of it; "" where it did, or its reader closed it."""
    failed = out.error
    if isinstance(failed, BrokenPipeError) or (failed is None and not out.stuck):
        return ""
    return (failed.strerror or str(failed)) if isinstance(failed, OSError) else "nobody reads it"


def _or_nowhere(stream: TextIO | None) -> TextIO:
    """Return the stream, or one that discards everything where this process was started without it (``>&-``)."""
    return stream if stream is not None else Path(os.devnull).open("w", encoding="utf-8")


def _unexpected(raised: Exception) -> BuilderError:
    """Return the error for an exception that no module expected: a machine that lacks something, else a defect."""
    package = (getattr(raised, "name", None) or "").partition(".")[0]
    if isinstance(raised, ModuleNotFoundError) and package in PACKAGES:
        return PreflightError(
            f"the package {PACKAGES[package]} is not installed for {sys.executable}: pip install {PACKAGES[package]}. "
            "Inside a runner's container, where there is no engine, check, explain, env, warm and audit take --here."
        )
    if isinstance(raised, OSError) and raised.errno in SHORTAGES:
        place = f"{raised.filename}: " if raised.filename else ""
        return PreflightError(f"{CANNOT_RUN}: {place}{raised.strerror}")
    if isinstance(raised, RuntimeError) and str(raised) == NO_THREAD:
        return PreflightError(f"{CANNOT_RUN}: it has no room for one more thread (ulimit -u, pids.max)")
    return DefectError(
        f"a defect in warm-cache: {type(raised).__name__}: {raised}. Run again with -v for the traceback."
    )
