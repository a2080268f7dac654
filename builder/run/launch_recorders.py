"""Where the launch recorder runs: in a confined container of the serving image, or in a child of this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from builder import processes
from builder.errors import PreflightError, UsageError
from builder.events import Event
from builder.host import temporary
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.job import Job
from builder.recording import RecordingRequest
from builder.run.launch_records import child_environment, total_seconds
from builder.task import Task

if TYPE_CHECKING:
    from builder.run.container_executor import ContainerExecutor

#: Where a container finds the checkout and the request.
_CHECKOUT, _REQUEST = "/checkout", "/warm-cache-request.json"
_GRACE = 2.0
_LABEL = "import-tests"


@dataclass(frozen=True)
class InContainer:
    """Runs requests in containers of the serving image. Raises PreflightError, EngineLostError, Interrupted."""

    executor: ContainerExecutor

    def __call__(self, request: RecordingRequest, on_event: Callable[[Event], None]) -> str:
        from builder.engine.api import Mount
        from builder.engine.container import Deadlines
        from builder.run import container_job

        executor, context = self.executor, self.executor.context
        if not executor.engine.local:
            raise UsageError("the engine is on another machine, and the checkout on this one; pass --here")
        if executor.image is None:
            ref = context.manifest.image.ref
            raise PreflightError(f"{ref} is not on this engine; pull it first, or pass --pull")
        limits = Deadlines(
            task=total_seconds(request),
            silence=2 * request.seconds_per_file + 30.0,
            start=context.manifest.run.start,
            grace=_GRACE,
        )
        with temporary.directory("request") as folder:
            folder.chmod(0o755)
            path = folder / "request.json"
            path.write_text(replace(request, checkout=_CHECKOUT).to_json(), encoding="utf-8")
            path.chmod(0o644)
            mounts = (
                Mount(source=request.checkout, target=_CHECKOUT, read_only=True),
                Mount(source=str(path), target=_REQUEST, read_only=True),
            )
            task = Task(label=_LABEL, model="", recipe="command")
            extra = container_job.ContainerRequest(record=_REQUEST, mounts=mounts, on_event=on_event)
            outcome = container_job.run(executor, "record", task, limits, extra)
        context.cancel.check()
        if outcome.ended == "exited" and outcome.exit_code == 0:
            return ""
        last = f": {outcome.tail[-1]}" if outcome.tail else ""
        return f"the container {container_job.describe(outcome)}{last}"


@dataclass(frozen=True)
class InChild:
    """Runs requests in a process of this environment, for refs that are trusted. Raises PreflightError, Interrupted."""

    environ: Mapping[str, str]
    cancel: Cancel

    def __call__(self, request: RecordingRequest, on_event: Callable[[Event], None]) -> str:
        from builder.run.executor import Watcher
        from builder.run.local_job import AgentProcess

        processes.become_subreaper()
        with temporary.directory("request") as folder:
            path = folder / "request.json"
            path.write_text(request.to_json(), encoding="utf-8")
            lifetime = total_seconds(request)
            job = Job(
                mode="record",
                nonce=os.urandom(8).hex(),
                mount=str(folder),
                lifetime=lifetime + 30.0,
                grace=_GRACE,
                record=str(path),
            )
            environ = child_environment(self.environ)
            watcher = Watcher(lambda _stream, _line: None, on_event)
            program = AgentProcess(job, environ, watcher, folder / "log")
            with self.cancel.shield():
                ended = program.run(
                    task=Deadline(lifetime),
                    silence=2 * request.seconds_per_file + 30.0,
                    budget=Deadline(None),
                    grace=_GRACE,
                    cancel=self.cancel,
                )
            self.cancel.check()
            tail = program.tail.lines()
        if ended == "exited" and program.status == 0:
            return ""
        how = "took too long" if ended in ("start", "timeout", "silence") else f"ended with status {program.status}"
        last = f": {tail[-1]}" if tail else ""
        return f"the recorder ({sys.executable}) {how}{last}"
