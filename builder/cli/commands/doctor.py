"""The verb `doctor`: everything that prevents this machine from running the manifest, and what may spoil a run."""

from __future__ import annotations

import time
from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.errors import CANNOT_RUN, PreflightError
from builder.host import gpus
from builder.report.results import Section
from builder.run import preflight
from builder.run.container_executor import ContainerExecutor
from builder.run.diagnostics import WARN, CheckResult, Facts, examine
from builder.run.plan import probe_env
from builder.text import counted

#: SGR code of a warning's state in the table.
_STYLES = {WARN: "33"}


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(ManifestArgs):
    """Arguments of `doctor`."""

    allow_busy: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckRow(CheckResult):
    """One check by its name."""

    check: str


@dataclass
class Checks(Section):
    """All checks."""

    checks: list[CheckRow]


def run(args: DoctorArgs, invocation: Invocation) -> None:
    """Report every check. Raises PreflightError with every problem that prevents a run."""
    with invocation.containers(invocation.context(invocation.manifest(), allow_busy=args.allow_busy)) as executor:
        _doctor(executor)


def _doctor(executor: ContainerExecutor) -> None:
    """Report every check, and probe the GPUs in a container if nothing prevents that."""
    context, engine = executor.context, executor.engine
    manifest, console = context.manifest, context.console
    facts = Facts(
        manifest,
        engine.info,
        engine.local,
        gpus.host_gpus() if engine.local else None,
        time.time(),
        image=executor.image,
        powerful=engine.powerful_users([str(manifest.cache.root or manifest.cache.volume)]),
    )
    results = examine(facts)
    context.report.add(Checks([CheckRow(check=name, **vars(result)) for name, result in results.items()]))
    console.table(
        ("check", "state", "finding"),
        [[name, result.state, f"{result.text}. {result.remedy}".rstrip()] for name, result in results.items()],
        styles=_STYLES,
    )
    problems = [*preflight.problems(manifest, engine), *executor.busy()]
    if problems:
        raise PreflightError(CANNOT_RUN, problems)
    executor.probe(probe_env(manifest.tasks[0]))
    executor.require_shared_root()
    warnings = sum(result.state == WARN for result in results.values())
    console.say(
        f"this machine can run {counted(len(manifest.tasks), 'task')} of {manifest.image.ref}"
        + (f"; {counted(warnings, 'warning')} above" if warnings else "")
    )
