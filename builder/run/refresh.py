"""The verb `refresh`: what a machine does each night. Looks whether the image has moved, pulls it, warms what is cold
beside what is in use, removes what the policy lets go, and tells the outcome.

Each step happens only where there is something to do. Nothing before the wait for an idle machine changes what test
jobs meet: a refresh that never gets its turn leaves everything as it was. What an outcome is told by (`Tale`) is
complete at every moment, because the end may come at any.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from builder.cache import retention
from builder.cache.retention import PrunePlan
from builder.errors import CANNOT_RUN, BusyError, EngineLostError, PreflightError
from builder.flock import holder, try_lock
from builder.host.locks import open_lock
from builder.run import cache_locks, forecast, gpu_reservation, prune, upkeep, warm
from builder.run.container_executor import ContainerExecutor
from builder.run.notify import Settings, Tale
from builder.run.plan import Plan
from builder.run.prune import Limits
from builder.text import size


def refresh(executor: ContainerExecutor, settings: Settings, limits: Limits, story: Tale) -> None:
    """Do each step that there is something to do for. Raises what `warm` raises, DeferredError and BusyError."""
    try:
        _refresh(executor, settings, limits, story)
    finally:
        story.look(executor, by_container=settings.metrics is not None)


def _refresh(executor: ContainerExecutor, settings: Settings, limits: Limits, story: Tale) -> None:
    context = executor.context
    if not settings.may_wait:
        refuse_overlap(executor)
    executor.sweep()
    waited = False
    if has_moved(executor, story):
        waited = _wait(executor, settings, story)
        context.console.say(f"pulling {context.manifest.image.ref}")
        executor.engine.pull(context.manifest.image.ref, context.console.say)
        story.pulled = True
    if not waited and not executor.remembers(context.manifest.tasks):
        waited = _wait(executor, settings, story)  # it was never used here: it is cold, and that needs no probe
    plan = executor.plan(context.manifest.tasks)
    context.report.set_tasks(plan.results())
    if plan.cold:
        if not waited:
            _wait(executor, settings, story, plan)
        make_room(executor, limits, plan, story)
        warm.warm(executor)
        story.warmed = True
    tidy(executor, limits, story)
    if story.warmed or story.freed:
        upkeep.sweep(executor)  # leftovers, and generations that no view uses any more


def _wait(executor: ContainerExecutor, settings: Settings, story: Tale, plan: Plan | None = None) -> bool:
    if settings.when_idle is None:
        return False
    story.waited = gpu_reservation.wait_until_idle(executor, settings.when_idle, plan.items[:1] if plan else ())
    return True


def refuse_overlap(executor: ContainerExecutor) -> None:
    """Two refreshes at once are one too many: the second says so at once, unless it was told to wait.

    Only where the lock's file can be seen from here; elsewhere the run lock itself is waited for, as `warm` does.
    """
    root = executor.context.manifest.cache.root
    if root is None or not executor.engine.local:
        return
    with contextlib.suppress(OSError):
        descriptor = open_lock(root / cache_locks.RUN)
        try:
            if not try_lock(descriptor):
                raise BusyError(
                    f"{root} is in use by {holder(descriptor)}: this refresh is left out. What that one does not warm "
                    "the next refresh will, or wait for it with --lock-timeout"
                )
        finally:
            os.close(descriptor)


# --- the image -------------------------------------------------------------------------------------------------------


def has_moved(executor: ContainerExecutor, story: Tale) -> bool:
    """Whether the registry has another image under this name than the engine has. Nothing is pulled to find out.

    A registry that does not answer is no reason not to warm what is here; that is a warning.
    """
    context = executor.context
    engine, ref = executor.engine, context.manifest.image.ref
    here = engine.image(ref)
    story.before = here.id if here else None
    if here is not None and ("@sha256:" in ref or ref == here.id):
        return False  # its name is its content
    try:
        story.digest = engine.registry_digest(ref)
    except EngineLostError as error:
        if here is None:
            return True  # the pull says why, in the engine's words
        context.report.warnings.append(f"{error.message}; the image that is here is used")
        return False
    if here is not None and here.has_digest(story.digest):
        context.console.say(f"{ref} has not moved ({story.digest[:19]}…)")
        return False
    if here is None:
        context.console.say(f"{ref} is not on this engine; the registry has {story.digest[:19]}…")
    else:
        was = here.digests[0].rpartition("@")[2] if here.digests else here.id
        context.console.say(f"{ref} has moved: it was {was[:19]}… and is {story.digest[:19]}…")
    return True


# --- room ------------------------------------------------------------------------------------------------------------


def make_room(executor: ContainerExecutor, limits: Limits, plan: Plan, story: Tale) -> None:
    """Where what the cold tasks will add does not fit, older toolchains go before it, and not after. Raises
    PreflightError, and lets nothing go, where that would not do either.
    """
    root = executor.cache.direct()
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
    _prune(executor, closer, story)


def tidy(executor: ContainerExecutor, limits: Limits, story: Tale) -> None:
    """What the policy lets go, where anything does. Of a root that cannot be read from here only a container can tell,
    and it is asked after something was warmed.
    """
    root = executor.cache.direct()
    if root is None:
        if story.warmed:
            _prune(executor, limits, story)
        return
    found = _planned(executor, limits, root, executor.plan(executor.context.manifest.tasks))
    if any(not step.stays for step in found.steps):
        _prune(executor, limits, story)


def _planned(executor: ContainerExecutor, limits: Limits, root: Path, plan: Plan) -> PrunePlan:
    wanted = prune.policy(executor, limits, plan, dry_run=True)
    return retention.plan(root, wanted, job_max=executor.context.manifest.cache.job_max, now=time.time())


def _prune(executor: ContainerExecutor, limits: Limits, story: Tale) -> None:
    outcome = prune.Outcome()
    try:
        with cache_locks.held(executor):
            prune.carry_out(executor, limits, outcome)
        prune.prune_images(executor, limits, outcome, dry_run=False)
    finally:
        story.freed += outcome.freed
        prune.tell(executor, outcome, dry_run=False)
