"""The verb `check`: which tasks are warm, and which are cold."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cache import environment
from builder.cache.families import FAMILY
from builder.cache.reasons import rank
from builder.cli.invocation import Invocation
from builder.cli.options import ProofArgs
from builder.errors import ColdError
from builder.report.console import Console
from builder.report.results import Report
from builder.run import image_checks
from builder.run.container_executor import ContainerExecutor
from builder.run.job_environment import judge
from builder.text import counted

#: What to do about cold tasks, on the host and with --here.
REMEDY = "warm-cache warm, with the same options, warms them"
#: What ends every promise about a job's container.
SYS_ADMIN = (
    "this process has CAP_SYS_ADMIN: a job in a container with it can mount the cache writable, whatever its mounts "
    "are. Start it without --privileged and --cap-add SYS_ADMIN"
)
REMEDY_HERE = "warm-cache warm, on the host or in a trusted job here, warms them"


@dataclass(frozen=True, kw_only=True)
class CheckArgs(ProofArgs):
    """Arguments of `check`."""

    only: tuple[str, ...] = ()
    strict: bool = False
    no_probe: bool = False
    on_cold: str | None = None
    metrics: str | None = None
    here: bool = False


def run(args: CheckArgs, invocation: Invocation) -> None:
    """Report warm or cold per task. Raises ColdError if anything is cold."""
    if args.metrics is None:
        _check(args, invocation)
        return
    from builder.cli import measuring  # a check without metrics need not load it

    with measuring.check(args.metrics, args, invocation):
        _check(args, invocation)


def _check(args: CheckArgs, invocation: Invocation) -> None:
    if args.here:
        _check_here(args, invocation)
        return
    wanted = args.wanted("any", strict=args.strict)
    context = invocation.context(invocation.manifest(only=args.only), wanted=wanted, probes=not args.no_probe)
    with invocation.containers(context, greet=True) as executor:
        check(executor, args.on_cold)


def check(executor: ContainerExecutor, on_cold: str | None) -> None:
    """Judge all tasks, and raise ColdError if one is cold."""
    judge(executor)
    context, image = executor.context, image_checks.variables(executor.image)
    context.report.warnings += image_checks.keep_warnings(context.manifest.tasks, image, executor.direct_root())
    gate(executor.context.console, executor.context.report, on_cold, REMEDY)


def gate(console: Console, report: Report, on_cold: str | None, remedy: str) -> None:
    """Raise ColdError if a task is cold; with on_cold ``warn`` add a warning instead, and annotate the costliest."""
    cold = [task for task in report.tasks if task.state == "cold"]
    if not cold:
        return
    error = ColdError(f"{len(cold)} of {counted(len(report.tasks), 'task')} cold; {remedy}")
    if on_cold != "warn":
        raise error
    if worst := report.worst(rank):
        console.annotate(f"{worst.label} cold", f"{worst.reason}\n{error.message}", "warning")
    report.warnings.append(error.message)


def _check_here(args: CheckArgs, invocation: Invocation) -> None:
    """Report warm or cold per task, and which families' directories the cache has for this environment."""
    from builder.cli.commands import explain  # a check of the host need not load it

    console, report = invocation.console, invocation.report
    manifest = invocation.named_manifest(only=args.only)
    local = invocation.local(manifest, wanted=args.wanted("any", strict=args.strict))
    judge(local)
    tasks = manifest.tasks if manifest else ()
    report.warnings += image_checks.keep_warnings(tasks, local.environ, local.root)
    if environment.may_mount():
        report.warnings.append(SYS_ADMIN)
    families = explain.show_here(local, everything=False)
    if manifest is not None:
        gate(console, report, args.on_cold, REMEDY_HERE)
        return
    # What belongs to one build of sglang is never required: each commit has its own.
    other = [each.family for each in families if each.state != "found" and FAMILY[each.family].shared]
    if not other:
        console.say(f"warm-cache: every family that can be compared has a directory in {local.root}")
        return
    error = ColdError(f"{', '.join(other)} of this environment: not in {local.root}; {REMEDY_HERE}")
    if args.on_cold != "warn":
        raise error
    console.annotate("cache cold", error.message, "warning")
    report.warnings.append(error.message)
