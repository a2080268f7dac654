"""The verb `pull`: restore a cache image."""

from __future__ import annotations

import contextlib
import random
import signal
from dataclasses import dataclass, replace
from typing import Any

from builder.cli import measuring, registry
from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs, RegistryArgs
from builder.errors import BuilderError, Interrupted, Problem, UsageError
from builder.host.cancel import LimitedCancel
from builder.host.deadlines import Deadline
from builder.manifest.load import Manifest, without_tasks
from builder.manifest.values import a_string, positive_seconds, seconds
from builder.registry.reference import Reference, parse
from builder.run import pull
from builder.run.context import Context
from builder.run.image_places import ContainerPlace, ImagePlace, LocalPlace, late
from builder.run.pull import Pulled, PullSection, PullSettings


@dataclass(frozen=True, kw_only=True)
class PullArgs(ManifestArgs, RegistryArgs):
    """Arguments of `pull`."""

    ref: str
    key: str | None = None
    stream: str | None = None
    fallback: str | None = None
    fail_open: bool = False
    deadline: str | None = None
    jitter: str | None = None
    create: bool = False
    metrics: str | None = None
    lock_timeout: str | None = None
    here: bool = False


@dataclass(frozen=True)
class _Times:
    """Limits in seconds. deadline: None for none."""

    deadline: float | None
    jitter: float


def run(args: PullArgs, invocation: Invocation) -> None:
    """Restore. With --fail-open every error but one of usage, and a signal, becomes a reason in the report."""
    reference, (settings, times) = parse(args.ref), _settings(args)
    manifest = _manifest(args, invocation)
    measured = measuring.pull(args.metrics, args, invocation)
    with invocation.signals.handled():
        if times.jitter and invocation.cancel.wait(random.uniform(0, times.jitter)):  # noqa: S311 - no secret
            invocation.cancel.check()
        try:
            with measured:
                _pull(args, invocation, reference, manifest, settings, times)
        except (UsageError, Interrupted):
            raise
        except BuilderError as error:
            if not args.fail_open:
                raise
            report = invocation.report
            section = report.section(PullSection) or PullSection(Pulled(reference.name))
            section.pull.reason = error.message
            report.add(section)
            problems = [str(each) for each in getattr(error, "problems", ())]
            report.warnings.append("; ".join([f"nothing was restored: {error.message}", *problems]))


def _manifest(args: PullArgs, invocation: Invocation) -> Manifest:
    """Return the manifest; with --here, none is needed."""
    if args.here:
        return invocation.named_manifest(lock_timeout=args.lock_timeout) or without_tasks()
    return invocation.manifest(lock_timeout=args.lock_timeout)


def _pull(
    args: PullArgs,
    invocation: Invocation,
    reference: Reference,
    manifest: Manifest,
    settings: PullSettings,
    times: _Times,
) -> None:
    limit = Deadline(times.deadline)
    with contextlib.ExitStack() as stack:
        cancel = invocation.cancel
        if times.deadline is not None:
            cancel = stack.enter_context(LimitedCancel(invocation.cancel, times.deadline))

        def limited(context: Context) -> Context:
            return replace(context, cancel=cancel)

        try:
            place: ImagePlace
            if args.here:
                local = invocation.local(manifest if args.names_manifest else None, create=args.create)
                local.context = limited(local.context)
                place = LocalPlace(local, args.image)
            else:
                context = limited(invocation.context(manifest, creates=True, create=args.create))
                executor = stack.enter_context(invocation.connected(context))
                executor.require_root()
                executor.sweep()
                place = ContainerPlace(executor)
            client = stack.enter_context(registry.client(args, invocation, reference, deadline=limit))
            pull.pull(place, client, settings, limit)
        except Interrupted as stopped:
            if stopped.signum != signal.SIGALRM or invocation.cancel.is_set:
                raise
            raise late() from None


def _settings(args: PullArgs) -> tuple[PullSettings, _Times]:
    problems: list[Problem] = []
    fallback = args.converted("fallback", args.fallback, _count, 0, problems)
    times = _Times(
        args.converted("deadline", args.deadline, positive_seconds, None, problems),
        args.converted("jitter", args.jitter, seconds, 0.0, problems) or 0.0,
    )
    if problems:
        raise UsageError("options cannot be used as they are", problems)
    trust = registry.trust(args, args.key, args.stream)
    keys, stream = (trust.keys, trust.stream) if trust else ((), None)
    return PullSettings(keys, stream, fallback), times


def _count(value: Any) -> int:
    text = a_string(value).strip()
    if not text.isascii() or not text.isdigit() or int(text) > 100:
        raise ValueError(f"a number of at most 100 is wanted, found {text!r}")
    return int(text)
