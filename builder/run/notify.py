"""What a refresh tells, and to whom: the report's JSON, Prometheus' textfile collector, a webhook.

It is told on every way out, once, and nothing about the telling changes the outcome.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.cache import survey
from builder.errors import BuilderError, DefectError, Interrupted
from builder.events import Event, MetricSample
from builder.report import metrics, webhook
from builder.run import maintenance
from builder.run.container_executor import ContainerExecutor
from builder.run.context import Context
from builder.text import counted, printable


@dataclass(frozen=True)
class Settings:
    """How a refresh waits, and where its outcome is sent."""

    metrics: Path | None  # the file
    series: str  # label ``manifest`` of all metrics
    when_idle: float | None  # seconds to wait for an idle machine; None: do not wait
    webhook: str | None = field(repr=False)  # a URL, which may hold a secret
    may_wait: bool = False  # for another builder on the same cache


@dataclass
class Tale:
    """What there is to tell so far. before: id of the image at the beginning. digest: what the registry has. waited:
    seconds for an idle machine. freed: bytes. held: samples of what lies in the cache.
    """

    before: str | None = None
    digest: str | None = None
    pulled: bool = False
    warmed: bool = False
    waited: float = 0.0
    freed: int = 0
    held: list[tuple[str, float, dict[str, str]]] = field(default_factory=list)

    def look(self, executor: ContainerExecutor, *, by_container: bool) -> None:
        """At what the cache holds now; not when somebody wants an end. by_container: one counts what cannot be
        seen from here.
        """
        if executor.context.cancel.is_set or not executor.has_image:
            return
        with contextlib.suppress(BuilderError, OSError):
            root = executor.cache.direct()
            if root is not None:
                self.held = list(survey.samples(root))
            elif by_container:
                maintenance.run(executor, "survey", self._hear)

    def _hear(self, event: Event) -> None:
        if isinstance(event, MetricSample) and event.metric in metrics.CONTENTS:
            labels = {label: printable(text) for label, text in event.labels.items()}
            self.held.append((event.metric, event.value, labels))


@contextlib.contextmanager
def notified(context: Context, settings: Settings) -> Iterator[Tale]:
    """Write the metrics and post the webhook when the block ends, however it ends."""
    story, began = Tale(), time.monotonic()
    error: BaseException | None = None
    try:
        yield story
    except BaseException as raised:
        error = raised
        raise
    finally:
        with context.cancel.shield():
            status = _status(context, error)
            context.report.extra["refresh"] = {
                "image_before": story.before,
                "registry_digest": story.digest,
                "pulled": story.pulled,
                "waited_seconds": round(story.waited, 3),
                "freed": story.freed,
            }
            seconds = time.monotonic() - began
            if settings.metrics is not None:
                _write(context, settings, settings.metrics, story, status, seconds)
            if settings.webhook is not None:
                document = summary(context, story, status, seconds, error)
                failure = webhook.post(settings.webhook, document, hurried=context.cancel.is_set)
                if failure:
                    context.report.warnings.append(f"the webhook did not take it: {failure}")


def _status(context: Context, error: BaseException | None) -> int:
    """The exit status that the command line will make of it."""
    if context.cancel.signum is not None:
        return Interrupted(context.cancel.signum).exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(signal.SIGINT).exit_code
    if isinstance(error, BuilderError):
        return error.exit_code
    return 0 if error is None else DefectError.exit_code


def _write(context: Context, settings: Settings, path: Path, story: Tale, status: int, seconds: float) -> None:
    report, now = context.report, time.time()
    samples = metrics.Samples({"manifest": settings.series, "cache": report.cache})
    before = metrics.before(path)
    samples.keep(before, (metrics.SUCCESS, *metrics.CONTENTS))
    samples.add("refresh_last_run_timestamp_seconds", now)
    if status == 0:
        samples.add(metrics.SUCCESS, now)
    samples.add("refresh_duration_seconds", seconds)
    samples.add("refresh_exit_code", status)
    for state in metrics.STATES:
        samples.add("refresh_tasks", report.count(state), state=state)
    samples.add("refresh_pruned_bytes", story.freed)
    if report.image_id:
        labels = {"ref": report.image_ref, "id": report.image_id, "toolchain": report.toolchain or ""}
        samples.add("image_info", 1, **labels)
    for name, value, labels in story.held:
        samples.add(name, value, **labels)
    try:
        metrics.write(path, samples)
    except OSError as error:
        report.warnings.append(f"metrics could not be written to {path}: {error.strerror}")


def summary(
    context: Context, story: Tale, status: int, seconds: float, error: BaseException | None
) -> Mapping[str, Any]:
    """The webhook's document. text: the sentence that chat services show."""
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
        "image": {"ref": manifest.image.ref, "id": report.image_id, "pulled": story.pulled},
        "toolchain": report.toolchain,
        "cache": report.cache,
        "tasks": states,
        "freed": story.freed,
        "seconds": round(seconds, 3),
    }
