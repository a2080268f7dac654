"""argv, environment and signals in; one exit status out. The only module that reads the first three, and the only one
that prints.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from builder import __version__, preflight
from builder.complaints import EngineTimeoutError
from builder.container import Cancel
from builder.engine import Engine
from builder.errors import (
    BuilderError,
    DefectError,
    EngineLostError,
    Interrupted,
    PreflightError,
    ProblemsError,
    UsageError,
)
from builder.manifest import Manifest, Overrides, cache_of, load, profiles, select
from builder.report import TASK_COLUMNS, Console, Report, counted, task_table
from builder.session import Options, Session
from builder.waiting import Deadline

ENVIRONMENT = "WARM_CACHE_"
#: Seconds that a test job waits for an engine's answer, when it is only about the hold.
HOLD_PATIENCE = 10.0
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


@dataclass(frozen=True)
class Verb:
    """One subcommand. help is one line; example a command line that works; own are names in OPTIONS, beside the common
    ones. wraps: a command of somebody else's follows, and owns stdout.
    """

    help: str
    example: str
    own: tuple[str, ...] = ()
    wraps: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        return (*(WRAPPING if self.wraps else COMMON), *self.own)


#: name → keyword arguments of argparse. Every one that takes a value can be given as WARM_CACHE_<NAME> too.
OPTIONS: dict[str, dict[str, object]] = {
    "manifest": {"metavar": "FILE", "help": "the manifest (TOML)"},
    "profile": {"metavar": "NAME", "help": f"a packaged manifest: {', '.join(profiles())}"},
    "cache": {"metavar": "DIR|volume:NAME", "help": "the cache root, instead of the manifest's"},
    "image": {"metavar": "REF", "help": "the serving image, instead of the manifest's"},
    "models": {"metavar": "DIR", "help": "the model store (HF_HOME), instead of the manifest's"},
    "only": {
        "metavar": "MODEL",
        "action": "append",
        "help": "only tasks of this model or label (may be repeated; * matches)",
    },
    "json": {"action": "store_true", "help": "print one JSON document on stdout; everything else goes to stderr"},
    "verbose": {"action": "store_true", "help": "show image builds, and a traceback with a defect"},
    "force": {"action": "store_true", "help": "run warm tasks too"},
    "allow-busy": {"action": "store_true", "help": "start even where somebody else holds a GPU"},
    "pull": {"action": "store_true", "help": "pull the image first"},
    "strict": {"action": "store_true", "help": "only a marker whose second pass added nothing counts as warm"},
    "budget": {"metavar": "55m", "help": "how long the whole run may take"},
    "timeout": {"metavar": "20m", "help": "how long one task may take"},
    "silence": {"metavar": "10m", "help": "how long a task may be silent"},
    "repair": {"action": "store_true", "help": "move bad entries aside, so that they are compiled again"},
    "lock-timeout": {"metavar": "1m", "help": "how long to wait for another builder on the same cache or GPUs"},
    "log-dir": {"metavar": "DIR", "help": "where each task's whole log goes (default: below the state directory)"},
    "format": {
        "metavar": "FORMAT",
        "choices": ("docker", "shell", "github", "json"),
        "help": "docker, shell, github or json",
    },
}
COMMON = ("manifest", "profile", "cache", "image", "models", "json", "verbose")
WRAPPING = ("manifest", "profile", "cache", "image", "verbose")
STARTS = ("pull", "log-dir")

VERBS = {
    "warm": Verb(
        "make every task of the manifest warm",
        "warm-cache warm --profile h200 --cache /data/sglang-jit --budget 55m",
        ("only", "force", "strict", "allow-busy", "budget", "timeout", "silence", "lock-timeout", *STARTS),
    ),
    "check": Verb("say warm or cold per task; exit 0 or 10", "warm-cache check --profile h200", ("only", "strict")),
    "explain": Verb(
        "per task: why it is warm or cold, factor by factor",
        "warm-cache explain --only DeepSeek-V3.2",
        ("only", "strict"),
    ),
    "status": Verb("what lies in the cache: families, entries, bytes, markers", "warm-cache status --json"),
    "verify": Verb(
        "look at every entry in the cache; exit 0 or 10",
        "warm-cache verify --repair --profile h200 --cache /data/sglang-jit",
        ("repair", "lock-timeout"),
    ),
    "sweep": Verb(
        "end containers of builders that were killed, and move aside what they left in the cache",
        "warm-cache sweep --profile h200 --cache /data/sglang-jit",
        ("lock-timeout",),
    ),
    "hold": Verb(
        "run a command, its exit status included, and tell the cleaner meanwhile that the cache is in use",
        "warm-cache hold --cache /jit -- pytest test/srt",
        wraps=True,
    ),
    "env": Verb(
        "mounts and variables of a test job that must hit the cache",
        "docker run $(warm-cache env --format docker) …",
        ("format",),
    ),
    "doctor": Verb(
        "what keeps this machine from running the manifest, all at once",
        "warm-cache doctor --profile h200",
        ("allow-busy",),
    ),
}

STATUSES = """exit status: 0 warm · 1 defect · 2 usage or manifest · 10 cold (check), bad entries (verify) · 11 some
tasks failed, partial, timed out or skipped · 12 this machine can't run it · 13 GPUs not released · 14 budget exhausted
· 15 cache or GPUs busy · 16 engine lost · 130/143 signal"""


def parser() -> argparse.ArgumentParser:
    """The command line; `OPTIONS` and `VERBS` are its text."""
    top = argparse.ArgumentParser(
        prog="warm-cache",
        description="Compile every JIT kernel that sglang's test jobs will ask for into a persistent cache, prove it, "
        "and leave nothing behind.",
        epilog=f"example: warm-cache warm --profile h200 --cache /data/sglang-jit\n\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"warm-cache {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.help,
            description=verb.help[0].upper() + verb.help[1:] + ".",
            epilog=f"example: {verb.example}\n\n{STATUSES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            usage=f"warm-cache {name} [option ...] -- CMD [argument ...]" if verb.wraps else None,
        )
        sub.set_defaults(json=False, models=None)
        for option in verb.options:
            flags = ["-v", "--verbose"] if option == "verbose" else [f"--{option}"]
            sub.add_argument(*flags, **OPTIONS[option])  # type: ignore[arg-type]
    return top


def main(argv: Sequence[str] | None = None, *, environ: Mapping[str, str] | None = None) -> int:
    """Runs one verb and returns its exit status. Everything raised on purpose ends here as one sentence."""
    environ = dict(os.environ if environ is None else environ)
    argv, wrapped = _split(list(sys.argv[1:] if argv is None else argv))
    try:
        arguments = parser().parse_args(argv, argparse.Namespace(command=wrapped))
    except SystemExit as stop:  # argparse has printed its own message
        return int(stop.code or 0)
    chosen = getattr(arguments, "manifest", None) or getattr(arguments, "profile", None)
    for option in VERBS[arguments.verb].options:
        name = option.replace("-", "_")
        value = environ.get(ENVIRONMENT + name.upper())
        if option in ("manifest", "profile") and chosen:
            continue  # a flag wins over the environment, also over the other way to say it
        if value and not getattr(arguments, name):
            action = OPTIONS[option].get("action")
            setattr(
                arguments,
                name,
                {"store_true": value.lower() not in ("0", "no", "false"), "append": value.split(",")}.get(
                    str(action), value
                ),
            )
    return _Invocation(arguments, environ).run()


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own words and the wrapped command's, which begins after the first ``--`` and is nobody's to interpret."""
    verb = VERBS.get(argv[0]) if argv else None
    at = argv.index("--") if verb and verb.wraps and "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


