"""Runs the agent as a child of this process, with its log, its events and its end.

Nothing of it outlives this process: the child has the other end of a pipe for its lease, so that it ends all that it
started within a second of our death, and we adopt what it might leave (a subreaper) and end that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

from builder import __version__, events, processes
from builder.cache.environment import ImageIdentity
from builder.cache.toolchain import Record, sound
from builder.engine.log_sinks import CLOSING, Display, Lines, LogFile, Tail
from builder.errors import CANNOT_RUN, PreflightError, Problem
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.job import Job, PrebuildRequest, RunOrigin
from builder.processes import describe_status
from builder.run.context import Context
from builder.run.executor import PROBE_TIMEOUT, Allocation, Ended, Execution, Watcher
from builder.run.plan import Item
from builder.task import Gpu, ServingImage, Task

#: Seconds that the program gets to end by itself after a cancellation: a cancelled CI step has 7.5 s in all.
CANCEL_GRACE = 3.0
#: Seconds for each of the last steps after a cancellation: the end of an output that another process keeps open, a
#: display or a log that takes nothing.
_LAST_OUTPUT = 0.3
#: The program, with no word in the environment of what it starts, and with nothing of this directory on its path.
_START = (
    "import runpy, sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; "
    "runpy.run_module('builder.agent', run_name='__main__')"
)
_COMMAND = [sys.executable, "-c", _START, str(Path(__file__).resolve().parents[2])]
_CHUNK = 1 << 16

#: Agents of this process that run now. Held while one starts, and while one is ended with everything below it.
_running: set[int] = set()
_starting = threading.Lock()


def serving_image(image: ImageIdentity) -> ServingImage:
    """Return what is known of this environment's image, as a job has it."""
    labels = {"ai.sglang.build.commit": image.commit} if image.commit else {}
    return ServingImage(image.id, labels, image.content)


def run_task(
    context: Context,
    root: Path,
    image: ServingImage,
    item: Item,
    allocation: Allocation,
    watcher: Watcher,
) -> Execution:
    """Run one task's program to its end, and to the end of all that it started.

    image: that this environment was made of.
    """
    began, spec, environ = time.monotonic(), context.manifest, dict(context.options.environ)
    task = item.task
    job = Job(
        mode="run",
        nonce=os.urandom(8).hex(),
        mount=str(root),
        image=image,
        task=task,
        lifetime=task.timeout + spec.run.grace + spec.run.start,
        grace=spec.run.grace,
        log_limit=spec.container.log_limit,
        workdir=str(Path.cwd()),
        secrets=tuple(name for name in spec.container.secrets if environ.get(name)),
        concurrent=allocation.concurrent,
        gpus=allocation.visible_gpus or (),
        prebuilt=item.prebuilt,
        observed=RunOrigin(socket.gethostname(), __version__, "this environment", context.run_id),
    )
    if allocation.visible_gpus is not None:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(environ, allocation.visible_gpus))
    agent = AgentProcess(job, environ, watcher, context.log_path(task.label))
    with context.cancel.shield():
        ended = agent.run(
            task=Deadline(task.timeout),
            silence=task.silence,
            budget=context.budget,
            grace=spec.run.grace,
            cancel=allocation.cancel,
        )
    context.report.warnings += [f"{task.label}: {text}" if allocation.concurrent else text for text in agent.problems]
    return Execution(
        ended=ended,
        verdict=agent.verdict,
        succeeded=agent.status == 0,
        how=f"the program ended with {describe_status(agent.status)}",
        oom=False,
        seconds=time.monotonic() - began,
        log=agent.file.path,
        tail=agent.tail.lines(),
    )


def run_prebuild(
    context: Context,
    root: Path,
    image: ServingImage,
    mode: Literal["plan", "prebuild"],
    env: Mapping[str, str],
    request: PrebuildRequest,
    seconds: float,
    on_event: Callable[[events.Event], None],
) -> str:
    """Run the program in a mode of the prebuild. Returns why it did not end well, or ""."""
    spec = context.manifest
    task = Task(label=mode, model="", recipe="command", env=dict(env), timeout=seconds)
    job = Job(
        mode=mode,
        nonce=os.urandom(8).hex(),
        mount=str(root),
        image=image,
        task=task,
        lifetime=seconds + spec.run.grace + spec.run.start,
        grace=spec.run.grace,
        log_limit=spec.container.log_limit,
        workdir=str(Path.cwd()),
        prebuild=request,
        observed=RunOrigin(socket.gethostname(), __version__, "this environment", context.run_id),
    )
    reported: list[str] = []

    def take(event: events.Event) -> None:
        if isinstance(event, events.PrebuildProblem) and event.kind == "all":
            reported.append(event.why)
        on_event(event)

    watcher = Watcher(lambda stream, line: None, take)
    agent = AgentProcess(job, context.options.environ, watcher, context.log_path(f"prebuild-{mode}"))
    with context.cancel.shield():
        ended = agent.run(
            task=Deadline(seconds),
            silence=seconds,
            budget=context.budget,
            grace=spec.run.grace,
            cancel=context.cancel,
        )
    if ended != "exited":
        return f"{mode}: it was ended for its {ended}"
    if agent.status and not reported:
        return f"{mode}: the program ended with {describe_status(agent.status)}"
    return ""


def visible_gpus(environ: Mapping[str, str], devices: Sequence[int]) -> list[str]:
    """Return names of these devices for CUDA_VISIBLE_DEVICES; they count among those that are visible here."""
    here = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [here[index] if index < len(here) else str(index) for index in devices]


