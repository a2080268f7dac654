"""What a machine runs each night: pull the image if it moved, restore, warm what is cold, publish, prune, and tidy.

Each step happens only if there is something to do. Nothing before the wait for an idle machine changes what test jobs
use: a deferred refresh leaves everything as it was. Steps add to a `RefreshRecord`, which is complete at every moment,
because the refresh may end at any.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from builder.cache import retention
from builder.cache.retention import PrunePlan
from builder.errors import (
    CANNOT_RUN,
    BudgetError,
    BuilderError,
    BusyError,
    ColdError,
    EngineLostError,
    Interrupted,
    PreflightError,
    TasksError,
    UsageError,
)
from builder.flock import holder, try_lock
from builder.host.locks import open_lock
from builder.run import cache_locks, forecast, gpu_reservation, prune, sweep, warm
from builder.run.container_executor import ContainerExecutor
from builder.run.notify import RefreshRecord, RefreshSettings
from builder.run.plan import Plan
from builder.run.prune import Limits, PruneResult
from builder.run.pull import Pulled, PullSection
from builder.run.push import Pushed
from builder.text import size


def refresh(executor: ContainerExecutor, settings: RefreshSettings, limits: Limits, record: RefreshRecord) -> None:
    """Do each step that there is something to do for. Raises what `warm` raises, DeferredError and BusyError."""
    try:
        _refresh(executor, settings, limits, record)
    finally:
        record.add_contents(executor, by_container=settings.metrics is not None)


def _refresh(executor: ContainerExecutor, settings: RefreshSettings, limits: Limits, record: RefreshRecord) -> None:
    context = executor.context
    record.limit = limits.max_size
    if not settings.may_wait:
        refuse_overlap(executor)
    executor.sweep()
    waited = False
    if has_moved(executor, record):
        waited = _wait(executor, settings, record)
        context.console.say(f"pulling {context.manifest.image.ref}")
        executor.engine.pull(context.manifest.image.ref, context.console.say)
        record.pulled, record.behind = True, False
    if settings.restore is not None:
        restore(executor, settings.restore, record)
    if not waited and not executor.remembers(context.manifest.tasks):
        waited = _wait(executor, settings, record)  # it was never used here: it is cold, and that needs no probe
    plan = executor.plan(context.manifest.tasks)
    context.report.set_tasks(plan.results())
    if plan.cold:
        if not waited:
            _wait(executor, settings, record, plan)
        make_room(executor, limits, plan, record)
        try:
            warm.warm(executor)
        except (TasksError, BudgetError):
            # What failed here keeps no other machine from what is warm.
            if settings.publish is not None:
                publish(executor, settings.publish, record, late=True)
            raise
        record.warmed = True
    if settings.publish is not None:
        publish(executor, settings.publish, record)
    tidy(executor, limits, record)
    if record.warmed or record.freed:
        sweep.sweep(executor)  # leftovers, and generations that no view uses any more


def restore(executor: ContainerExecutor, pull: Callable[[ContainerExecutor], Pulled], record: RefreshRecord) -> None:
    """Restore what another machine warmed. Whatever is wrong with it is a warning: it is compiled here then."""
    report = executor.context.report
    try:
        record.restored = pull(executor).digest
    except (UsageError, Interrupted):
        raise
    except BuilderError as error:
        if (section := report.section(PullSection)) is not None:
            section.pull.reason = error.message
        problems = [str(each) for each in getattr(error, "problems", ())]
        report.warnings.append("; ".join([f"nothing was restored: {error.message}", *problems]))


def publish(
    executor: ContainerExecutor,
    push: Callable[[ContainerExecutor], Pushed],
    record: RefreshRecord,
    *,
    late: bool = False,
) -> None:
    """Publish what is warm. late: after a failure, which a failure to publish must not hide."""
    report = executor.context.report
    tasks = report.tasks
    try:
        record.published = push(executor).digest
    except Interrupted:
        raise
    except BuilderError as error:
        if not late:
            raise
        if not isinstance(error, ColdError):
            report.warnings.append(f"what is warm was not published: {error.message}")
    finally:
        report.tasks = tasks  # as this refresh left them: a push says of each whether it is warm


def _wait(
    executor: ContainerExecutor, settings: RefreshSettings, record: RefreshRecord, plan: Plan | None = None
) -> bool:
    if settings.when_idle is None:
        return False
    record.waited = gpu_reservation.wait_until_idle(executor, settings.when_idle, plan.items[:1] if plan else ())
    return True


def refuse_overlap(executor: ContainerExecutor) -> None:
    """Raise BusyError if another builder holds the run lock now.

    Only where this process can open the lock's file; elsewhere the run lock is waited for, as `warm` does.
    """
    root = executor.context.manifest.cache.root
    if root is None or not executor.engine.local:
        return
    with contextlib.suppress(OSError):
        descriptor = open_lock(root / cache_locks.RUN, root=root)
        try:
            if not try_lock(descriptor):
                raise BusyError(
                    f"{root} is in use by {holder(descriptor)}: this refresh is skipped, and the next one warms what "
                    "is still cold. To wait instead, pass --lock-timeout"
                )
        finally:
            os.close(descriptor)


# --- the image -------------------------------------------------------------------------------------------------------


def has_moved(executor: ContainerExecutor, record: RefreshRecord) -> bool:
    """Return whether the registry has another image under this name than the engine. Pulls nothing.

    A registry that does not answer is a warning, and the image that is here is warmed.
    """
    context = executor.context
    engine, ref = executor.engine, context.manifest.image.ref
    here = engine.image(ref)
    record.image_before = here.id if here else None
    if here is not None and ("@sha256:" in ref or ref == here.id):
        return False  # a digest always names the same image
    try:
        record.digest = engine.registry_digest(ref)
    except EngineLostError as error:
        if here is None:
            return True  # the pull fails with the reason
        context.report.warnings.append(f"{error.message}; the image that is here is used")
        return False
    record.behind = here is None or not here.has_digest(record.digest)
    if here is not None and not record.behind:
        context.console.say(f"{ref} has not moved ({record.digest[:19]}…)")
        return False
    if here is None:
        context.console.say(f"{ref} is not on this engine; the registry has {record.digest[:19]}…")
    else:
        was = here.digests[0].rpartition("@")[2] if here.digests else here.id
        context.console.say(f"{ref} has moved: it was {was[:19]}… and is {record.digest[:19]}…")
    return True


# --- room ------------------------------------------------------------------------------------------------------------


def make_room(executor: ContainerExecutor, limits: Limits, plan: Plan, record: RefreshRecord) -> None:
    """Prune before the warm-up where what the cold tasks will add does not fit.

    Raises PreflightError, and removes nothing, where it would not fit after that either.
    """
    root = executor.direct_root()
    target = forecast.target_size(root, plan.cold, limits.max_size) if root is not None else None
    if root is None or target is None:
        return
    expected = forecast.expected_space(root, plan.cold)
    closer = replace(limits, max_size=target)
    if _planned(executor, closer, root, plan).after > target:
        raise PreflightError(CANNOT_RUN, list(forecast.space_problems(root, limits.max_size, expected)))
    executor.context.console.say(
        f"making room: what this warm-up will add fits if the cache has no more than {size(target)}"
    )
    _prune(executor, closer, record)


def tidy(executor: ContainerExecutor, limits: Limits, record: RefreshRecord) -> None:
    """Prune if there is anything to remove.

    For a root that this process cannot read only a container knows, and it is only started after a warm-up.
    """
    root = executor.direct_root()
    if root is None:
        if record.warmed:
            _prune(executor, limits, record)
        return
    found = _planned(executor, limits, root, executor.plan(executor.context.manifest.tasks))
    record.blocked = found.waits.seconds(found.refused)
    # What is kept waiting, and what no longer is, is recorded by a prune.
    if found.refused != found.waits.since.keys() or any(not step.stays for step in found.steps):
        _prune(executor, limits, record)


def _planned(executor: ContainerExecutor, limits: Limits, root: Path, plan: Plan) -> PrunePlan:
    wanted = prune.policy(executor, limits, plan, dry_run=True)
    return retention.plan(root, wanted, job_max=executor.context.manifest.cache.job_max, now=time.time())


def _prune(executor: ContainerExecutor, limits: Limits, record: RefreshRecord) -> None:
    result = PruneResult()
    try:
        with cache_locks.held(executor):
            prune.prune_root(executor, limits, result)
        prune.prune_images(executor, limits, result, dry_run=False)
    finally:
        record.freed += result.freed
        record.blocked = result.blocked
        prune.show(executor, result, dry_run=False)