class _Invocation:
    """One run of one verb: streams, report, signals, and the mapping from errors to exit status."""

    def __init__(self, arguments: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.environ = environ
        self.started = time.monotonic()
        self.report = Report(arguments.verb)
        self.status = 0
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal of the last century still sees the rest
        stream = _or_nowhere(sys.stderr if arguments.json or arguments.verb in ("env", "hold") else sys.stdout)
        terminal = stream.isatty() and environ.get("TERM") != "dumb" and "NO_COLOR" not in environ
        self.console = Console(
            stream,
            terminal=terminal,
            github=environ.get("GITHUB_ACTIONS") == "true",
            width=shutil.get_terminal_size((80, 24)).columns,
            verbose=arguments.verbose,
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
            if self.arguments.verbose:
                self.console.say(traceback.format_exc().rstrip())
            error = _unexpected(raised)
        self.report.seconds = time.monotonic() - self.started
        try:
            return self._conclude(error)
        except KeyboardInterrupt:
            return Interrupted(signal.SIGINT).exit_code

    def _verb(self) -> None:
        self._check_choices()
        if VERBS[self.arguments.verb].wraps:
            return self._hold()
        manifest, cancel = self._manifest(), Cancel()
        with _signals(cancel), self._open(manifest, cancel) as session:
            self._act(session)
        return None

    @contextlib.contextmanager
    def _open(self, manifest: Manifest, cancel: Cancel, timeout: float = 60.0) -> Iterator[Session]:
        """An engine that answers within so many seconds, and the session with it."""
        options = Options(
            log_dir=self._log_dir(),
            state_dir=self._state_dir(),
            environ=self.environ,
            pull=getattr(self.arguments, "pull", False),
            force=getattr(self.arguments, "force", False),
            strict=getattr(self.arguments, "strict", False),
            allow_busy=getattr(self.arguments, "allow_busy", False),
            creates=self.arguments.verb == "warm",
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
            with Session(
                manifest, engine, self.console, cancel, self.report, options, Deadline(manifest.run.budget)
            ) as session:
                yield session

    def _hold(self) -> None:
        arguments = self.arguments
        if not arguments.command:
            raise UsageError("which command? It follows after two dashes: warm-cache hold [option ...] -- CMD")
        named = arguments.manifest or arguments.profile or not arguments.cache
        manifest = self._manifest() if named else None
        from builder import command, hold

        # A job's own choices, before this program makes its own.
        ignored = [signum for signum in command.FORWARDED if signal.getsignal(signum) is signal.SIG_IGN]
        cancel = Cancel()
        holding = hold.held(
            manifest.cache if manifest else cache_of(arguments.cache),
            here=manifest is None or (self.environ.get("DOCKER_HOST") or "unix://").startswith("unix://"),
            connect=(lambda: self._open(manifest, cancel, HOLD_PATIENCE)) if manifest else None,
            console=self.console,
            cancel=cancel,
        )
        with _signals(cancel), holding:
            self.status = command.run(arguments.command, self.environ, ignored=ignored)

    def _act(self, session: Session) -> None:
        """Each verb loads what it needs: a check has ended before all the others would be there."""
        tasks = session.manifest.tasks
        match self.arguments.verb:
            case "warm":
                from builder import run

                run.warm(session, tasks)
            case "sweep":
                from builder import upkeep

                upkeep.sweep(session)
            case "verify":
                from builder import upkeep

                upkeep.verify(session, repair=self.arguments.repair)
            case "env":
                from builder import verbs

                text = verbs.env(session, tasks, self.arguments.format or "docker")
                if self.arguments.json:
                    self.report.extra["env"] = text
                else:
                    print(text)
                verbs.warmth(session)
            case verb:
                from builder import verbs

                {"check": verbs.check, "explain": verbs.explain, "status": verbs.status, "doctor": verbs.doctor}[verb](
                    session, tasks
                )

    def _check_choices(self) -> None:
        """What argparse does for flags, for values that came from the environment."""
        for option, keywords in OPTIONS.items():
            choices, value = keywords.get("choices"), getattr(self.arguments, option.replace("-", "_"), None)
            if isinstance(choices, tuple) and value is not None and value not in choices:
                raise UsageError(f"{ENVIRONMENT}{option.upper()} is {value!r}: one of {', '.join(choices)} is wanted")

    def _manifest(self) -> Manifest:
        arguments = self.arguments
        if not arguments.manifest and not arguments.profile:
            raise UsageError(f"which manifest? Pass --manifest FILE or --profile NAME ({', '.join(profiles())}).")
        if arguments.manifest and arguments.profile:
            raise UsageError(f"--manifest {arguments.manifest} and --profile {arguments.profile} exclude each other")
        overrides = Overrides(
            image=arguments.image,
            cache=arguments.cache,
            models=arguments.models,
            **{name: getattr(arguments, name, None) for name in ("budget", "timeout", "silence", "lock_timeout")},
        )
        return select(
            load(arguments.manifest, profile=arguments.profile, overrides=overrides),
            getattr(arguments, "only", None) or (),
        )

    def _log_dir(self) -> Path:
        chosen = getattr(self.arguments, "log_dir", None)
        return Path(chosen).absolute() if chosen else self._state_home() / "logs" / time.strftime("%Y%m%d-%H%M%S")

    def _state_home(self) -> Path:
        """Where logs go by default. A cron job may have no HOME: then the temporary directory has to do."""
        base = self.environ.get("XDG_STATE_HOME")
        if not base:
            with contextlib.suppress(RuntimeError):
                base = str(Path.home() / ".local" / "state")
        return Path(base or tempfile.gettempdir()) / "warm-cache"

    def _state_dir(self) -> Path:
        return Path(self.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()).absolute()

    # --- the end
    # ---------------------------------------------------------------------------------------------------------

    def _conclude(self, error: BuilderError | None) -> int:
        status = error.exit_code if error else self.status
        report, console = self.report, self.console
        for warning in report.warnings:
            console.say(f"warning: {warning}")
        if report.verb in ("warm", "check") and report.tasks:
            self._tasks()
        if error is not None:
            self._complain(error)
        if self.arguments.json:
            try:
                print(report.document(status, error), flush=True)
            except BrokenPipeError:
                pass
            except OSError as failed:
                console.say(f"warning: the JSON document could not be written: {failed.strerror}")
        _silence_broken_stdout()
        return status

    def _tasks(self) -> None:
        report = self.report
        total = len(report.tasks)
        if report.count("warm") == total:
            more = " Nothing to do." if report.verb == "warm" else ""
            self.console.say(
                f"warm-cache: {total} of {counted(total, 'task')} warm for toolchain {report.toolchain} "
                f"({report.image_ref}).{more}"
            )
            return
        self.console.table(TASK_COLUMNS, task_table(report.tasks))
        kinds = [
            f"{report.count(state)} {state}"
            for state in ("warmed", "warm", "cold", "partial", "skipped", "failed")
            if report.count(state)
        ]
        self.console.say(f"{', '.join(kinds)} in {report.seconds:.1f} s.")

    def _complain(self, error: BuilderError) -> None:
        lines = []
        if isinstance(error, ProblemsError) and error.problems:
            lines.append(f"error: {error.message} ({counted(len(error.problems), 'problem')}):")
            width = max(len(problem.place) for problem in error.problems)
            lines += [
                f"  {problem.place:<{width}}  {problem.text} {problem.remedy}".rstrip() for problem in error.problems
            ]
            if error.exit_code == 12:
                lines.append("To see the program work without GPUs: make demo.")
            lines[-1] += f" Exit {error.exit_code}."
        else:
            end = "" if error.message.endswith((".", "!", "?")) else "."
            lines.append(f"error: {error.message}{end} Exit {error.exit_code}.")
        if error.notes:
            lines += ["last lines:", *(f"  │ {note}" for note in error.notes)]
        # Errors belong on stderr; with --json, for env and for hold the console is there already.
        stream = Console(_or_nowhere(sys.stderr), terminal=False)
        stream.say("\n".join(lines))
        self.console.annotate("warm-cache", error.message)


@contextlib.contextmanager
def _signals(cancel: Cancel) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the run in order; Ctrl-Z is refused, because a stopped reader blocks its
    container.
    """

    def handle(signum: int, _frame: object) -> None:
        cancel.set(signum)
        if not cancel.shielded:
            raise Interrupted(signum)

    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle, signal.SIGHUP: handle, signal.SIGTSTP: signal.SIG_IGN}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        del handlers[signal.SIGHUP]
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _or_nowhere(stream: TextIO | None) -> TextIO:
    """The stream, or one that keeps nothing where this process was started without it (``>&-``)."""
    return stream if stream is not None else Path(os.devnull).open("w", encoding="utf-8")


def _unexpected(raised: Exception) -> BuilderError:
    """What nobody has put into words before: a machine that is short of something, or else a defect."""
    if isinstance(raised, OSError) and raised.errno in SHORTAGES:
        place = f"{raised.filename}: " if raised.filename else ""
        return PreflightError(f"this machine can't run it: {place}{raised.strerror}")
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
