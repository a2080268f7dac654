"""argv, environment and signals in; one exit status out. The only module that reads the first three, and the only one
that prints.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from builder.cli import parser
from builder.cli.options import VERBS
from builder.cli.parser import CommandLineError
from builder.engine.client import Engine
from builder.errors import (
    BuilderError,
    DefectError,
    EngineLostError,
    EngineTimeoutError,
    Interrupted,
    PreflightError,
    Problem,
    ProblemsError,
    UsageError,
)
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.manifest.load import CacheSpec, Manifest, Overrides, cache_of, load, profiles, select
from builder.report import github
from builder.report.console import Console, harmless
from builder.report.results import Report
from builder.report.tables import TASK_COLUMNS, task_table
from builder.run import preflight
from builder.run.call import Call
from builder.run.container_executor import ContainerExecutor
from builder.run.context import Context, Options
from builder.text import counted, printable, sentence

#: What Python says where there may be no more of them.
NO_THREAD = "can't start new thread"
#: Of a run's log directory below the default place: when it began, and which run it was.
LOG_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
#: Seconds at the end of a run in which a signal finds nothing to end any more.
TELLING = 2.0
#: Seconds after a signal for which a stream that nobody reads is waited for.
READING = 1.0
#: So many of these stay.
LOGS_KEPT = 50
#: What this program needs beside the standard library, import name → name to install.
PACKAGES = {name: name for name in ("docker", "psutil", "requests", "rich", "tenacity")} | {"pynvml": "nvidia-ml-py"}
#: What a machine can be short of, wherever that shows: no defect in here.
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
    """Runs one verb and returns its exit status. Everything raised on purpose ends here as one sentence."""
    environ = dict(os.environ if environ is None else environ)
    argv = sys.argv[1:] if argv is None else argv
    try:
        said = parser.parse(argv, environ)
    except SystemExit as stop:  # argparse has printed a help text
        _silence_broken_stdout()
        return int(stop.code or 0)
    except UsageError as error:
        return _Invocation(parser.unparsed(argv, environ), environ).conclude(error)
    return _Invocation(said, environ).run()


class _Invocation:
    """One run of one verb: streams, report, signals, and the mapping from errors to exit status."""

    def __init__(self, said: Namespace, environ: Mapping[str, str]) -> None:
        self.said = said
        self.environ = environ
        self.started = time.monotonic()
        self.report = Report(said.verb, warnings=list(getattr(said, "misspelt", ())))
        self.status = 0
        self.cancel = Cancel()
        self.signals = _Signals(self.cancel)
        self.run_id = os.urandom(6).hex()
        self.logs: Path | None = None  # in the default place
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal of the last century still sees the rest
        verb = VERBS.get(said.verb)
        owned = verb is not None and (verb.text or verb.needs == "command")  # stdout is somebody else's
        stream = _or_nowhere(sys.stderr if said.json or owned else sys.stdout)
        terminal = stream.isatty() and environ.get("TERM") not in ("dumb", "") and "NO_COLOR" not in environ
        self.console = Console(
            stream,
            terminal=terminal,
            github=environ.get("GITHUB_ACTIONS") == "true",
            width=shutil.get_terminal_size((80, 24)).columns,
            verbose=said.verbose,
            hurried=lambda: self.cancel.is_due(READING),
        )

    def run(self) -> int:
        error: BuilderError | None = None
        try:
            self._verb()
        except BuilderError as raised:
            error = raised
        except KeyboardInterrupt:
            error = Interrupted(signal.SIGINT)
        except Exception as raised:  # noqa: BLE001 - it ends in a sentence, whatever it is
            if self.said.verbose:
                self.console.say(traceback.format_exc().rstrip())
            error = _unexpected(raised)
        self.report.seconds = time.monotonic() - self.started
        if error is not None and self.cancel.signum is not None and not isinstance(error, Interrupted):
            self.report.warnings.append(error.message)  # of several reasons the signal is the first
            error = Interrupted(self.cancel.signum)
        return self.conclude(error)

    def _verb(self) -> None:
        """Each verb loads what it needs: a check has ended before all the others would be there."""
        verb = VERBS[self.said.verb]
        if getattr(self.said, "here", False):
            status = _function(verb.here)(self._call())
        elif verb.needs != "engine":
            status = _function(verb.act)(self._call())
        else:
            manifest = self._manifest()
            with self.signals.heard(), self._open(manifest) as executor:
                status = _function(verb.act)(executor, self.said)
        self.status = status or 0

    @contextlib.contextmanager
    def _open(self, manifest: Manifest, timeout: float = 60.0) -> Iterator[ContainerExecutor]:
        """An engine that answers within so many seconds, and the executor with it."""
        options = Options(
            log_dir=self._log_dir(),
            state_dir=self._state_dir(),
            environ=self.environ,
            pull=getattr(self.said, "pull", False),
            force=getattr(self.said, "force", False),
            strict=getattr(self.said, "strict", False),
            allow_busy=getattr(self.said, "allow_busy", False),
            creates=VERBS[self.said.verb].creates,
        )
        engine = Engine(self.environ.get("DOCKER_HOST") or None, timeout)
        with contextlib.closing(engine):
            try:
                engine.connect()
            except EngineTimeoutError:
                raise
            except EngineLostError as error:
                raise preflight.without_engine(manifest, engine.url, error) from error
            # All that is loaded by now stays to the end. Not looking through it, at every collection and once more at
            # exit, saves a tenth of a check.
            gc.freeze()
            context = Context(
                manifest=manifest,
                options=options,
                console=self.console,
                report=self.report,
                cancel=self.cancel,
                budget=Deadline(manifest.run.budget),
                run_id=self.run_id,
            )
            with ContainerExecutor(context, engine) as executor:
                yield executor

    def _call(self) -> Call:
        return Call(
            said=self.said,
            environ=self.environ,
            report=self.report,
            console=self.console,
            cancel=self.cancel,
            manifest=self._manifest,
            cache=self._cache,
            connect=self._open,
            signals=self.signals.heard,
        )

    def _manifest(self) -> Manifest:
        said = self.said
        if not said.manifest and not said.profile:
            raise UsageError(f"which manifest? Pass --manifest FILE or --profile NAME ({', '.join(profiles())})")
        if said.manifest and said.profile:
            ways = [f"{parser.place(said, way)} {getattr(said, way)}" for way in ("manifest", "profile")]
            raise UsageError(f"{' and '.join(ways)} exclude each other")
        overrides = Overrides(
            image=said.image,
            cache=said.cache,
            models=said.models,
            **{name: getattr(said, name, None) for name in ("budget", "timeout", "silence", "lock_timeout")},
        )
        with self._blaming():
            manifest = load(said.manifest, profile=said.profile, overrides=overrides)
            self.report.image_ref, cache = manifest.image.ref, manifest.cache
            self.report.cache = str(cache.root) if cache.root else f"volume {cache.volume}"
            return select(manifest, getattr(said, "only", None) or ())

    def _cache(self) -> CacheSpec:
        with self._blaming():
            return cache_of(self.said.cache)

    @contextlib.contextmanager
    def _blaming(self) -> Iterator[None]:
        """A problem of an option's value is put where the value was said, and is no problem of the manifest."""
        places = {f"--{option}": parser.place(self.said, option) for option in VERBS[self.said.verb].options}
        if "--manifest" in places:
            path = printable(self.said.manifest or "")
            places[path] = f"{places['--manifest']} {path}"
        try:
            yield
        except UsageError as error:
            if not error.problems:
                raise
            problems = [
                Problem(places.get(each.location, each.location), each.text, each.remedy) for each in error.problems
            ]
            message = error.message
            if all(each.location in places for each in error.problems):
                message = str(problems[0]) if len(problems) == 1 else "options cannot be used as they are"
            raise UsageError(message, problems) from None

    def _log_dir(self) -> Path:
        chosen = getattr(self.said, "log_dir", None)
        if chosen:
            return _absolute(chosen, parser.place(self.said, "log-dir"))
        self.logs = self._state_home() / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.run_id[:6]}"
        return self.logs

    def _prune_logs(self) -> None:
        """A run that left logs in the default place leaves only the newest runs' logs there."""
        if self.logs is None or not self.logs.is_dir():
            return
        with contextlib.suppress(OSError):
            runs = sorted(path for path in self.logs.parent.iterdir() if LOG_NAME.fullmatch(path.name))
            for path in runs[:-LOGS_KEPT]:
                shutil.rmtree(path, ignore_errors=True)  # never through a link

    def _state_home(self) -> Path:
        """Where logs go by default. A cron job may have no HOME: then the temporary directory has to do."""
        base = self.environ.get("XDG_STATE_HOME", "")
        if not base.startswith("/"):
            base = ""
            with contextlib.suppress(RuntimeError):
                base = str(Path.home() / ".local" / "state")
        return Path(base or tempfile.gettempdir()) / "warm-cache"

    def _state_dir(self) -> Path:
        return _absolute(self.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir(), "XDG_RUNTIME_DIR")

    # --- the end
    # ---------------------------------------------------------------------------------------------------------

    def conclude(self, error: BuilderError | None) -> int:
        """Says what there is to say at the end, and returns the exit status."""
        try:
            status = self._conclude(error)
            self._prune_logs()
        except KeyboardInterrupt:
            return Interrupted(signal.SIGINT).exit_code
        except Interrupted as stopped:
            return stopped.exit_code
        finally:
            self.signals.restore()
        if self.console.stuck:
            # All is done, and said as far as anybody listens. What still waits for that stream would wait for ever, and
            # the interpreter for it.
            os._exit(status)
        return status

    def _conclude(self, error: BuilderError | None) -> int:
        status = error.exit_code if error else self.status
        report, console = self.report, self.console
        for warning in report.warnings:
            console.say(f"warning: {warning}")
        if report.verb in ("warm", "check", "refresh") and report.tasks:
            self._tasks(error)
        if error is not None:
            self._complain(error)
        told = github.write_files(report, status, error, self.environ) if console.github else []
        for problem in told:
            report.warnings.append(problem)
            console.say(f"warning: {problem}")
        if self.said.json and report.text is not None:
            report.extra[str(report.verb)] = report.text
        elif report.text is not None:
            # What `env` prints is for programs; these are for people, and job names and files in them are anybody's.
            guarded = self.console.github and report.verb in ("view", "audit")
            self._print(harmless(report.text) if guarded else report.text, "what was asked for")
        if self.said.json:
            self._print(report.document(status, error), "the JSON document")
        _silence_broken_stdout()
        return status

    def _print(self, text: str, what: str) -> None:
        """On stdout; a reader that went away misses nothing."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            pass
        except UnicodeEncodeError:  # what stdout's encoding does not have is no reason to say nothing
            print(text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding), flush=True)
        except OSError as failed:
            self.report.warnings.append(f"{what} could not be written: {failed.strerror}")
            self.console.say(f"warning: {self.report.warnings[-1]}")

    def _tasks(self, error: BuilderError | None) -> None:
        report = self.report
        total = len(report.tasks)
        if error is None and all(task.state == "warm" and task.seconds is None for task in report.tasks):
            more = " Nothing to do." if report.verb == "warm" else ""
            self.console.say(
                f"warm-cache: {total} of {counted(total, 'task')} warm for toolchain {report.toolchain} "
                f"({report.image_ref}).{more}"
            )
            return
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

    def _complain(self, error: BuilderError) -> None:
        lines = [error.usage] if isinstance(error, CommandLineError) else []
        problems = error.problems if isinstance(error, ProblemsError) else ()
        if problems and error.message != str(problems[0]):
            lines.append(f"error: {error.message} ({counted(len(problems), 'problem')}):")
            width = max(len(problem.location) for problem in problems)
            lines += [
                f"  {problem.location:<{width}}  " + sentence(f"{problem.text} {problem.remedy}")
                for problem in problems
            ]
            if error.exit_code == 12:
                lines.append("To see the program work without GPUs (from a checkout): make demo.")
        else:
            lines.append("error: " + sentence(error.message))
        lines[-1] += f" Exit {error.exit_code}."
        if error.notes:
            lines.append("last line:" if len(error.notes) == 1 else "last lines:")
            lines += [f"  │ {note}" for note in error.notes]
        # Errors belong on stderr; with --json, for env and for hold the console is there already.
        stream = Console(
            _or_nowhere(sys.stderr), terminal=False, github=self.console.github, hurried=lambda: self.console.hurried
        )
        stream.say("\n".join(lines))
        self.console.stuck = self.console.stuck or stream.stuck
        reasons = [f"{problem.location}: {sentence(f'{problem.text} {problem.remedy}')}" for problem in problems]
        self.console.annotate("warm-cache", "\n".join([error.message, *reasons]))


def _function(name: str) -> Callable[..., int | None]:
    """``module:function`` of a verb."""
    module, _, function = name.partition(":")
    found: Callable[..., int | None] = getattr(importlib.import_module(module), function)
    return found


class _Signals:
    """SIGINT, SIGTERM and SIGHUP end the run in order; Ctrl-Z is refused, because a stopped reader blocks its
    container. What a run came to is told all the same, however often somebody asks for its end: until `restore`, but
    not for long.
    """

    def __init__(self, cancel: Cancel) -> None:
        self._cancel = cancel
        self._previous: dict[int, Any] = {}
        self._telling: Deadline | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        if not self._previous:
            ending = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
            if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
                ending.remove(signal.SIGHUP)
            handlers: dict[int, Any] = {**dict.fromkeys(ending, self._handle), signal.SIGTSTP: signal.SIG_IGN}
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._telling = None
        try:
            yield
        finally:
            self._telling = Deadline(TELLING)

    def restore(self) -> None:
        previous, self._previous = self._previous, {}
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        if self._telling is None:
            self._cancel.set(signum)
            if not self._cancel.shielded:
                raise Interrupted(signum)
        elif self._telling.expired:
            raise Interrupted(signum)


def _absolute(path: str, place: str) -> Path:
    """Raises UsageError, with the place where the path was said, when nobody knows what it is relative to."""
    try:
        return Path(path).absolute()
    except OSError as error:
        raise UsageError(f"{place}: {path} is relative to a directory that was removed ({error.strerror})") from None


def _or_nowhere(stream: TextIO | None) -> TextIO:
    """The stream, or one that keeps nothing where this process was started without it (``>&-``)."""
    return stream if stream is not None else Path(os.devnull).open("w", encoding="utf-8")


def _unexpected(raised: Exception) -> BuilderError:
    """What nobody has put into words before: a machine that is short of something, or else a defect."""
    package = (getattr(raised, "name", None) or "").partition(".")[0]
    if isinstance(raised, ModuleNotFoundError) and package in PACKAGES:
        return PreflightError(
            f"the package {PACKAGES[package]} is not installed for {sys.executable}: pip install {PACKAGES[package]}. "
            "Inside a runner's container, where there is no engine, check, explain, env, warm and audit take --here."
        )
    if isinstance(raised, OSError) and raised.errno in SHORTAGES:
        place = f"{raised.filename}: " if raised.filename else ""
        return PreflightError(f"this machine can't run it: {place}{raised.strerror}")
    if isinstance(raised, RuntimeError) and str(raised) == NO_THREAD:
        return PreflightError("this machine can't run it: it has no room for one more thread (ulimit -u, pids.max)")
    return DefectError(
        f"a defect in warm-cache: {type(raised).__name__}: {raised}. Run again with -v for the traceback."
    )


def _silence_broken_stdout() -> None:
    """A reader that went away (``| head``), or a full disk, must not turn into a traceback at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
