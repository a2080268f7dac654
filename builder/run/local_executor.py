"""warm --here: the in-container program as a child of this process, for jobs whose code may be trusted.

The same program, log, verdict and marker as on the host; only the container around it is the one that we are in.
Nothing of it outlives us: the child has the other end of a pipe for its lease, so that it ends all that it started
within a second of our death, and we adopt what it might leave (a subreaper) and end that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder import __version__, events, processes
from builder.cache import layout
from builder.cache.environment import IMAGE_VARIABLE
from builder.engine.log_sinks import Display, Lines, LogFile, Tail
from builder.errors import BudgetError, PreflightError, TasksError, UsageError
from builder.host.deadlines import Deadline
from builder.host.locks import LockWait, open_lock
from builder.job import JOB_VARIABLE, Job
from builder.manifest.load import Manifest
from builder.processes import describe_status
from builder.report.console import Console
from builder.report.results import TaskResult
from builder.run.call import Call
from builder.run.here import Surroundings, judged, look
from builder.run.outcome import ENDED_EARLY
from builder.run.plan import Item, Plan, result_of
from builder.text import counted, duration, printable

#: Seconds that the program gets to end by itself once somebody wants to go: a cancelled CI step has 7.5 s in all.
CANCEL_GRACE = 3.0
#: The program, without a word in the environment of what it starts, and with nothing of this directory on its path.
_START = (
    "import runpy, sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; "
    "runpy.run_module('builder.agent', run_name='__main__')"
)
_CHUNK = 1 << 16


def warm(call: Call) -> None:
    """Makes every task warm, here. Raises what keeps it from that; the report is complete either way."""
    if not call.names_a_manifest:
        call.manifest()  # says which ways there are to name one
    seen = look(call)
    run = _Run(call, seen)
    with call.signals():
        run.run()


@dataclass
class _Run:
    """One invocation. run_id: what its markers carry."""

    call: Call
    seen: Surroundings
    run_id: str = field(default_factory=lambda: os.urandom(6).hex())

    def __post_init__(self) -> None:
        self.budget = Deadline(self.manifest.run.budget)

    @property
    def manifest(self) -> Manifest:
        assert self.seen.manifest is not None
        return self.seen.manifest

    @property
    def console(self) -> Console:
        return self.call.console

    def run(self) -> None:
        plan = judged(self.call, self.seen)
        if plan is not None and not self._todo(plan):
            return
        image = self.seen.image
        if image.id is None:
            raise UsageError(
                f"which image is this? {image.how[0].upper()}{image.how[1:]}, and some caches belong to one image. "
                f"Start the container with what warm-cache env prints, which sets {IMAGE_VARIABLE}, or pass "
                "--image sha256:…"
            )
        try:
            layout.prepare(self.seen.root)
        except layout.LayoutError as error:
            raise PreflightError(f"this machine can't run it: {error}") from None
        self._may_vouch()
        self.seen = replace(self.seen, missing="")
        descriptor = open_lock(layout.run_lock(self.seen.root))
        try:
            wait = LockWait(self.manifest.run.lock_timeout, say=self.console.say, cancel=self.call.cancel)
            root = self.seen.root
            wait.acquire(descriptor, holder_action=f"works on {root}", busy=f"{root} is in use")
            # Another builder may have finished while this one waited.
            self._warm(self._todo(judged(self.call, self.seen)))
        finally:
            os.close(descriptor)
        self._conclude()

    def _may_vouch(self) -> None:
        """Raises PreflightError where nothing that this run finds out could be written down. Containers of test jobs
        get the markers read-only: what they run may add kernels, and never vouch for any.
        """
        closed = [name for name in ("markers", "images") if not os.access(self.seen.root / name, os.W_OK)]
        if closed:
            raise PreflightError(
                f"this machine can't run it: {' and '.join(closed)} in {self.seen.root} cannot be written here. A "
                "container that may vouch for kernels gets the whole root writable, not what warm-cache env prints"
            )

    def _todo(self, plan: Plan | None) -> list[Item]:
        forced = bool(self.call.said.force)
        return [item for item in plan.items if forced or not item.warm] if plan is not None else []

    def _warm(self, items: list[Item]) -> None:
        logs = self._logs()
        self.console.say(f"warm-cache  in this environment  cache {self.seen.root}  logs in {logs}")
        for item in items:
            self.console.say(f"  {item.task.label}: {item.judgement.reason or 'warm, forced'}")
        processes.become_subreaper()
        for number, item in enumerate(items, start=1):
            if self.budget.expired:
                break
            with self.console.group(f"[{number}/{len(items)}] {item.task.label}"):
                self._settle(self._task(item, logs))
            self.call.cancel.check()
        for now in plan.items if (plan := self.seen.plan(self.seen.tasks)) else ():
            result = next(each for each in self.call.report.tasks if each.label == now.task.label)
            if result.state in ("warm", "warmed") and not now.warm:
                result.state, result.verified = "failed", False
                result.reason = f"no longer warm at the end of the run: {now.judgement.reason}"

    def _logs(self) -> Path:
        chosen = self.call.said.log_dir
        try:
            if not chosen:
                return Path(tempfile.mkdtemp(prefix="warm-cache-logs-"))
            Path(chosen).mkdir(parents=True, exist_ok=True)
            return Path(chosen).absolute()
        except OSError as error:
            raise UsageError(f"logs cannot be written to {chosen or tempfile.gettempdir()}: {error.strerror}") from None

    def _task(self, item: Item, logs: Path) -> TaskResult:
        if item.config_problem:
            return result_of(item, "skipped", item.config_problem)
        began = time.monotonic()
        log = logs / f"{item.task.label}.log"
        program = Program(self._job(item), self.call.environ, self.console.log, self._tell, log)
        with self.call.cancel.shield():
            ended = program.run(
                task=Deadline(item.task.timeout),
                silence=item.task.silence,
                budget=self.budget,
                grace=self.manifest.run.grace,
                wait=self.call.cancel.wait,
            )
        self.call.report.warnings += program.problems
        result = self._judge(item, ended, program)
        result.seconds, result.log, result.tail = time.monotonic() - began, str(program.file.path), program.tail.lines()
        return result

    def _job(self, item: Item) -> Job:
        manifest, image, environ = self.manifest, self.seen.image, self.call.environ
        return Job(
            mode="run",
            nonce=os.urandom(8).hex(),
            mount=str(self.seen.root),
            image={"id": image.id, "labels": {"ai.sglang.build.commit": image.commit} if image.commit else {}},
            task=item.task,
            lifetime=item.task.timeout + manifest.run.grace + manifest.run.start,
            grace=manifest.run.grace,
            log_limit=manifest.container.log_limit,
            workdir=str(Path.cwd()),
            secrets=tuple(name for name in manifest.container.secrets if environ.get(name)),
            observed={
                "host": socket.gethostname(),
                "builder": __version__,
                "image": "this environment",
                "run": self.run_id,
            },
        )

    def _tell(self, event: events.Event) -> None:
        match event:
            case events.Phase():
                self.console.say(f"  ▸ {printable(event.phase)}")
            case events.Quarantined():
                self.console.say(f"  ▸ moved aside {printable(f'{event.family}/{event.path}: {event.why}')}")

    def _judge(self, item: Item, ended: str, program: Program) -> TaskResult:
        """Only a marker of this run that holds on disk makes a task warmed, whatever the program said."""
        verdict = program.verdict or events.Verdict()
        numbers: dict[str, Any] = {"entries": verdict.entries, "added": verdict.added, "proof": verdict.proof}
        if ended in ENDED_EARLY:
            state, reason = ENDED_EARLY[ended]
            if state == "cold" and item.warm:  # forced, and what it had is there still
                state = "warm"
            return result_of(item, state, reason.format(task=item.task), **numbers)
        how = describe_status(program.status)
        if program.verdict is None:
            return result_of(item, "failed", f"the program ended with {how} and gave no verdict", **numbers)
        reason = printable(verdict.reason)
        if verdict.state != "warmed":
            state = "failed" if verdict.state == "stopped" else verdict.state
            return result_of(item, state, reason, **numbers)
        if program.status != 0:
            return result_of(item, "failed", f"its verdict is warmed, but the program ended with {how}", **numbers)
        plan = self.seen.plan((item.task,))
        now = plan.items[0] if plan else item
        marker = now.judgement.marker
        if not now.warm:
            return result_of(item, "failed", f"its marker does not hold: {now.judgement.reason}", **numbers)
        if marker is None or marker.observed.run != self.run_id:
            return result_of(item, "failed", "its verdict is warmed, but the marker is an older one", **numbers)
        return result_of(now, "warmed", reason, verified=numbers["proof"] == "verified", **numbers)

    def _settle(self, result: TaskResult) -> None:
        """Puts a task's result into the report, in the place of its plan, and says it."""
        tasks, console = self.call.report.tasks, self.console
        tasks[[task.label for task in tasks].index(result.label)] = result
        if result.state in ("warmed", "warm", "cold"):
            why = f" ({result.reason})" if result.reason else ""
            console.say(f"{result.label}: {result.state} in {duration(result.seconds)}{why}")
            return
        console.say(f"{result.label}: {result.state}: {result.reason}")
        for line in result.tail:
            console.log("out", line)
        console.annotate(f"{result.label} {result.state}", result.reason)

    def _conclude(self) -> None:
        report = self.call.report
        if report.count("cold") and self.budget.expired:
            raise BudgetError(
                f"the budget ended with {report.count('cold')} of {counted(len(report.tasks), 'task')} still cold; "
                "what is finished stays warm, run again to go on"
            )
        kinds = [
            f"{report.count(state)} {state}"
            for state in ("failed", "partial", "skipped", "cold")
            if report.count(state)
        ]
        if kinds:
            raise TasksError(f"{', '.join(kinds)} of {counted(len(report.tasks), 'task')}")


