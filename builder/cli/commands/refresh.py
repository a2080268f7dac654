"""The verb `refresh`: what a machine runs each night."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder.cli import registry
from builder.cli.commands import prune
from builder.cli.invocation import Invocation
from builder.cli.options import PolicyArgs, ProofArgs, RegistryArgs
from builder.cli.parser import SWITCHES
from builder.errors import Problem, UsageError
from builder.manifest import policy
from builder.manifest.load import Manifest
from builder.manifest.values import a_string, seconds
from builder.registry.reference import Reference, parse
from builder.report.webhook import checked
from builder.run import notify, pull, push, refresh
from builder.run.container_executor import ContainerExecutor
from builder.run.image_places import ContainerPlace
from builder.run.notify import RefreshSettings
from builder.run.pull import Pulled, PullSettings
from builder.run.push import Pushed, PushSettings


@dataclass(frozen=True, kw_only=True)
class RefreshArgs(PolicyArgs, ProofArgs, RegistryArgs):
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
    push: str | None = None
    pull: str | None = None
    key: str | None = None
    stream: str | None = None


def run(args: RefreshArgs, invocation: Invocation) -> None:
    """Refresh the cache, and report the outcome to metrics and webhook whatever it is.

    Raises what `warm` raises, DeferredError where the machine was never idle, and BusyError at once where another
    builder has the cache.
    """
    manifest = invocation.manifest(
        budget=args.budget, timeout=args.timeout, silence=args.silence, lock_timeout=args.lock_timeout
    )
    settings = _settings(args, invocation, manifest)
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


def _settings(args: RefreshArgs, invocation: Invocation, manifest: Manifest) -> RefreshSettings:
    problems: list[Problem] = []
    found = RefreshSettings(
        metrics=args.converted("metrics", args.metrics, _path, manifest.refresh.metrics, problems),
        # One manifest is one series of metrics, from whichever directory it is named.
        series=os.path.abspath(args.manifest) if args.manifest else manifest.path,
        when_idle=args.converted("when-idle", args.when_idle, seconds, manifest.refresh.when_idle, problems),
        webhook=checked(args.webhook, args.location("webhook")),
        may_wait=args.lock_timeout is not None,
        restore=_restore(args, invocation),
        publish=_publish(args, invocation),
    )
    if args.metrics is not None and found.metrics is not None:
        refused = policy.refused_metrics(found.metrics, args.location("metrics"))
        problems += [refused] if refused else []
    if problems:
        raise UsageError("options cannot be used as they are", problems)
    return found


def _restore(args: RefreshArgs, invocation: Invocation) -> Callable[[ContainerExecutor], Pulled] | None:
    """Return what restores the image of --pull. Raises UsageError for what is wrong with its name or its keys."""
    # WARM_CACHE_PULL=1 is for `warm`, where it pulls the serving image first: it names no cache image.
    if args.pull is None or ("pull" in args.sources and args.pull.lower() in SWITCHES):
        if args.key or args.stream:
            raise UsageError(
                f"{args.location('key' if args.key else 'stream')} is for what --pull restores: pass it too"
            )
        return None
    reference = parse(args.pull, args.location("pull"))
    trust = registry.trust(args, args.key, args.stream)
    settings = PullSettings(trust.keys, trust.stream) if trust else PullSettings()

    def restore(executor: ContainerExecutor) -> Pulled:
        limit = executor.context.budget
        with registry.client(args, invocation, reference, deadline=limit) as client:
            return pull.pull(ContainerPlace(executor), client, settings, limit)

    return restore


def _publish(args: RefreshArgs, invocation: Invocation) -> Callable[[ContainerExecutor], Pushed] | None:
    """Return what publishes as the image of --push. Raises UsageError for a name that none can have."""
    if args.push is None:
        return None
    reference = parse(args.push, args.location("push"))
    if reference.digest:
        raise UsageError(f"{args.location('push')} {reference}: a push makes a digest of its own; name the repository")
    settings = PushSettings(reference.tag)
    repository = Reference(reference.host, reference.repository)

    def publish(executor: ContainerExecutor) -> Pushed:
        with registry.client(args, invocation, repository) as client:
            return push.push(ContainerPlace(executor), client, settings)

    return publish


def _path(value: object) -> Path:
    return Path(os.path.abspath(a_string(value)))
