"""import-tests: what sglang's registered tests launch, as a manifest or compared with one.

The tests are run with recorders in the place of launchers, in a container of the serving image, or with ``--here`` in a
process of this environment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.cli.invocation import Invocation
from builder.cli.options import OPTIONS, ManifestArgs
from builder.errors import ColdError, UsageError
from builder.manifest import from_tests, recorded_tasks, rewrite, suites
from builder.manifest.load import Manifest, Overrides, image_alone, load
from builder.recording import Launch, RecordingRequest, Unrecorded
from builder.report.results import Section
from builder.run import launch_recorders, launch_records
from builder.task import RECIPES
from builder.text import counted, did_you_mean, printable

#: Seconds that the engine has to answer.
_CONTAINER_SECONDS = 60.0
#: States of tests that may launch more than was recorded.
_UNCLEAR = ("failed", "not-understood")


@dataclass(frozen=True, kw_only=True)
class ImportTestsArgs(ManifestArgs):
    """Arguments of `import-tests`."""

    paths: tuple[str, ...]
    suite: str | None = None
    gpu: str | None = None
    update: str | None = None
    anew: bool = False
    records: str | None = None
    pull: bool = False
    here: bool = False


@dataclass(frozen=True, kw_only=True)
class LaunchRow:
    """One launch. place: file and line."""

    kind: str
    model: str
    argv: list[str]
    env: Mapping[str, str]
    test: str
    place: str


@dataclass(frozen=True, kw_only=True)
class NotWarmableRow(LaunchRow):
    """A launch that no recipe warms."""

    why: str


@dataclass(frozen=True, kw_only=True)
class ComparedRow(LaunchRow):
    """A launch against the tasks of a manifest: see `from_tests.Compared`."""

    covered: bool
    task: str | None
    differences: list[str]


@dataclass(kw_only=True)
class ImportSection(Section):
    """What was recorded."""

    launches: Sequence[LaunchRow]
    not_warmable: Sequence[NotWarmableRow]
    problems: Sequence[Unrecorded]
    not_understood: Sequence[Unrecorded]
    source: recorded_tasks.Source


@dataclass
class UnneededTasks(Section):
    """Labels of tasks that no launch needs."""

    unneeded: list[str]


@dataclass(frozen=True)
class UpdateCounts:
    """How many tasks of a manifest were kept, added and removed."""

    kept: int
    added: int
    removed: int


@dataclass
class UpdatedTasks(Section):
    """What an update did to a manifest."""

    updated: UpdateCounts


def run(args: ImportTestsArgs, invocation: Invocation) -> None:
    """Print a manifest, compare with the one that is named, or update one.

    Raises ColdError where no task covers a launch or something is not understood; UsageError where nothing is launched.
    """
    update = Path(args.update) if args.update else None
    if update is not None and args.names_manifest:
        raise UsageError("--update and --manifest or --profile exclude each other: it is compared with what it updates")
    if args.anew and update is None:
        raise UsageError("--anew says how --update rewrites a manifest; pass --update FILE")
    manifest = _updated(update) if update is not None else invocation.named_manifest(needs_cache=False)
    selection = suites.select(args.paths, args.suite)
    request = RecordingRequest(
        checkout=str(selection.checkout),
        files=selection.files,
        gpu=args.gpu or _gpu_of(manifest),
        workers=launch_records.workers(),
    )
    with invocation.signals.handled(), _recorder(args, invocation, manifest) as recorder:
        records = launch_records.record(request, recorder, _store(args, invocation.environ))
    recorded = from_tests.distinct(launch for each in records for launch in each.launches)
    launches, unknown = from_tests.known(recorded)
    problems = [*selection.problems, *(problem for each in records for problem in each.problems), *unknown]
    # Of what names no launcher, nothing can be missed.
    harmless = {problem for each in records if not each.may_launch(request.checkout) for problem in each.problems}
    launches, others = recorded_tasks.warmable(launches, request.gpu)
    if not launches and not others and not problems:
        raise UsageError(f"no test in {counted(len(request.files), 'file')} launches a server")
    unclear = [each for each in problems if each.state in _UNCLEAR and each not in harmless]
    source = recorded_tasks.Source(
        suites.commit_of(selection.checkout), args.suite or "", request.gpu, len(selection.files)
    )
    _report(args, invocation, manifest, Recorded(launches, others, problems, unclear, selection, source))


@dataclass(frozen=True)
class Recorded:
    """What was recorded. others: launches that no recipe warms, and why; unclear: problems that may hide a launch."""

    launches: Sequence[Launch]
    others: Sequence[tuple[Launch, str]]
    problems: Sequence[Unrecorded]
    unclear: Sequence[Unrecorded]
    selection: suites.Selection
    source: recorded_tasks.Source


def _report(args: ImportTestsArgs, invocation: Invocation, manifest: Manifest | None, found: Recorded) -> None:
    section = ImportSection(
        launches=[LaunchRow(**_fields(launch)) for launch in found.launches],
        not_warmable=[NotWarmableRow(**_fields(launch), why=why) for launch, why in found.others],
        problems=found.problems,
        not_understood=found.unclear,
        source=found.source,
    )
    invocation.report.add(section)
    compared: list[from_tests.Compared] = []
    if manifest is None:
        invocation.report.text = recorded_tasks.as_manifest(found.launches, args.paths, found.source.gpu)
        for line in [
            *(from_tests.not_warmable(launch, why) for launch, why in found.others),
            *map(from_tests.describe, found.problems),
        ]:
            invocation.console.say(line)
    else:
        compared, unneeded = from_tests.compare(found.launches, manifest.tasks)
        # A launch that was not recorded may need any task.
        unneeded = [] if found.unclear else unneeded
        section.launches = [
            ComparedRow(
                **_fields(each.launch), covered=each.covered, task=each.task, differences=list(each.differences)
            )
            for each in compared
        ]
        invocation.report.add(UnneededTasks(unneeded))
        selection = found.selection
        passed_over = f" ({selection.passed_over} of other suites passed over)" if selection.passed_over else ""
        counts = f"{counted(len(selection.files), 'file')}{passed_over}"
        if not args.json:
            invocation.report.text = from_tests.as_text(
                compared, unneeded, found.problems, found.others, manifest.path, counts
            )
        if args.update:
            _update(args, invocation, manifest, found, compared, unneeded)
            compared = []
    cold = [each for each in compared if not each.covered]
    parts = [f"{len(cold)} of {len(compared)} launches covered by no task"] if cold else []
    if found.unclear:
        tests = counted(len({(each.location, each.test) for each in found.unclear}), "test")
        parts.append(f"{tests} not, or not all, recorded")
    if parts:
        raise ColdError("; ".join(parts))


def _update(
    args: ImportTestsArgs,
    invocation: Invocation,
    manifest: Manifest,
    found: Recorded,
    compared: Sequence[from_tests.Compared],
    unneeded: Sequence[str],
) -> None:
    """Rewrite the tasks of a manifest: keep those that cover a launch, remove the others, and add missing ones.

    Removes none while something is not understood. With ``--anew`` every task that starts a server is written again,
    below a note that says what they were recorded from.
    """
    path = Path(args.update or "")
    text = path.read_bytes().decode("utf-8")
    gpus, gpu = manifest.gpus.count, found.source.gpu
    if args.anew:
        added = recorded_tasks.as_tasks(found.launches, gpus, gpu)
        going = {number for number, task in enumerate(manifest.tasks) if RECIPES[task.recipe].server}
        note = recorded_tasks.note([*found.launches, *(launch for launch, _ in found.others)], found.source)
        result = rewrite.replace_tasks(
            recorded_tasks.without_note(text), lambda number: number not in going, [note, *added]
        )
    else:
        missing = [each.launch for each in compared if not each.covered]
        going = {number for number, task in enumerate(manifest.tasks) if task.label in unneeded}
        added = recorded_tasks.as_tasks(missing, gpus, gpu)
        result = rewrite.replace_tasks(text, lambda number: number not in going, added)
    if result != text:
        rewrite.write(path, result)
    kept = len(manifest.tasks) - len(going)
    invocation.console.say(f"{path}: {counted(kept, 'task')} kept, {len(added)} added, {len(going)} removed")
    invocation.report.add(UpdatedTasks(UpdateCounts(kept, len(added), len(going))))


def _gpu_of(manifest: Manifest | None) -> str:
    """Return the GPU that a manifest's ``[gpus] name`` names, else H200."""
    name = (manifest.gpus.name or "") if manifest is not None else ""
    return next((gpu for gpu in OPTIONS["gpu"]["choices"] if gpu in name), "H200")


