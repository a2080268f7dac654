"""The verb `view`: writable views of the warm cache for test jobs, and what jobs changed in theirs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder.cache import view_records
from builder.cache.findings import proposal
from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.errors import UsageError
from builder.report import audit
from builder.report.results import Section
from builder.report.tables import table
from builder.run import views
from builder.run.container_executor import ContainerExecutor
from builder.run.views import GenerationRow, ViewRow
from builder.text import age, size


@dataclass(frozen=True, kw_only=True)
class ViewArgs(ManifestArgs):
    """Arguments of `view`."""

    action: str
    job: str | None = None
    replace: bool = False
    fail_on_jit: bool = False
    lock_timeout: str | None = None


@dataclass
class CreatedView(Section):
    """A view that was made. docker: what gives it to a job, as values."""

    job: str
    volume: str
    generation: str
    docker: Mapping[str, object]


@dataclass
class DroppedView(Section):
    """A view that is gone. removed: it was there."""

    job: str
    removed: bool


@dataclass
class AllViews(Section):
    """All views, and the generations that they lie on."""

    views: Sequence[ViewRow]
    generations: Sequence[GenerationRow]


@dataclass
class Promotion(Section):
    """Lines of a manifest that would cover what a job compiled."""

    promote: str


def run(args: ViewArgs, invocation: Invocation) -> None:
    """Carry out one action on one view, or list all views."""
    manifest = invocation.manifest(lock_timeout=args.lock_timeout)
    job = "" if args.job is None else _checked(args.job)
    with invocation.containers(invocation.context(manifest)) as executor:
        match args.action:
            case "create":
                _create(executor, job, args.replace)
            case "audit":
                _audit(executor, job, args)
            case "promote":
                _promote(executor, job, args)
            case "drop":
                _drop(executor, job)
            case _:
                _list(executor, args.json)


def _checked(job: str) -> str:
    """Return the name of the view. Raises UsageError where it is not a name."""
    if not view_records.NAME.fullmatch(job):
        raise UsageError(
            f"JOB is {job!r}: 2 to 63 letters, digits, dots, dashes and underscores are wanted, the first a letter "
            "or digit"
        )
    return job


def _create(executor: ContainerExecutor, job: str, replace: bool) -> None:
    """Make a view, and print the arguments of docker run that give it to a job."""
    view, report = views.create(executor, job, replace=replace), executor.context.report
    report.text = view.environment.text("docker", report.toolchain)
    report.add(CreatedView(job, view.volume, view.generation, view.environment.document(report.toolchain)))
    executor.context.console.say(
        f"the view {job} of {executor.root_name} is made of generation {view.generation}, volume {view.volume}"
    )


def _audit(executor: ContainerExecutor, job: str, args: ViewArgs) -> None:
    """Report what the job compiled. Raises ColdError with --fail-on-jit if it compiled anything."""
    found, report = views.audited(executor, job), executor.context.report
    report.add(audit.AuditSection.of(found))
    report.text = None if args.json else audit.text_of(found, f"the job {job}")
    if args.fail_on_jit:
        audit.raise_if_compiled(found, f"the job {job}")


def _promote(executor: ContainerExecutor, job: str, args: ViewArgs) -> None:
    """Print the lines of a manifest that would cover what the job compiled. Raises ColdError as `_audit` does."""
    found, report = views.audited(executor, job), executor.context.report
    text = proposal(found, job)
    report.add(audit.AuditSection.of(found))
    report.add(Promotion(text))
    report.text = None if args.json else text or None
    if not text:
        executor.context.console.say(f"the job {job} compiled nothing that a manifest could cover")
    if args.fail_on_jit:
        audit.raise_if_compiled(found, f"the job {job}")


def _drop(executor: ContainerExecutor, job: str) -> None:
    """Remove a view. One that is gone is no error: a step that cleans up runs whatever happened before."""
    removed, context = views.drop(executor, job), executor.context
    context.report.add(DroppedView(job, removed))
    said = f"the view {job} is removed" if removed else f"there is no view {job} of {executor.root_name}, so it is gone"
    context.console.say(said)


def _list(executor: ContainerExecutor, as_json: bool) -> None:
    """Print all views, and the generations that they lie on."""
    found, generations = views.listed(executor)
    executor.context.report.add(AllViews(found, generations))
    if as_json:
        return
    now = time.time()
    of_views = table(
        ("view", "age", "written", "files", "generation", "used by", "note"),
        [
            [
                row.name,
                age(now - row.created) if row.created else "–",
                size(row.bytes),
                str(row.files),
                row.generation or "–",
                ", ".join(row.used_by) or "–",
                row.note,
            ]
            for row in found
        ],
    )
    of_generations = table(
        ("generation", "asked for", "size", "files", "views"),
        [
            [row.id, f"{age(now - row.asked)} ago", size(row.bytes), str(row.files), ", ".join(row.views)]
            for row in generations
        ],
    )
    executor.context.report.text = "\n".join(
        [of_views if found else "no views", of_generations if generations else "no generations"]
    )
