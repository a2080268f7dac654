"""The metrics of verbs that write them besides `refresh`: which file, and what is in it."""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.errors import UsageError
from builder.manifest import policy
from builder.report import metrics
from builder.report.metrics import Samples
from builder.report.overview import Overview, by_family
from builder.report.results import Report
from builder.run import measure
from builder.run.pull import Pulled, PullSection


def check(path: str, args: ManifestArgs, invocation: Invocation) -> AbstractContextManager[None]:
    """Write the metrics of a check when the context ends. Raises UsageError where the host's policy refuses it."""
    report = invocation.report
    add = functools.partial(_add_check, report)
    return measure.measured(report, invocation.cancel, "check", _allowed(path, args), _series(args), add)


def pull(path: str | None, args: ManifestArgs, invocation: Invocation) -> AbstractContextManager[None]:
    """Write the metrics of a pull when the context ends, if a file is named. Raises as `check` does."""
    report = invocation.report
    add = functools.partial(_add_pull, report, time.monotonic())
    file = _allowed(path, args) if path else None
    return measure.measured(report, invocation.cancel, "pull", file, _series(args), add)


def report(path: str, found: Overview, invocation: Invocation) -> None:
    """Write what jobs compiled."""
    add = functools.partial(_add_report, found)
    measure.write(invocation.report, invocation.cancel, "report", Path(path).absolute(), "", add)


def _series(args: ManifestArgs) -> str:
    return os.path.abspath(args.manifest) if args.manifest else args.profile or ""


def _allowed(path: str, args: ManifestArgs) -> Path:
    found = Path(os.path.abspath(path))
    if refused := policy.refused_metrics(found, args.location("metrics")):
        raise UsageError(str(refused), [refused])
    return found


def _add_check(report: Report, samples: Samples, status: int) -> None:
    samples.add("check_last_run_timestamp_seconds", time.time())
    samples.add("check_exit_code", status)
    for state in metrics.STATES:
        samples.add("check_tasks", report.count(state), state=state)
    builds = {"same": 0, "other": 0}
    for task in report.tasks:
        if task.state == "warm" and task.proven_by is not None:
            builds[task.proven_by.build] += 1
            samples.add("check_proof_age_seconds", task.proven_by.age, task=task.label)
    for build, number in builds.items():
        samples.add("check_tasks_by_build", number, build=build)


def _add_pull(report: Report, began: float, samples: Samples, status: int) -> None:
    section = report.section(PullSection)
    pulled = section.pull if section else Pulled("")
    now = time.time()
    samples.add("pull_last_run_timestamp_seconds", now)
    if pulled.done:
        samples.add(metrics.PULL_SUCCESS, now)
    samples.add("pull_exit_code", status)
    samples.add("pull_duration_seconds", time.monotonic() - began)
    samples.add("pull_fetched_bytes", pulled.fetched)
    samples.add("pull_restored_families", len(pulled.families))
    for factor, number in sorted(Counter(each.factor for each in pulled.unfit).items()):
        samples.add("pull_unfit_families", number, factor=factor)
    if pulled.digest:
        samples.add("pull_image_info", 1, reference=pulled.reference, digest=pulled.digest, tag=pulled.tag or "")
    measure.since(samples, metrics.PULL_BEHIND, not pulled.done if pulled.digest else None)
    samples.add(metrics.REFUSALS, samples.before(metrics.REFUSALS) + pulled.signature_refusals)


def _add_report(found: Overview, samples: Samples) -> None:
    samples.add("jobs_last_read_timestamp_seconds", time.time())
    samples.add("jobs_audits", found.audits)
    for (family, build), (kernels, seconds) in sorted(by_family(found.jobs).items()):
        samples.add("jobs_compiled_kernels", kernels, family=family, build=build)
        samples.add("jobs_compiled_seconds", seconds, family=family, build=build)