class Program:
    """The in-container program, once. Its lines go to people and to a file, its events to ``on_event``.

    problems: what went wrong around it, one sentence each.
    """

    def __init__(
        self,
        job: Job,
        environ: Mapping[str, str],
        show: Callable[[str, str], None],
        on_event: Callable[[events.Event], None],
        log: Path,
    ) -> None:
        self._job = job
        self._environ = environ
        self._on_event = on_event
        self._prefix = events.prefix(job.nonce)
        self._display = Display(show)
        self._lock = threading.Lock()  # two streams, one log
        self._heard = time.monotonic()
        self.file = LogFile(log)
        self.tail = Tail()
        self.verdict: events.Verdict | None = None
        self.status: int | None = None
        self.problems: list[str] = []

    def run(
        self,
        *,
        task: Deadline,
        silence: float,
        budget: Deadline,
        grace: float,
        wait: Callable[[float], bool],
    ) -> str:
        """To its end, and to the end of all that it started: ``exited``, or why it was ended. wait: for so many
        seconds, or until somebody wants to go; says whether somebody does.
        """
        self.file.open()
        self._display.open()
        process = self._start()
        pumps = [
            threading.Thread(target=self._pump, args=(stream, mark), daemon=True)
            for stream, mark in ((process.stdout, "out"), (process.stderr, "err"))
        ]
        ended = "exited"
        try:
            for pump in pumps:
                pump.start()
            while process.poll() is None:
                if wait(0.05):
                    ended = "cancelled"
                elif task.expired:
                    ended = "timeout"
                elif budget.expired:
                    ended = "budget"
                elif time.monotonic() - self._heard > silence:
                    ended = "silence"
                else:
                    continue
                break
        finally:
            self._end(process, min(grace, CANCEL_GRACE) if ended == "cancelled" else grace + 1)
            for pump in pumps:
                pump.join(5.0)
            self._display.close(1.0)
            self.file.close()
        self.problems += [problem for problem in (self.file.problem, self._display.problem) if problem]
        return ended

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        try:
            return subprocess.Popen(
                [sys.executable, "-c", _START, root],
                env={**self._environ, JOB_VARIABLE: self._job.to_json()},
                stdin=subprocess.PIPE,  # never written to: its end is ours, and that is the lease
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise PreflightError(f"this machine can't run it: {sys.executable}: {error.strerror}") from None

    def _end(self, process: subprocess.Popen[bytes], grace: float) -> None:
        """SIGTERM, and after so many seconds SIGKILL; then to everything below us that is still there."""
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        if process.poll() is None:
            process.kill()
        self.status = process.wait()
        if not processes.kill_descendants():
            self.problems.append("a process of the warm-up could not be ended")
        if process.stdin is not None:
            process.stdin.close()

    def _pump(self, stream: Any, mark: str) -> None:
        lines = Lines()
        while data := os.read(stream.fileno(), _CHUNK):
            self._heard = time.monotonic()
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
        except Exception as error:  # noqa: BLE001 - whatever it is, draining goes on
            self.problems.append(f"showing an event failed: {type(error).__name__}: {error}")
        return True
