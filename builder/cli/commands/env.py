"""The verb `env`: mounts and variables of a test job that must hit the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ProofArgs
from builder.errors import ColdError, UsageError
from builder.report.results import Report, Section
from builder.run import image_checks, job_environment
from builder.run.job_environment import JobEnvironment
from builder.text import counted


@dataclass(frozen=True, kw_only=True)
class EnvArgs(ProofArgs):
    """Arguments of `env`."""

    only: tuple[str, ...] = ()
    format: str | None = None
    crash_on_jit: bool = False
    here: bool = False
    no_probe: bool = False


@dataclass
class EnvSection(Section):
    """What a job gets, as values."""

    env: Mapping[str, object]


def run(args: EnvArgs, invocation: Invocation) -> None:
    """Print the mounts and variables. Raises ColdError if something in that cache is cold."""
    if args.here:
        _env_here(args, invocation)
        return
    context = invocation.context(
        invocation.manifest(only=args.only), wanted=args.wanted("any"), probes=not args.no_probe
    )
    with invocation.containers(context, greet=True) as executor:
        form = args.format or "docker"
        job = job_environment.of_job(executor, form, crash_on_jit=args.crash_on_jit)
        _show(job, form, args, invocation.report)
        image, tasks = image_checks.variables(executor.image), context.manifest.tasks
        invocation.report.warnings += image_checks.keep_warnings(tasks, image, executor.direct_root())
        invocation.report.docker_arguments = form == "docker"
        _refuse_cold(invocation.report)


def _env_here(args: EnvArgs, invocation: Invocation) -> None:
    """Print the variables with which a process here uses the cache; nothing if there is no cache root.

    Raises ColdError if there is none, or something in it is cold.
    """
    form = args.format or "shell"
    if form == "docker":
        raise UsageError(
            "--format docker starts a container, and --here is for processes inside one: use shell, github, json or "
            "kubernetes"
        )
    manifest = invocation.named_manifest(only=args.only)
    if args.only and manifest is None:
        raise UsageError("--only selects tasks of a manifest: pass --manifest or --profile too")
    local = invocation.local(manifest, wanted=args.wanted("any"))
    if missing := local.missing_root():
        raise ColdError(f"{missing}: there is nothing that variables could point at")
    tasks = manifest.tasks if manifest else ()
    plan = job_environment.judge(local)
    records = [(item.task.label, item.record) for item in plan.items] if plan and plan.items else [("", local.record)]
    keys, others = job_environment.common_keys(records)
    job_max = local.context.manifest.cache.job_max
    places, private, place = job_environment.places_here(local.root, keys, job_max)
    found = {**job_environment.common_env(tasks), **places, **job_environment.toolkit(records)}
    if args.crash_on_jit:
        found[job_environment.CRASH_ON_JIT] = "1"
    warnings = invocation.report.warnings
    warnings += [*job_environment.missed(tasks), *others, *job_environment.unlisted(records)]
    warnings += job_environment.told(private, place, job_max)
    warnings += image_checks.keep_warnings(tasks, local.environ, local.root)
    job = JobEnvironment(variables=found, private=private)
    _show(job, form, args, invocation.report)
    _refuse_cold(invocation.report)


def _show(job: JobEnvironment, form: str, args: EnvArgs, report: Report) -> None:
    """Print it in this format; with --json, JSON is a part of the document and no text in it."""
    if args.json and form == "json":
        report.add(EnvSection(job.document(report.toolchain)))
    else:
        report.text = job.text(form, report.toolchain)


def _refuse_cold(report: Report) -> None:
    """Raise ColdError with the labels of the cold tasks, if there are any."""
    cold = [task.label for task in report.tasks if task.state == "cold"]
    if cold:
        raise ColdError(f"{len(cold)} of {counted(len(report.tasks), 'task')} cold: {', '.join(cold)}")
