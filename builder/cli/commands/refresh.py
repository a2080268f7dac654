"""The verb `refresh`: what a machine runs each night."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from builder.cli.commands import prune
from builder.cli.invocation import Invocation
from builder.cli.options import PolicyArgs, ProofArgs
from builder.errors import Problem, UsageError
from builder.manifest import policy
from builder.manifest.load import Manifest
from builder.manifest.values import a_string, seconds
from builder.report.webhook import checked
from builder.run import notify, refresh
from builder.run.notify import RefreshSettings


@dataclass(frozen=True, kw_only=True)
class RefreshArgs(PolicyArgs, ProofArgs):
    """Arguments of `refresh`."""

    create: bool = False
    allow_busy: bool = False
    budget: str | None = None
    timeout: str | None = None
    silence: str | None = None
    lock_timeout: str | None = None
    log_dir: str | None = None
    when_idle: str | None = None
    metrics: str | None = None
    webhook: str | None = None


def run(args: RefreshArgs, invocation: Invocation) -> None:
    """Refresh the cache, and report the outcome to metrics and webhook whatever it is.

    Raises what `warm` raises, DeferredError where the machine was never idle, and BusyError at once where another
    builder has the cache.
    """
    manifest = invocation.manifest(
        budget=args.budget, timeout=args.timeout, silence=args.silence, lock_timeout=args.lock_timeout
    )
    settings = _settings(args, manifest)
    limits = prune.limits(args, manifest.cache)
    context = invocation.context(
        manifest,
        log_dir=args.log_dir,
        wanted=args.wanted("same"),
        allow_busy=args.allow_busy,
        creates=True,
        create=args.create,
    )
    with (
        invocation.signals.handled(),
        notify.notified(context, settings) as record,
        invocation.connected(context) as executor,
    ):
        executor.require_root()
        refresh.refresh(executor, settings, limits, record)


def _settings(args: RefreshArgs, manifest: Manifest) -> RefreshSettings:
    problems: list[Problem] = []
    found = RefreshSettings(
        metrics=args.converted("metrics", args.metrics, _path, manifest.refresh.metrics, problems),
        # One manifest is one series of metrics, from whichever directory it is named.
        series=os.path.abspath(args.manifest) if args.manifest else manifest.path,
        when_idle=args.converted("when-idle", args.when_idle, seconds, manifest.refresh.when_idle, problems),
        webhook=checked(args.webhook, args.location("webhook")),
        may_wait=args.lock_timeout is not None,
    )
    if args.metrics is not None and found.metrics is not None:
        refused = policy.refused_metrics(found.metrics, args.location("metrics"))
        problems += [refused] if refused else []
    if problems:
        raise UsageError("options cannot be used as they are", problems)
    return found


def _path(value: object) -> Path:
    return Path(os.path.abspath(a_string(value)))
