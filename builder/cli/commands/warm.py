"""The verb `warm`: compile what is cold, in containers, or with --here in this environment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from builder.cli.invocation import Invocation
from builder.cli.options import ProofArgs
from builder.errors import UsageError
from builder.host import gpus
from builder.run import prebuild, warm
from builder.task import GPUS


@dataclass(frozen=True, kw_only=True)
class WarmArgs(ProofArgs):
    """Arguments of `warm`."""

    only: tuple[str, ...] = ()
    strict: bool = False
    force: bool = False
    create: bool = False
    allow_busy: bool = False
    budget: str | None = None
    timeout: str | None = None
    silence: str | None = None
    lock_timeout: str | None = None
    pull: bool = False
    log_dir: str | None = None
    prebuild_only: bool = False
    dry_run: bool = False
    here: bool = False


def run(args: WarmArgs, invocation: Invocation) -> None:
    """Make every task of the manifest warm. Raises what prevented it; the report is complete either way."""
    if args.dry_run and args.prebuild_only:
        raise UsageError(f"{args.location('dry-run')} shows the plan of the tasks, and --prebuild-only runs none")
    manifest = invocation.manifest(
        only=args.only,
        budget=args.budget,
        timeout=args.timeout,
        silence=args.silence,
        lock_timeout=args.lock_timeout,
    )
    if args.here:
        local = invocation.local(
            manifest,
            force=args.force,
            wanted=args.wanted("same", strict=args.strict),
            create=args.create,
            log_dir=args.log_dir,
            prebuild_only=args.prebuild_only,
        )
        with invocation.signals.handled():
            if args.dry_run:
                warm.show_plan(local)
                return
            if args.prebuild_only and not local.record["gpus"]:
                local.simulate = GPUS[prebuild.simulated_name(manifest)]
                local.forget_records()
            warm.warm(local)
        return
    context = invocation.context(
        manifest,
        log_dir=args.log_dir,
        pull=args.pull,
        force=args.force,
        wanted=args.wanted("same", strict=args.strict),
        allow_busy=args.allow_busy,
        prebuild_only=args.prebuild_only,
        creates=not args.dry_run,
        create=args.create and not args.dry_run,
    )
    if args.log_dir and not args.dry_run:
        context.log_directory()  # a wrong one is noticed also where nothing is cold
    with invocation.containers(context, greet=True) as executor:
        if args.prebuild_only and manifest.gpus.count and executor.engine.local and not gpus.host_gpus():
            executor.context = replace(context, manifest=prebuild.on_simulated_gpu(manifest))
        executor.require_root()
        (warm.show_plan if args.dry_run else warm.warm)(executor)
