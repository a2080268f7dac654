"""``python3 -m builder.agent``: reads its job from the environment and does it (`job.Mode`).

Exit status: 0 done (``run``: warmed) · 20 failed · 21 partial · 22 skipped · 2 no job · 70 the lease ended · 71 the
lifetime is over · 128 + N stopped by signal N.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder import events
from builder.agent.guard import SCRATCH, Guard, Stopped, end
from builder.agent.output import Output
from builder.cache import layout
from builder.events import FAILED
from builder.files import remove_unused
from builder.job import JOB_VARIABLE, Job
from builder.task import PRETEND_VARIABLE

if TYPE_CHECKING:
    from builder.agent.warm import Warming
    from builder.task import Task

NO_JOB = 2
#: Seconds after which a temporary directory is one of a process that was killed.
_LEFT = 24 * 3600.0

#: Modes that hold one lock: the path of its file.
LOCKS = {"lock": layout.run_lock, "views": layout.views_lock, "hold": layout.hold_lock}


def main() -> int:
    """Do the job. Returns the exit status; a bad job or machine is reported in the log, and never raised."""
    try:
        # Removed before any child starts: its nonce is what makes a line an event.
        # It is UTF-8 whatever the image's locale is.
        if not os.environ.get(PRETEND_VARIABLE):
            os.environ.pop(PRETEND_VARIABLE, None)  # emptied by the host, against an image that sets it
        job = Job.from_json(os.fsencode(os.environ.pop(JOB_VARIABLE, "")).decode("utf-8", "surrogateescape"))
    except ValueError as error:
        print(f"warm-cache: {error}", file=sys.stderr, flush=True)  # noqa: T201 - without a job there is no output yet
        return NO_JOB
    secrets = [os.environ[name] for name in job.secrets if name in os.environ]
    output = Output(job.nonce, secrets, limit=job.log_limit)
    task = job.task
    guard = Guard(job, lambda: _report_lifetime(job, output, warming))
    warming: Warming | None = None
    if task is not None and job.mode == "run":
        warming = _warming(job, task, output, guard)
    remove_unused(SCRATCH, _LEFT)
    try:
        guard.start()
        if warming is not None:
            status = warming.run()
        elif job.mode == "probe":
            status = _probe(job, output)
        elif job.mode == "toolchain":
            status = _toolchain(job, output)
        elif job.mode == "record":
            status = _record(job, output, guard)
        elif job.mode in ("plan", "prebuild"):
            status = _prebuild(job, output, guard)
        elif job.mode in LOCKS:
            status = _lock(job, output, guard)
        elif job.mode == "run":
            output.say("mode run needs a task")
            status = NO_JOB
        else:
            status = _maintain(job, output, guard)
    except Stopped as stopped:
        status = 128 + stopped.signum
    except Exception as error:  # noqa: BLE001 - a defect becomes a verdict, with its traceback in the log
        import traceback

        for line in traceback.format_exc().splitlines():
            output.say(line)
        reason = f"defect in the in-container program: {type(error).__name__}: {error}"
        output.event(events.Verdict(state="failed", reason=reason))
        status = FAILED
    output.end()
    return status


def _warming(job: Job, task: Task, output: Output, guard: Guard) -> Warming:
    from builder.agent.warm import Warming  # each mode imports what it needs: a job waits for its probe

    return Warming(job, task, output, guard)


def _probe(job: Job, output: Output) -> int:
    """Report the toolchain, prepare the root and write the memo."""
    from builder.agent import probe, simulated_gpu
    from builder.cache import memos

    root = Path(job.mount)
    env = {} if job.task is None else dict(job.task.env)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as place:
        try:
            environ = simulated_gpu.environment({**os.environ, **env}, place)
        except simulated_gpu.Impossible as why:
            output.say(str(why))
            return FAILED
        record = probe.probe(environ=environ, mount=job.mount, image=job.image)
    output.event(events.ToolchainProbed(record))
    try:
        layout.prepare(root)
        memos.write_memo(root, job.image, record, env=env)
    except (layout.LayoutError, OSError) as error:
        # The record is reported all the same; a root that cannot be written is an error of the next step.
        output.say(str(error))
        return FAILED
    return 0


def _toolchain(job: Job, output: Output) -> int:
    """Report the toolchain of this process's own environment, with its real GPUs or a simulated one. Writes nothing."""
    from builder.agent import probe

    environ = {**os.environ, **({} if job.task is None else job.task.env)}
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as place:
        if job.simulate is not None:
            from builder.agent import simulated_gpu

            try:
                environ = simulated_gpu.environment(environ, place, job.simulate)
            except simulated_gpu.Impossible as why:
                output.say(str(why))
                return FAILED
        record = probe.probe(environ=environ, mount=job.mount, image=job.image)
    output.event(events.ToolchainProbed(record))
    return 0


def _record(job: Job, output: Output, guard: Guard) -> int:
    """Record what the test files of a request launch."""
    from builder.agent import launch_recorder  # no other mode runs code of a checkout
    from builder.recording import RecordingRequest, fields_of

    try:
        request = RecordingRequest.from_json(Path(job.record).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        output.say(f"{job.record}: {error}")
        return FAILED
    launch_recorder.record(
        request, lambda file, record: output.event(events.LaunchRecorded(file.path, fields_of(record))), guard.check
    )
    return 0


def _prebuild(job: Job, output: Output, guard: Guard) -> int:
    """Name kernels, or compile named ones, without a GPU."""
    from builder.agent import prebuild

    return (prebuild.plan if job.mode == "plan" else prebuild.prebuild)(job, output, guard)


def _lock(job: Job, output: Output, guard: Guard) -> int:
    """Hold a lock of the root until the end. The hold is shared, and needs an existing root: a job makes none."""
    root, exclusive = Path(job.mount), job.mode != "hold"
    try:
        if exclusive:
            layout.prepare(root)
        path = LOCKS[job.mode](root)
        output.event(events.Phase(f"waiting for the {path.stem} lock"))
        guard.acquire(path, exclusive=exclusive)
    except (layout.LayoutError, OSError) as error:
        output.say(str(error))
        return FAILED
    output.event(events.Locked(str(path.relative_to(job.mount))))
    hold = threading.Event()
    while True:
        hold.wait(0.1)
        guard.check()


def _maintain(job: Job, output: Output, guard: Guard) -> int:
    """Run a mode for a whole cache root."""
    from builder.agent import cache_image, maintenance, prune, views

    modes = {
        "sweep": maintenance.sweep,
        "verify": maintenance.verify,
        "prune": prune.prune,
        "status": maintenance.status,
        "families": maintenance.families,
        "survey": maintenance.survey,
        "pack": cache_image.pack,
        "restore": cache_image.restore,
        **views.MODES,
    }
    try:
        return modes[job.mode](job, output, guard)
    except (layout.LayoutError, OSError) as error:
        output.say(str(error))
        return FAILED


def _report_lifetime(job: Job, output: Output, warming: Warming | None) -> None:
    reason = f"the container's lifetime of {job.lifetime:.0f} s is over"
    output.say(reason)
    if warming is not None:
        output.event(replace(warming.verdict, state="failed", reason=reason))
    output.end()


if __name__ == "__main__":
    # No interpreter teardown: threads that wait for a lease never return, and everything is written by now.
    end(main())
