"""The verb `env`: mounts and variables of a test job that must hit the cache."""

from __future__ import annotations

import json
from dataclasses import dataclass

from builder.cache import families, toolchain
from builder.cli.invocation import Invocation
from builder.cli.options import ProofArgs
from builder.errors import ColdError, UsageError
from builder.report.results import Report
from builder.run import job_environment
from builder.text import counted


@dataclass(frozen=True, kw_only=True)
class EnvArgs(ProofArgs):
    """Arguments of `env`."""

    format: str | None = None
    here: bool = False
    no_probe: bool = False


def run(args: EnvArgs, invocation: Invocation) -> None:
    """Print the mounts and variables. Raises ColdError if something in that cache is cold."""
    if args.here:
        _env_here(args, invocation)
        return
    context = invocation.context(invocation.manifest(), wanted=args.wanted("any"), probes=not args.no_probe)
    with invocation.containers(context) as executor:
        form = args.format or "docker"
        invocation.report.text = job_environment.render(executor, form)
        invocation.report.docker_arguments = form == "docker"
        _refuse_cold(invocation.report)


def _env_here(args: EnvArgs, invocation: Invocation) -> None:
    """Print the variables with which a process here uses the cache; nothing if there is no cache root.

    Raises ColdError if there is none, or something in it is cold.
    """
    form = args.format or "shell"
    if form == "docker":
        raise UsageError(
            "--format docker starts a container, and --here is for processes inside one: use shell, github or json"
        )
    manifest = invocation.named_manifest()
    local = invocation.local(manifest, wanted=args.wanted("any"))
    if missing := local.missing_root():
        raise ColdError(f"{missing}: there is nothing that variables could point at")
    job_environment.judge(local)
    variables = {
        **(job_environment.common_env(manifest.tasks) if manifest else {}),
        **families.environment(str(local.root), toolchain.family_keys(local.record)),
    }
    if form == "json":
        document = {"toolchain": invocation.report.toolchain, "env": variables}
        invocation.report.text = json.dumps(document, indent=2)
    else:
        invocation.report.text = job_environment.render_variables(variables, form)
    _refuse_cold(invocation.report)


def _refuse_cold(report: Report) -> None:
    """Raise ColdError with the labels of the cold tasks, if there are any."""
    cold = [task.label for task in report.tasks if task.state == "cold"]
    if cold:
        raise ColdError(f"{len(cold)} of {counted(len(report.tasks), 'task')} cold: {', '.join(cold)}")
