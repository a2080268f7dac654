"""Reports the outcome of a refresh: to the report's JSON, Prometheus' textfile collector, and a webhook.

It is reported once, however the refresh ends, and a failure to report it does not change the outcome.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builder.cache import survey
from builder.errors import BuilderError
from builder.events import Event, MetricSample
from builder.report import metrics, webhook
from builder.report.metrics import Samples
from builder.report.results import Section
from builder.run import maintenance, measure
from builder.run.container_executor import ContainerExecutor
from builder.run.context import Context
from builder.run.prebuild import PrebuildSection
from builder.run.pull import Pulled
from builder.run.push import Pushed
from builder.text import counted, printable


@dataclass(frozen=True)
class RefreshSettings:
    """How a refresh waits, and where its outcome is sent."""

    metrics: Path | None  # the file
    series: str  # label ``manifest`` of all metrics
    when_idle: float | None  # seconds to wait for an idle machine; None: do not wait
    webhook: str | None = field(repr=False)  # a URL, which may hold a secret
    may_wait: bool = False  # for another builder on the same cache
    restore: Callable[[ContainerExecutor], Pulled] | None = None  # from a cache image
    publish: Callable[[ContainerExecutor], Pushed] | None = None  # as a cache image


@dataclass
class RefreshRecord:
    """What a refresh has done so far."""

    image_before: str | None = None  # id of the engine's image at the beginning
    digest: str | None = None  # of the registry's image
    pulled: bool = False
    warmed: bool = False
    restored: str | None = None  # digest of the cache image that is restored here
    published: str | None = None  # digest of the cache image that holds what is warm here
    waited: float = 0.0  # seconds for an idle machine
    freed: int = 0  # bytes
    behind: bool | None = None  # the registry has another image than this machine; None: it was not asked
    limit: int | None = None  # bytes of the cache
    blocked: float = 0.0  # seconds for which jobs have kept removals waiting
    contents: list[tuple[str, float, dict[str, str]]] = field(default_factory=list)  # metrics of the cache: name, value

    def add_contents(self, executor: ContainerExecutor, *, by_container: bool) -> None:
        """Add metrics of what the cache holds now, unless the run is cancelled.

        by_container: start one for a root that this process cannot read.
        """
        if executor.context.cancel.is_set or not executor.has_image:
            return
        with contextlib.suppress(BuilderError, OSError):
            root = executor.direct_root()
            if root is not None:
                self.contents = list(survey.samples(root))
            elif by_container:
                maintenance.run(executor, "survey", self._on_event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, MetricSample) and event.metric in metrics.CONTENTS:
            labels = {label: printable(text) for label, text in event.labels.items()}
            self.contents.append((event.metric, event.value, labels))


@dataclass
class RefreshSection(Section):
    """What a refresh did."""

    refresh: RefreshRecord

    def to_json(self) -> Mapping[str, object]:
        record = self.refresh
        return {
            "refresh": {
                "image_before": record.image_before,
                "registry_digest": record.digest,
                "pulled": record.pulled,
                "restored": record.restored,
                "published": record.published,
                "waited_seconds": round(record.waited, 3),
                "freed": record.freed,
                "prune_blocked_seconds": round(record.blocked, 3),
            }
        }


@contextlib.contextmanager
def notified(context: Context, settings: RefreshSettings) -> Iterator[RefreshRecord]:
    """Write the metrics and post the webhook when the block ends, however it ends."""
    record, began = RefreshRecord(), time.monotonic()
    error: BaseException | None = None
    try:
        yield record
    except BaseException as raised:
        error = raised
        raise
    finally:
        with context.cancel.shield():
            status = measure.exit_status(context.cancel, error)
            context.report.add(RefreshSection(record))
            seconds = time.monotonic() - began
            if settings.metrics is not None:
                add = functools.partial(_add, context, record, status, seconds)
                measure.write(context.report, context.cancel, "refresh", settings.metrics, settings.series, add)
            if settings.webhook is not None:
                document = summary(context, record, status, seconds, error)
                failure = webhook.post(settings.webhook, document, give_up=context.cancel.left_too_late)
                if failure:
                    context.report.warnings.append(f"the webhook was not delivered: {failure}")


def _add(context: Context, record: RefreshRecord, status: int, seconds: float, samples: Samples) -> None:
    """Add the metrics of a refresh."""
    report, now = context.report, time.time()
    samples.add("refresh_last_run_timestamp_seconds", now)
    if status == 0:
        samples.add(metrics.SUCCESS, now)
    samples.add("refresh_duration_seconds", seconds)
    samples.add("refresh_exit_code", status)
    for state in metrics.STATES:
        samples.add("refresh_tasks", report.count(state), state=state)
    gpus = {task.label: task.gpus for task in context.manifest.tasks}
    for task in report.tasks:
        samples.add("refresh_task_state", 1, task=task.label, state=task.state)
        if task.seconds is not None:
            samples.add("refresh_task_seconds", task.seconds, task=task.label)
    ran = [(task.seconds, gpus.get(task.label, 0)) for task in report.tasks if task.seconds is not None]
    samples.add("refresh_gpu_seconds", sum(took * number for took, number in ran))
    samples.add("refresh_lock_wait_seconds", report.lock_wait)
    samples.add("refresh_idle_wait_seconds", record.waited)
    stage = report.section(PrebuildSection)
    if stage is not None and stage.prebuild.gpu_kernels is not None:
        samples.add("refresh_prebuild_missed_kernels", stage.prebuild.gpu_kernels)
    samples.add("refresh_pruned_bytes", record.freed)
    samples.add("refresh_prune_blocked_seconds", record.blocked)
    if report.image_id:
        labels = {"ref": report.image_ref, "id": report.image_id, "toolchain": report.toolchain or ""}
        samples.add("image_info", 1, **labels)
    measure.since(samples, metrics.BEHIND, record.behind)
    for name, value, labels in record.contents:
        samples.add(name, value, **labels)
    if record.limit is not None:
        samples.add("limit_bytes", record.limit)


def summary(
    context: Context, record: RefreshRecord, status: int, seconds: float, error: BaseException | None
) -> Mapping[str, object]:
    """Return the webhook's document. Its ``text`` is what chat services show."""
    report, manifest = context.report, context.manifest
    states = {state: report.count(state) for state in metrics.STATES if report.count(state)}
    sums = ", ".join(f"{number} {state}" for state, number in states.items()) or counted(0, "task")
    host = socket.gethostname()
    why = error.message if isinstance(error, BuilderError) else ""
    text = f"warm-cache refresh on {host}: exit {status}, {sums} ({manifest.image.ref})"
    return {
        "text": f"{text}: {why}" if why else text,
        "schema": 1,
        "verb": "refresh",
        "host": host,
        "exit": status,
        "error": why or None,
        "image": {"ref": manifest.image.ref, "id": report.image_id, "pulled": record.pulled},
        "toolchain": report.toolchain,
        "cache": report.cache,
        "tasks": states,
        "freed": record.freed,
        "seconds": round(seconds, 3),
    }