def probe(environ: Mapping[str, str], root: Path, env: Mapping[str, str], simulate: Gpu | None = None) -> Record:
    """Return the toolchain record of this environment, whatever its image. Writes nothing.

    env: the task's own variables. simulate: a GPU to find in the place of the real ones.
    """
    task = Task(label="probe", model="", recipe="command", env=dict(env))
    job = Job(mode="toolchain", nonce=os.urandom(8).hex(), mount=str(root), task=task, simulate=simulate)
    lease, ours = os.pipe()
    try:
        done = subprocess.run(
            _COMMAND,
            env={**environ, **job.variable()},
            stdin=lease,
            check=False,
            capture_output=True,
            timeout=PROBE_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreflightError(f"{CANNOT_RUN}: {sys.executable}: {error}") from None
    finally:
        os.close(lease)
        os.close(ours)
    for line in done.stdout.splitlines():
        event = events.decode(line, job.nonce)
        if isinstance(event, events.ToolchainProbed) and sound(event.record):
            return event.record
    tail = done.stderr.decode("utf-8", "replace").splitlines()[-20:]
    status = describe_status(done.returncode)
    problem = Problem(sys.executable, f"the probe of this environment reported nothing: it ended with {status}.")
    raise PreflightError(CANNOT_RUN, [problem], notes=tail)


class AgentProcess:
    """The in-container program, once. Its lines go to the watcher and to a file, its events to the watcher.

    problems: what went wrong around it, one sentence each.
    """

    def __init__(self, job: Job, environ: Mapping[str, str], watcher: Watcher, log: Path) -> None:
        self._job = job
        self._environ = environ
        self._on_event = watcher.on_event
        self._prefix = events.prefix(job.nonce)
        self._display = Display(watcher.on_line)
        self._lock = threading.Lock()  # two streams, one log
        self._last_output = time.monotonic()
        self.file = LogFile(log)
        self.tail = Tail()
        self.verdict: events.Verdict | None = None
        self.status: int | None = None
        self.problems: list[str] = []

    def run(self, *, task: Deadline, silence: float, budget: Deadline, grace: float, cancel: Cancel) -> Ended:
        """Run it until it ends, or has to; return why it was ended. silence, grace: seconds."""
        process = self._start()
        pumps = [
            threading.Thread(target=self._pump, args=(stream, mark), daemon=True)
            for stream, mark in ((process.stdout, "out"), (process.stderr, "err"))
        ]
        ended: Ended = "exited"
        try:
            self.file.open()
            self._display.open()
            for pump in pumps:
                pump.start()
            while process.poll() is None:
                if cancel.wait(0.05):
                    ended = "cancelled"
                elif task.expired:
                    ended = "timeout"
                elif budget.expired:
                    ended = "budget"
                elif time.monotonic() - self._last_output > silence:
                    ended = "silence"
                else:
                    continue
                break
        finally:
            self._end(process, grace + 1, cancel)
            if cancel.is_set:
                self.file.hurry()
            for pump, stream in zip(pumps, (process.stdout, process.stderr), strict=True):
                if pump.ident is not None:
                    pump.join(_LAST_OUTPUT if cancel.is_set else 5.0)
                elif stream is not None:  # there was no room for a thread that closes it at its end
                    stream.close()
            self._display.close(_LAST_OUTPUT if cancel.is_set else 1.0)
            self.file.close(_LAST_OUTPUT if cancel.is_set else CLOSING)
        self.problems += [problem for problem in (self.file.problem, self._display.problem) if problem]
        return ended

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            with _starting:
                process = subprocess.Popen(
                    _COMMAND,
                    env={**self._environ, **self._job.variable()},
                    stdin=subprocess.PIPE,  # never written to: that our end is open is the lease
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
                _running.add(process.pid)
        except OSError as error:
            raise PreflightError(f"{CANNOT_RUN}: {sys.executable}: {error.strerror}") from None
        return process

    def _end(self, process: subprocess.Popen[bytes], grace: float, cancel: Cancel) -> None:
        """SIGTERM, after `grace` seconds SIGKILL, then SIGKILL to everything that it left.

        The first signal to this program shortens the grace to CANCEL_GRACE, the second ends it.
        """
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            limit = Deadline(grace)
            while process.poll() is None and not limit.expired and cancel.requests < 2:
                if cancel.is_set:
                    limit = limit.within(max(0.0, CANCEL_GRACE - cancel.elapsed))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
        if process.poll() is None:
            process.kill()
        self.status = process.wait()
        # A running agent adopts the orphans of its task: all our descendants outside other agents are this one's.
        with _starting:
            _running.discard(process.pid)
            if not processes.kill_descendants(leave=_running):
                self.problems.append("a process of the warm-up could not be ended")
        if process.stdin is not None:
            process.stdin.close()

    def _pump(self, stream: IO[bytes], mark: str) -> None:
        lines = Lines()
        while data := os.read(stream.fileno(), _CHUNK):
            self._last_output = time.monotonic()
            self._take(mark, lines.feed(data))
        self._take(mark, lines.last())
        stream.close()

    def _take(self, mark: str, region: bytes) -> None:
        if mark == "out" and self._prefix in region:
            region = b"".join(line for line in region.splitlines(keepends=True) if not self._is_event(line))
        if region:
            with self._lock:
                self.file.write(mark, region)
                self.tail.add(region)
            self._display.add(mark, region)

    def _is_event(self, line: bytes) -> bool:
        event = events.decode(line.rstrip(b"\n"), self._job.nonce)
        if event is None:
            return False
        if isinstance(event, events.Verdict):
            self.verdict = event
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001 - no error may stop the draining
            self.problems.append(f"showing an event failed: {type(error).__name__}: {error}")
        return True
