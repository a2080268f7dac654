"""What a verb gets besides its arguments: output, signals, and the ways to a manifest and to an engine."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from builder import files
from builder.cache.build_proofs import ANY_PROOF, ProofWanted
from builder.cli.options import Args, ManifestArgs
from builder.cli.signals import Signals
from builder.cli.verbs import VERBS
from builder.engine.client import Engine
from builder.engine.lease import home_directory
from builder.errors import Problem, UsageError
from builder.host import outside
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.manifest.document import Document
from builder.manifest.load import (
    CacheSpec,
    Manifest,
    Overrides,
    cache_of,
    profiles,
    read_manifest,
    select,
    without_tasks,
)
from builder.report.console import Console
from builder.report.results import Report
from builder.run import preflight
from builder.run.container_executor import ContainerExecutor
from builder.run.context import Context, Options
from builder.text import printable

if TYPE_CHECKING:
    from builder.run.local_executor import LocalExecutor

#: Name of a run's log directory in the default place: its start, and its run id.
LOG_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
#: Number of log directories that are kept there.
LOGS_KEPT = 50
#: Seconds for removing older ones.
_TIDYING = 2.0


@dataclass(frozen=True)
class Invocation:
    """One run of one verb."""

    verb: str
    args: Args
    environ: Mapping[str, str]
    console: Console
    report: Report
    cancel: Cancel
    signals: Signals
    run_id: str = field(default_factory=lambda: os.urandom(6).hex())

    def manifest(self, *, only: Sequence[str] = (), needs_cache: bool = True, **limits: str | None) -> Manifest:
        """Return the named manifest. Raises UsageError with every problem, and where none or two are named.

        only: models or labels of the tasks to select; all by default. needs_cache: False for a verb that uses none.
        limits: names and values of `Overrides`.
        """
        manifest, _ = self.manifest_and_document(needs_cache=needs_cache, **limits)
        with self._problems_located():
            return select(manifest, only)

    def manifest_and_document(self, *, needs_cache: bool = True, **limits: str | None) -> tuple[Manifest, Document]:
        """Return the named manifest, with all its tasks, and what it was read from. Raises as `manifest` does."""
        args = self._manifest_args()
        if not args.manifest and not args.profile:
            raise UsageError(f"which manifest? Pass --manifest FILE or --profile NAME ({', '.join(profiles())})")
        if args.manifest and args.profile:
            ways = f"{args.location('manifest')} {args.manifest} and {args.location('profile')} {args.profile}"
            raise UsageError(f"{ways} exclude each other")
        overrides = Overrides(image=args.image, cache=args.cache, models=args.models, needs_cache=needs_cache, **limits)
        self.report.warnings += [
            f"{args.location(name.replace('_', '-'))} {text} is {text} seconds; {text} minutes are {text}m"
            for name, text in limits.items()
            if text and text.isascii() and text.isdigit() and text != "0"
        ]
        with self._problems_located():
            manifest, document = read_manifest(args.manifest, profile=args.profile, overrides=overrides)
        self.report.image_ref, cache = manifest.image.ref, manifest.cache
        self.report.cache = str(cache.root) if cache.root else f"volume {cache.volume}"
        return manifest, document

    def named_manifest(
        self, *, only: Sequence[str] = (), needs_cache: bool = True, **limits: str | None
    ) -> Manifest | None:
        """Return the named manifest as `manifest` does, or None where none is named."""
        return (
            self.manifest(only=only, needs_cache=needs_cache, **limits)
            if self._manifest_args().names_manifest
            else None
        )

    def cache(self, place: str) -> CacheSpec:
        """Return the cache that ``--cache`` names. Raises UsageError."""
        with self._problems_located():
            return cache_of(place)

    def context(
        self,
        manifest: Manifest,
        *,
        log_dir: str | None = None,
        pull: bool = False,
        force: bool = False,
        wanted: ProofWanted = ANY_PROOF,
        allow_busy: bool = False,
        prebuild_only: bool = False,
        probes: bool = True,
        creates: bool = False,
        create: bool = False,
    ) -> Context:
        """Return the context of a run. log_dir: None for the default place; the rest as in `Options`."""
        chosen = _absolute(log_dir, self.args.location("log-dir")) if log_dir else self.default_log_dir
        options = Options(
            log_dir=chosen,
            log_dir_fallback=None if log_dir else self._log_dir_in(_temporary_home()),
            state_dir=_absolute(self.environ.get("XDG_RUNTIME_DIR") or files.temporary_directory(), "XDG_RUNTIME_DIR"),
            environ=self.environ,
            pull=pull,
            force=force,
            wanted=wanted,
            allow_busy=allow_busy,
            prebuild_only=prebuild_only,
            probes=probes,
            creates=creates,
            create=create,
        )
        return Context(
            manifest=manifest,
            options=options,
            console=self.console,
            report=self.report,
            cancel=self.cancel,
            budget=Deadline(manifest.run.budget),
            run_id=self.run_id,
        )

    @contextlib.contextmanager
    def containers(self, context: Context, *, greet: bool = False) -> Iterator[ContainerExecutor]:
        """Handle signals, connect to the engine, and give a way to run containers on it. Raises PreflightError.

        greet: for verbs that often need no more of the engine than its image.
        """
        with self.signals.handled(), self.connected(context, greet=greet) as executor:
            yield executor

    @contextlib.contextmanager
    def connected(self, context: Context, timeout: float = 60.0, *, greet: bool = False) -> Iterator[ContainerExecutor]:
        """Give a way to run containers on the engine. timeout: seconds for each of its answers."""
        engine = Engine(self.environ.get("DOCKER_HOST") or None, timeout)
        with contextlib.closing(engine):
            with preflight.engine_wanted(context.manifest, engine.url):
                _ = engine.greet() if greet else engine.connect()
            # Everything loaded so far is used to the end. Excluding it from collections, and from the one at exit,
            # saves a tenth of a check's time.
            gc.freeze()
            with ContainerExecutor(context, engine) as executor:
                yield executor

    def local(
        self,
        manifest: Manifest | None,
        *,
        force: bool = False,
        wanted: ProofWanted = ANY_PROOF,
        create: bool = False,
        log_dir: str | None = None,
        prebuild_only: bool = False,
    ) -> LocalExecutor:
        """Return a way to run tasks in this environment, on the cache where it is mounted here. Raises UsageError.

        manifest: None for one without tasks. log_dir: None for a new directory in the temporary one.
        """
        from builder.run import local_executor  # only --here needs it

        args = self._manifest_args()
        root: Path | None = Path(manifest.cache.mount) if manifest else local_executor.MOUNT
        if args.cache:
            root = (manifest.cache if manifest else self.cache(args.cache)).root
        if root is None:
            raise UsageError(f"--cache {args.cache}: with --here, the directory is wanted where the cache is mounted")
        logs = log_dir or str(Path(files.temporary_directory(), f"warm-cache-logs-{self.run_id}"))
        context = self.context(
            manifest or without_tasks(),
            log_dir=logs,
            force=force,
            wanted=wanted,
            create=create,
            prebuild_only=prebuild_only,
        )
        return local_executor.LocalExecutor(context, root, args.image)

    @functools.cached_property
    def default_log_dir(self) -> Path:
        """Return this run's log directory in the default place; the first log makes it."""
        return self._log_dir_in(self._state_home())

    @functools.cached_property
    def _log_name(self) -> str:
        return f"{time.strftime('%Y%m%d-%H%M%S')}-{self.run_id[:6]}"

    def _log_dir_in(self, base: Path) -> Path:
        return base / "logs" / self._log_name

    def prune_logs(self) -> None:
        """If this run wrote logs in a default place, remove all but the newest runs' logs there."""
        for place in (self.default_log_dir, self._log_dir_in(_temporary_home())):
            with contextlib.suppress(OSError, outside.StuckError):
                outside.call(functools.partial(_prune_logs, place), str(place), _TIDYING)

    def _manifest_args(self) -> ManifestArgs:
        assert isinstance(self.args, ManifestArgs), f"{self.verb} has no options that name a manifest"
        return self.args

    @contextlib.contextmanager
    def _problems_located(self) -> Iterator[None]:
        """Give problems of an option's value the location where the value was given, instead of the manifest's."""
        places = {f"--{option}": self.args.location(option) for option in VERBS[self.verb].options}
        if "--manifest" in places:
            path = printable(self._manifest_args().manifest or "")
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

    def _state_home(self) -> Path:
        """Return the directory above the default logs: the temporary one where there is no HOME, as in cron jobs."""
        base = self.environ.get("XDG_STATE_HOME", "")
        if not base.startswith("/"):
            base = ""
            with contextlib.suppress(RuntimeError):
                base = str(Path.home() / ".local" / "state")
        return Path(base) / "warm-cache" if base else _temporary_home()


def _temporary_home() -> Path:
    """Return this user's own directory in the temporary one."""
    return home_directory(Path(files.temporary_directory()))


def _prune_logs(place: Path) -> None:
    """Keep the newest LOGS_KEPT directories of runs beside this one, if it exists. Raises OSError."""
    if place.is_dir():
        runs = sorted(path for path in place.parent.iterdir() if LOG_NAME.fullmatch(path.name))
        for path in runs[:-LOGS_KEPT]:
            shutil.rmtree(path, ignore_errors=True)  # does not follow links


def _absolute(path: str, location: str) -> Path:
    """Return the absolute path. Raises UsageError with the location of the value if there is no working directory."""
    try:
        return Path(path).absolute()
    except OSError as error:
        raise UsageError(f"{location}: {path} is relative to a directory that was removed ({error.strerror})") from None