def _updated(path: Path) -> Manifest:
    if not path.exists():
        near = did_you_mean(path.name, (each.name for each in path.parent.glob("*.toml")))
        hint = near if near.startswith("did") else "without --update a manifest is printed, which can be the first one"
        raise UsageError(f"--update: there is no file {printable(str(path))}; {hint}")
    manifest = load(path, overrides=Overrides(needs_cache=False))
    if path.suffix == ".json" or path.read_bytes().lstrip()[:1] == b"{":
        raise UsageError(f"{path} is JSON, and only a TOML manifest can be updated in place")
    return manifest


@contextlib.contextmanager
def _recorder(
    args: ImportTestsArgs, invocation: Invocation, manifest: Manifest | None
) -> Iterator[launch_records.Recorder]:
    if args.here:
        yield launch_recorders.InChild(invocation.environ, invocation.cancel)
        return
    if manifest is None:
        if not args.image:
            raise UsageError(
                "which serving image? Pass --image REF, or a manifest that names one; for a checkout whose code is "
                "trusted, --here needs none"
            )
        manifest = image_alone(args.image)
    with invocation.connected(invocation.context(manifest, pull=args.pull), _CONTAINER_SECONDS) as executor:
        yield launch_recorders.InContainer(executor)


def _store(args: ImportTestsArgs, environ: Mapping[str, str]) -> launch_records.Store | None:
    """Return where records of earlier runs are kept: --records, else this user's cache directory."""
    chosen = args.records
    if chosen is not None:
        return launch_records.Store(Path(chosen)) if chosen else None
    base = environ.get("XDG_CACHE_HOME") or (environ.get("HOME") and f"{environ['HOME']}/.cache")
    return launch_records.Store(Path(base, "warm-cache", "launches")) if base else None


def _fields(launch: Launch) -> dict[str, Any]:
    """Return the fields of a `LaunchRow`."""
    return {
        "kind": launch.kind,
        "model": launch.model,
        "argv": list(launch.argv),
        "env": dict(launch.env),
        "test": launch.test,
        "place": launch.location,
    }
